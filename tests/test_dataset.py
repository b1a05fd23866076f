"""Splits in memory, read on demand and selected, and which splits a data set ends up with."""

import numpy as np
import pytest

from jxfer.data import ArraySplit, LazySplit, Split, Subset
from jxfer.data.dataset import decode_all, usual_splits
from jxfer.typing import InputError


def lazy(num=5, bad=()):
    def image_at(index):
        if index in bad:
            raise OSError("cut off")
        return np.full((2, 2, 1), index % 256, np.uint8)

    return LazySplit(np.arange(num).astype(str), np.arange(num, dtype=np.int32), image_at)


def test_decoding_everything_keeps_order_and_tells_what_failed():
    loaded, bad = decode_all(lazy(600, bad=(3, 599)))
    assert bad == [3, 599]
    assert loaded.labels.tolist() == [i for i in range(600) if i not in (3, 599)]
    assert (loaded.arrays["image"][:, 0, 0, 0] == loaded.labels % 256).all()


def test_a_subset_of_a_subset_reads_the_right_examples():
    for base in (lazy(), decode_all(lazy())[0]):
        subset = Subset(Subset(base, np.array([4, 2, 0])), np.array([2, 0]))
        assert isinstance(subset, Split)
        assert subset.ids.tolist() == ["0", "4"]
        assert subset.labels.tolist() == [0, 4]
        batch = subset.read(np.array([1, 1, 0]))
        assert batch["label"].tolist() == batch["image"][:, 0, 0, 0].tolist() == [4, 4, 0]


@pytest.mark.parametrize(
    ("found", "kept"),
    [
        (["train", "validation"], ["train", "test"]),
        (["train", "test", "extra"], ["train", "test"]),
        (["train", "val", "test"], ["train", "validation", "test"]),
        (["all"], ["train"]),
    ],
)
def test_splits_get_their_usual_names(found, kept):
    split = ArraySplit(np.array(["0"]), np.zeros(1, np.int32), {})
    assert sorted(usual_splits(dict.fromkeys(found, split), name="toy")) == sorted(kept)


def test_a_data_set_without_training_split_is_refused():
    with pytest.raises(InputError, match="no split 'train', only a, b"):
        usual_splits({"a": lazy(), "b": lazy()}, name="toy")
