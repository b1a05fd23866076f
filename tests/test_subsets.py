"""The laws of drawing: disjoint, per class, nested in shots, and the same for the same seed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jxfer.config import DataConfig
from jxfer.data import ArraySplit, Dataset, draw
from jxfer.typing import InputError

CONFIG = DataConfig(test_fraction=0.5, validation_fraction=0.3)


def make_split(counts, prefix="train"):
    labels = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
    ids = np.array([f"{prefix}/{i}" for i in range(len(labels))])
    return ArraySplit(ids, labels, {"image": np.zeros((len(labels), 2, 2, 1), np.uint8)})


def make_dataset(counts, **splits):
    names = tuple(f"class{i}" for i in range(len(counts)))
    return Dataset("toy", "1.0.0", names, {"train": make_split(counts), **splits}, (2, 2, 1))


counts = st.lists(st.integers(6, 30), min_size=2, max_size=5)


@settings(max_examples=30, deadline=None)
@given(counts=counts, seed=st.integers(0, 1000), shots=st.sampled_from([1, 2, None]))
def test_the_three_splits_are_disjoint_and_hold_the_asked_shots(counts, seed, shots):
    drawn = draw(make_dataset(counts), CONFIG, shots=shots, seed=seed)
    train, validation, test = (set(split.ids) for split in (drawn.train, drawn.validation, drawn.test))
    assert not train & validation
    assert not train & test
    assert not validation & test
    if shots is None:
        assert len(train | validation | test) == sum(counts)
    else:
        assert np.bincount(drawn.train.labels).tolist() == [shots] * len(counts)


@settings(max_examples=30, deadline=None)
@given(counts=counts, seed=st.integers(0, 1000))
def test_each_class_gives_its_share(counts, seed):
    drawn = draw(make_dataset(counts), CONFIG, shots=None, seed=seed)
    for label, count in enumerate(counts):
        assert abs((drawn.test.labels == label).sum() - count / 2) <= 0.5
        assert abs((drawn.validation.labels == label).sum() - 0.3 * (count - (drawn.test.labels == label).sum())) <= 0.5


@settings(max_examples=30, deadline=None)
@given(counts=counts, seed=st.integers(0, 1000))
def test_fewer_shots_are_among_more_and_validation_stays(counts, seed):
    dataset = make_dataset(counts)
    one, two, everything = (draw(dataset, CONFIG, shots=shots, seed=seed) for shots in (1, 2, None))
    assert set(one.train.ids) < set(two.train.ids) <= set(everything.train.ids)
    assert one.validation.ids.tolist() == two.validation.ids.tolist() == everything.validation.ids.tolist()


def test_the_test_split_is_the_same_for_every_seed_and_the_others_are_not():
    dataset = make_dataset([30, 30])
    first, second = (draw(dataset, CONFIG, shots=3, seed=seed) for seed in (0, 1))
    assert first.test.ids.tolist() == second.test.ids.tolist()
    assert first.validation.ids.tolist() != second.validation.ids.tolist()
    assert first.train.ids.tolist() != second.train.ids.tolist()


def test_splits_of_the_data_set_are_used_where_it_has_them():
    validation, test = make_split([2, 2], "validation"), make_split([3, 3], "test")
    drawn = draw(make_dataset([4, 4], validation=validation, test=test), CONFIG, shots=None, seed=0)
    assert drawn.validation is validation
    assert drawn.test is test
    assert len(drawn.train) == 8


def test_the_hash_names_examples_and_version():
    dataset = make_dataset([30, 30])
    first = draw(dataset, CONFIG, shots=3, seed=0)
    assert first.subset_hash == draw(dataset, CONFIG, shots=3, seed=0).subset_hash
    newer = Dataset("toy", "1.0.1", dataset.class_names, dataset.splits, dataset.input_shape)
    others = [draw(dataset, CONFIG, shots=3, seed=1), draw(dataset, CONFIG, shots=4, seed=0), draw(newer, CONFIG, 3, 0)]
    assert len({first.subset_hash, *(drawn.subset_hash for drawn in others)}) == 4
    assert len(first.subset_hash) == 16


def test_more_shots_than_a_class_has_names_the_class_and_its_count():
    with pytest.raises(InputError, match=r"20 shots asked, but class 'class1' has 2 training examples"):
        draw(make_dataset([100, 6]), CONFIG, shots=20, seed=0)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5])
def test_a_fraction_outside_0_and_1_is_refused(fraction):
    with pytest.raises(InputError, match="between 0 and 1"):
        draw(make_dataset([9, 9]), DataConfig(test_fraction=fraction), shots=1, seed=0)


@pytest.mark.parametrize("shots", [1, None])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_class_that_is_too_small_to_split_is_named_with_what_it_needs(count, shots):
    with pytest.raises(
        InputError, match=rf"'class1' has too few examples \({count}\), none is left for \w+; it needs at least 3"
    ):
        draw(make_dataset([9, count]), CONFIG, shots=shots, seed=0)


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_three_examples_of_a_class_are_enough_for_any_fraction(fraction):
    config = DataConfig(test_fraction=fraction, validation_fraction=fraction)
    drawn = draw(make_dataset([3, 3]), config, shots=None, seed=0)
    assert all(np.bincount(split.labels).tolist() == [1, 1] for split in (drawn.train, drawn.validation, drawn.test))


@pytest.mark.parametrize("name", ["test", "validation"])
def test_a_split_of_the_data_set_that_lacks_a_class_is_named(name):
    with pytest.raises(InputError, match=f"class 'class1' has no example in the {name} split of data set 'toy'"):
        draw(make_dataset([9, 9], **{name: make_split([3, 0], name)}), CONFIG, shots=1, seed=0)
