"""Names and layouts read in both directions: what one does the other undoes, for every architecture."""

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jxfer import models
from jxfer.config import ModelConfig
from jxfer.typing import InputError
from jxfer.weights.names import namings_of
from jxfer.weights.naming import CONV, LINEAR, Axes, FlatLinear, Layout, Naming, Rule, Same, Squeezed
from jxfer.weights.save import export_tensors

SIDES = st.integers(1, 4)


def orders_of(shape: list[int]) -> st.SearchStrategy[tuple[list[int], list[int]]]:
    return st.tuples(st.just(shape), st.permutations(range(len(shape))))


@given(st.lists(SIDES, min_size=1, max_size=4).flatmap(orders_of), st.integers(0, 2), SIDES, SIDES, SIDES, SIDES)
def test_layouts_undo_themselves(shape_and_order, count, rows, columns, channels, out):
    shape, order = map(tuple, shape_and_order)
    cases: list[tuple[Layout, tuple[int, ...], tuple[int, ...]]] = [
        (Same(), shape, shape),
        (Axes(order), shape, tuple(shape[axis] for axis in order)),
        (CONV, (out, channels, rows, columns), (rows, columns, channels, out)),
        (LINEAR, (out, channels), (channels, out)),
        (Squeezed(count), (1,) * count + shape, shape),
        (FlatLinear(rows, columns), (out, channels * rows * columns), (rows * columns * channels, out)),
    ]
    for layout, theirs, ours in cases:
        array = np.arange(np.prod(theirs)).reshape(theirs)
        assert layout.to_ours(array).shape == ours
        np.testing.assert_array_equal(layout.to_theirs(layout.to_ours(array)), array)
        array = array.reshape(ours)
        np.testing.assert_array_equal(layout.to_ours(layout.to_theirs(array)), array)


def test_a_flattened_image_is_flattened_our_way():
    images, kernel = np.random.default_rng(0).normal(size=(2, 3, 4, 5)), np.random.default_rng(1).normal(size=(7, 60))
    ours = images.transpose(0, 2, 3, 1).reshape(2, -1) @ FlatLinear(4, 5).to_ours(kernel)
    np.testing.assert_allclose(ours, images.reshape(2, -1) @ kernel.T)


CASES = [
    (name, naming)
    for name in models.names()
    for naming in namings_of(models.size_of(ModelConfig(name)))
    if naming.rules(models.size_of(ModelConfig(name)))
]


@pytest.mark.parametrize(("name", "naming"), CASES, ids=[f"{name}-{naming.name}" for name, naming in CASES])
def test_rules_of_every_architecture_lead_there_and_back(name, naming):
    for rule in naming.rules(models.size_of(ModelConfig(name))):
        numbers = {field: str(3 + 9 * i) for i, field in enumerate(sorted(set(re.findall(r"{(\w+)}", rule.theirs))))}
        theirs = rule.theirs.format(**numbers)
        ours = tuple(path.format(**numbers) for path in rule.paths)
        assert rule.ours_of(theirs) == ours
        assert {rule.theirs_of(path) for path in ours} == {theirs}
        assert rule.ours_of(f"x{theirs}") is None
        assert rule.theirs_of(f"{ours[0]}x") is None


NUMBERS = st.integers(0, 120).map(str)


@given(NUMBERS, NUMBERS, NUMBERS)
def test_fields_stand_for_the_same_digits_on_both_sides(first, second, other):
    rule = Rule("layer{n}.{i}.in_proj_{n}", ("l{n}/{i}/query", "l{n}/{i}/key"))
    theirs, ours = f"layer{first}.{second}.in_proj_{first}", (f"l{first}/{second}/query", f"l{first}/{second}/key")
    assert rule.ours_of(theirs) == ours
    assert {rule.theirs_of(path) for path in ours} == {theirs}
    if first != other:
        assert rule.ours_of(f"layer{first}.{second}.in_proj_{other}") is None


@pytest.mark.parametrize("name", ["layer1.x.weight", "layer1.0.weight.more", "layer1x0.weight", "layer.0.weight"])
def test_a_field_is_digits_and_a_dot_is_a_dot(name):
    assert Rule("layer{n}.{i}.weight", "l{n}/{i}/kernel").ours_of(name) is None


QKV = Naming("joined", lambda size: (Rule("qkv", ("query", "key", "value"), LINEAR), Rule("out", "out/kernel", LINEAR)))


def test_leaves_that_share_a_tensor_are_exported_joined():
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {name: rng.normal(size=(2, 3)) for name in ("value", "query", "out/kernel", "key")}
    tensors = export_tensors(arrays, QKV, None)
    assert set(tensors) == {"qkv", "out"}
    np.testing.assert_array_equal(tensors["qkv"], np.concatenate([arrays[n].T for n in ("query", "key", "value")]))
    assert all(tensor.flags["C_CONTIGUOUS"] for tensor in tensors.values())


def test_what_cannot_be_exported_is_named():
    with pytest.raises(InputError, match=r"`qkv` needs `key`, which is not given; nearest: `query`"):
        export_tensors({"query": np.zeros((2, 3))}, QKV, None)
    with pytest.raises(InputError, match=r"joined has no name for `out/kernal`; nearest: `out/kernel`"):
        export_tensors({"out/kernal": np.zeros((2, 3))}, QKV, None)
