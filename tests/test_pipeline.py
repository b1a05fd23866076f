"""The laws of batches: epochs are permutations, a jump equals a replay, evaluation counts each example once."""

import itertools
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jxfer.data import ArraySplit, LazySplit, Subset, batches, eval_batches
from jxfer.data.ahead import Ahead
from jxfer.data.pipeline import batch_indices
from jxfer.typing import InputError

sizes = {"num_examples": st.integers(1, 40), "batch_size": st.integers(1, 50), "seed": st.integers(0, 1000)}


def make_split(num):
    image = np.arange(num, dtype=np.uint8).reshape(num, 1, 1, 1)
    return ArraySplit(np.arange(num).astype(str), np.arange(num, dtype=np.int32), {"image": image})


def make_lazy(num):
    return LazySplit(
        np.arange(num).astype(str), np.arange(num, dtype=np.int32), lambda index: np.full((1, 1, 1), index, np.uint8)
    )


def take(stream, num):
    return [batch["label"].tolist() for batch in itertools.islice(stream, num)]


@settings(max_examples=50, deadline=None)
@given(**sizes)
def test_each_epoch_is_a_permutation_and_every_batch_is_full(num_examples, batch_size, seed):
    epochs = 3
    num_batches = -(-epochs * num_examples // batch_size)
    parts = [
        batch_indices(num_examples=num_examples, batch_size=batch_size, seed=seed, batch=k) for k in range(num_batches)
    ]
    assert {len(part) for part in parts} == {batch_size}
    stream = np.concatenate(parts)[: epochs * num_examples].reshape(epochs, num_examples)
    assert (np.sort(stream, axis=1) == np.arange(num_examples)).all()


@pytest.mark.parametrize("make", [make_split, make_lazy])
@pytest.mark.parametrize("num", [3, 10, 17])
def test_a_jump_equals_a_replay(make, num):
    replayed = take(batches(make(num), batch_size=4, seed=5), 12)
    assert take(batches(make(num), batch_size=4, seed=5, start=7), 5) == replayed[7:]


def test_a_far_jump_is_immediate():
    assert len(take(batches(make_split(10), batch_size=4, seed=0, start=10**12), 2)) == 2


def test_epochs_and_seeds_differ():
    split = make_split(50)
    first, second = take(batches(split, batch_size=50, seed=0), 2)
    assert first != second
    assert take(batches(split, batch_size=50, seed=1), 1) != [first]
    assert take(batches(split, batch_size=50, seed=1), 1) != [second]


def test_images_travel_with_their_labels():
    split = Subset(make_lazy(30), np.arange(5, 25))
    for batch in itertools.islice(batches(split, batch_size=8, seed=0), 5):
        assert batch["image"].dtype == np.uint8
        assert batch["label"].dtype == np.int32
        assert batch["mask"].tolist() == [1.0] * 8
        assert (batch["image"][:, 0, 0, 0] == batch["label"]).all()
        assert batch["label"].min() >= 5


def test_stored_features_are_batched_like_images():
    split = ArraySplit(np.array(["a", "b"]), np.array([0, 1], np.int32), {"features": np.eye(2, dtype=np.float32)})
    batch = next(batches(split, batch_size=4, seed=0))
    assert (batch["features"].argmax(1) == batch["label"]).all()


READERS = {
    "training": lambda split, **rows: itertools.islice(batches(split, batch_size=8, seed=3, **rows), 4),
    "evaluation": lambda split, **rows: eval_batches(split, batch_size=8, **rows),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_the_rows_of_all_processes_make_up_the_global_batch(name, process_count):
    split, reader = make_split(10), READERS[name]
    parts = [list(reader(split, rows=rows)) for rows in np.split(np.arange(8), process_count)]
    for index, batch in enumerate(reader(split)):
        for key in ("image", "label", "mask"):
            assert (np.concatenate([part[index][key] for part in parts]) == batch[key]).all()


@pytest.mark.parametrize("name", READERS)
def test_rows_beyond_the_batch_fill_it_up_with_its_first_that_does_not_count(name):
    split, reader = make_split(10), READERS[name]
    for filled, batch in zip(reader(split, rows=np.arange(6, 10)), reader(split), strict=True):
        assert filled["label"].tolist() == batch["label"][[6, 7, 0, 0]].tolist()
        assert filled["mask"].tolist() == [*batch["mask"][[6, 7]], 0, 0]


@settings(max_examples=50, deadline=None)
@given(num=st.integers(1, 40), batch_size=st.integers(1, 50))
def test_evaluation_counts_each_example_once_in_order(num, batch_size):
    passed = list(eval_batches(make_split(num), batch_size=batch_size))
    assert {len(batch["mask"]) for batch in passed} == {batch_size}
    real = np.concatenate([batch["label"][batch["mask"] > 0] for batch in passed])
    assert real.tolist() == list(range(num))


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(InputError, match="batch size 0 is not positive"):
        batches(make_split(4), batch_size=0, seed=0)


def test_an_empty_split_is_refused():
    with pytest.raises(InputError, match="no examples"):
        batches(make_split(0), batch_size=4, seed=0)


@pytest.mark.parametrize("make", [make_split, make_lazy])
def test_two_hundred_streams_read_ahead_leave_no_thread(make):
    before = threading.active_count()
    for seed in range(200):
        with Ahead(batches(make(30), batch_size=8, seed=seed)) as stream:
            assert len(next(stream)["label"]) == 8
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:  # of Grain's, which end when they wake up
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_what_reading_raises_reaches_the_step_as_it_was_raised():
    def damaged(index):
        raise InputError(f"record {index} is damaged")

    split = LazySplit(np.array(["a"]), np.zeros(1, np.int32), damaged)
    with Ahead(batches(split, batch_size=2, seed=0)) as stream, pytest.raises(InputError) as raised:
        next(stream)
    assert str(raised.value) == "record 0 is damaged"
