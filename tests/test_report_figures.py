"""The parts of figures that can be wrong without looking wrong."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jxfer.report.costs import _apart
from jxfer.report.curves import _places, _spread, accuracy_figure
from jxfer.report.results import collect
from jxfer.report.style import INK, looks, shorten


def test_no_two_methods_look_alike():
    methods = [f"method{index}" for index in range(60)]
    found = looks(methods, methods[:2])
    assert len({(look.colour, look.marker) for look in found.values()}) == 60
    assert [look.line for look in found.values()][:3] == ["--", "--", "-"]


@given(st.lists(st.floats(0, 100), min_size=1, max_size=12).map(sorted))
def test_labels_keep_their_order_and_their_distance(values: list[float]):
    placed = _spread(values, gap=3.0, top=100.0)
    assert max(placed) <= 100.0
    assert all(gap >= 3.0 - 1e-9 for gap in np.diff(placed))


def test_labels_with_room_stay_where_they_are():
    assert _spread([10.0, 20.0, 40.0], gap=3.0, top=100.0) == [10.0, 20.0, 40.0]


def test_equal_costs_are_set_apart_around_their_place():
    shifts = _apart([5, 7, 5, 5], step=0.1)
    assert shifts == pytest.approx([-0.1, 0.0, 0.0, 0.1])


def test_all_examples_stand_to_the_right_of_numbers():
    assert _places((1, 20, None)) == {1: 1.0, 20: 20.0, None: 40.0}
    assert _places((None,)) == {None: 1.0}


def test_long_names_lose_their_middle():
    assert shorten("class number 12", 11) == "class…er 12"
    assert shorten("two\nlines") == "two lines"


def test_drawings_follow_the_colours_of_the_page():
    rows = [
        {"method": "$a_1$ <i>", "shots": shots, "seed": 0, "status": "ok", "metrics": {"accuracy": 0.5}}
        for shots in (1, None)
    ]
    results = collect(rows)
    figure = accuracy_figure(results, looks(results.methods, ()))
    for svg in (figure.wide, figure.narrow):
        assert INK not in svg
        assert "#ffffff" not in svg
        assert "var(--c0)" in svg
        assert "$a_1$ &lt;i&gt;" in svg
        assert "http" not in svg
