"""Rendered characters: repeatable, filling their box, and with the pixel statistics of the handwritten digits."""

import numpy as np
import pytest

from jxfer.data.render import CHARACTERS, block_counts, counts_to_pixels, fonts, render

LABELS = np.repeat(np.arange(len(CHARACTERS)), 6)


@pytest.fixture(scope="module")
def images():
    return render(LABELS, seed=0)


def test_the_same_seed_gives_the_same_pixels_and_another_does_not(images):
    assert (render(LABELS, seed=0) == images).all()
    assert (render(LABELS, seed=1) != images).any()


def test_symbol_maths_and_fallback_fonts_are_left_out():
    names = [path.stem for path in fonts()]
    assert "DejaVuSans" in names
    assert "STIXGeneral" in names
    assert not [name for name in names if name.startswith(("cm", "STIXSiz", "STIXNonUni", "LastResort"))]


def test_characters_fill_the_height_of_their_box(images):
    assert images.dtype == np.uint8
    assert set(np.unique(images)) == {0, 1}
    assert (block_counts(images).sum(axis=2) > 0).all(axis=1).mean() > 0.99


def test_pixels_resemble_those_of_the_target(images):
    from sklearn.datasets import load_digits

    rendered, written = block_counts(images) / 16, load_digits().images / 16
    assert abs(rendered.mean() - written.mean()) < 0.03
    assert abs((rendered == 0).mean() - (written == 0).mean()) < 0.05
    assert abs((rendered == 1).mean() - (written == 1).mean()) < 0.03


def test_blocks_are_counted_as_in_the_uci_digits():
    image = np.zeros((1, 32, 32), np.uint8)
    image[0, :4, :3] = 1
    image[0, 31, 31] = 1
    counts = block_counts(image)
    assert counts.shape == (1, 8, 8)
    assert counts[0, 0, 0] == 12
    assert counts[0, 7, 7] == 1
    assert counts.sum() == 13


def test_counts_come_back_from_pixels():
    counts = np.arange(17)
    assert (np.round(counts_to_pixels(counts) * (16 / 255)) == counts).all()
