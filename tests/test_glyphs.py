"""The builder of the rendered characters, at both resolutions."""

import numpy as np
import pytest

from jxfer.config import DataConfig
from jxfer.data import load_dataset, render

glyphs = pytest.importorskip("jxfer.data.glyphs")


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.setenv("JXFER_CACHE", str(tmp_path))
    monkeypatch.setattr(glyphs, "EXAMPLES_PER_CLASS", {"train": 3, "test": 1})


def test_both_resolutions_hold_the_same_renderings(small):
    fine = load_dataset(DataConfig(name="tfds:jxfer_glyphs/32x32"))
    coarse = load_dataset(DataConfig(name="tfds:jxfer_glyphs"))
    assert coarse.class_names == tuple(render.CHARACTERS)
    assert (coarse.input_shape, fine.input_shape) == ((8, 8, 1), (32, 32, 1))
    for split, num in (("train", 186), ("test", 62)):
        assert len(coarse.splits[split]) == num
        ink = fine.splits[split].arrays["image"][..., 0] // 255
        assert (render.counts_to_pixels(render.block_counts(ink)) == coarse.splits[split].arrays["image"][..., 0]).all()
        assert (np.bincount(coarse.splits[split].labels) == num // 62).all()
