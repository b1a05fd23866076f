"""Folders of images: classes, splits, odd names, and every file that does not fit reported."""

import logging

import numpy as np
import pytest
from PIL import Image

from jxfer.config import DataConfig
from jxfer.data import draw, load_dataset
from jxfer.data.dataset import LazySplit
from jxfer.typing import InputError


def add_image(path, *, size=(6, 5), mode="RGB", colour=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour if mode == "L" else (colour,) * 3).save(path, "png")


def load(root, **settings):
    return load_dataset(DataConfig(name=f"folder:{root}", **settings))


@pytest.fixture
def root(tmp_path):
    for index in range(4):
        add_image(tmp_path / "pets" / "ants" / f"{index}.png", colour=index)
        add_image(tmp_path / "pets" / "bees" / f"{index}.png", colour=10 + index)
    return tmp_path / "pets"


def test_sub_folders_are_classes(root):
    dataset = load(root)
    split = dataset.splits["train"]
    assert dataset.name == "pets"
    assert dataset.class_names == ("ants", "bees")
    assert dataset.input_shape == (5, 6, 3)
    assert split.ids.tolist() == [f"{name}/{i}.png" for name in ("ants", "bees") for i in range(4)]
    assert split.labels.tolist() == [0] * 4 + [1] * 4
    assert split.read(np.array([5]))["image"][0, 0, 0].tolist() == [11, 11, 11]
    assert dataset.skipped == ()
    assert len(draw(dataset, DataConfig(), shots=1, seed=0).train) == 2


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        (("train", "val"), {"train", "test"}),
        (("train", "valid", "test"), {"train", "validation", "test"}),
        (("train", "validation", "test"), {"train", "validation", "test"}),
        (("train", "test"), {"train", "test"}),
        (("train",), {"train"}),
        (("Train", "VAL", "Test"), {"train", "validation", "test"}),
        (("training_set", "test_set"), {"train", "test"}),
        (("training", "testing"), {"train", "test"}),
    ],
)
def test_split_folders_are_recognised(tmp_path, folders, splits):
    for folder in folders:
        for name in ("a", "b"):
            add_image(tmp_path / folder / name / "x.png")
    dataset = load(tmp_path)
    assert set(dataset.splits) == splits
    assert dataset.splits["train"].ids.tolist() == [f"{folders[0]}/a/x.png", f"{folders[0]}/b/x.png"]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("val", "test"), "/test' is named like a split, but there is no folder 'train'"),
        (("train", "val", "valid"), "/val' and 'valid' are validation; keep one"),
        (("train", "extra", "test"), "/extra' stands beside 'train' and is no split"),
        (("data", "more"), "holds images directly, the first is 'data/a/x.png'; expected CLASS/IMAGE or train/CLASS"),
    ],
)
def test_other_layouts_are_refused_in_one_line(tmp_path, folders, message):
    for folder in folders:
        for name in ("a", "b"):
            add_image(tmp_path / folder / name / "x.png")
    with pytest.raises(InputError, match=message) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_odd_names_are_fine_and_hidden_files_do_not_count(root):
    add_image(root / "ants" / "ämeise 蚂蚁 #1%.png")
    add_image(root / "ants" / "deep er" / "x.JPG")
    add_image(root / "käfer\n" / "x.png")
    (root / "ants" / ".DS_Store").write_bytes(b"x")
    (root / ".hidden").mkdir()
    dataset = load(root)
    assert dataset.class_names == ("ants", "bees", "käfer\n")
    assert {"ants/ämeise 蚂蚁 #1%.png", "ants/deep er/x.JPG"} < set(dataset.splits["train"].ids)
    assert dataset.skipped == ()


def test_a_name_that_is_no_utf8_is_fine(root):
    path = root / "ants" / b"caf\xe9.png".decode("utf-8", "surrogateescape")
    try:
        add_image(path)
    except OSError:
        pytest.skip("this file system allows UTF-8 only")
    assert len(draw(load(root), DataConfig(), shots=1, seed=0).subset_hash) == 16


def test_unreadable_files_are_named_and_counted(root, caplog):
    whole = root / "ants" / "whole.png"
    add_image(whole, size=(60, 50))
    (root / "ants" / "cut.png").write_bytes(whole.read_bytes()[:-60])
    whole.unlink()
    (root / "bees" / "empty.png").write_bytes(b"")
    (root / "bees" / "notes.txt").write_text("no image")
    with caplog.at_level(logging.WARNING):
        dataset = load(root, image_size=4)
    assert sorted(dataset.skipped) == ["ants/cut.png", "bees/empty.png", "bees/notes.txt"]
    assert "3 files" in caplog.text
    assert all(name in caplog.text for name in dataset.skipped)
    assert len(dataset.splits["train"]) == 8


@pytest.mark.parametrize("kept_bytes", [0, -60])
@pytest.mark.parametrize("folder", ["", "train", "test"])
def test_a_class_of_which_nothing_can_be_read_is_named_with_a_file(tmp_path, folder, kept_bytes):
    for name in ("train/a", "train/b", "test/a", "test/b") if folder else ("a", "b"):
        add_image(tmp_path / name / "0.png", size=(60, 50))
    bad = tmp_path / folder / "b" / "0.png"
    bad.write_bytes(bad.read_bytes()[:kept_bytes])
    with pytest.raises(
        InputError, match=r"no image is left in '.*/b': files that could not be read: 1, one is '.*b/0.png'"
    ):
        load(tmp_path)


def test_a_data_set_of_cut_images_only_is_refused(root):
    for path in root.glob("*/*.png"):
        add_image(path, size=(60, 50))
        path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(
        InputError, match=r"no image is left in '.*/ants': files that could not be read: 4, one is 'ants/0.png'"
    ):
        load(root)


def test_what_does_not_fit_in_memory_is_read_on_demand_and_damage_is_named(root, monkeypatch):
    monkeypatch.setattr("jxfer.data.opening.MEMORY_BYTES", 0)
    split = load(root).splits["train"]
    assert isinstance(split, LazySplit)
    assert split.read(np.array([1, 5]))["image"][:, 0, 0, 0].tolist() == [1, 11]
    (root / "bees" / "1.png").write_bytes(b"gone")
    with pytest.raises(InputError, match=r"example 'bees/1.png' of '.*' cannot be read: .*; mend or remove it"):
        split.read(np.array([1, 5]))


def test_different_sizes_need_an_image_size(root):
    add_image(root / "bees" / "large.png", size=(40, 30))
    with pytest.raises(InputError, match=r"'ants/0.png' is 6x5, 'bees/large.png' is 40x30; set data.image_size"):
        load(root)
    assert load(root, image_size=8).input_shape == (8, 8, 3)


def test_grey_images_among_coloured_ones_become_coloured(root):
    assert load(root, channels=1).input_shape == (5, 6, 1)
    add_image(root / "bees" / "grey.png", mode="L")
    assert load(root).input_shape == (5, 6, 3)


def test_the_version_changes_with_the_files(root):
    before = load(root).version
    assert load(root).version == before
    (root / "ants" / "0.png").unlink()
    assert load(root).version != before


@pytest.mark.parametrize(("content_bytes", "noticed"), [(256 * 1024**2, True), (0, False)])
def test_other_contents_of_equal_length_are_noticed_in_small_folders(root, monkeypatch, content_bytes, noticed):
    monkeypatch.setattr("jxfer.data.opening.CONTENT_BYTES", content_bytes)
    before, path = load(root).version, root / "ants" / "0.png"
    size = path.stat().st_size
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # in the checksum of the last chunk, which Pillow does not read
    path.write_bytes(content)
    assert path.stat().st_size == size
    assert (load(root).version != before) == noticed


def test_no_folder_no_images_and_one_class_are_one_line_each(tmp_path):
    with pytest.raises(InputError, match=r"no folder '.*/absent'"):
        load(tmp_path / "absent")
    with pytest.raises(InputError, match="no images in"):
        load(tmp_path)
    add_image(tmp_path / "ants" / "x.png")
    with pytest.raises(InputError, match="one class only, 'ants'"):
        load(tmp_path)


def test_a_class_without_training_images_is_refused(tmp_path):
    for path in ("train/a/x.png", "train/b/x.png", "val/c/x.png"):
        add_image(tmp_path / path)
    with pytest.raises(InputError, match="class 'c' has no training images"):
        load(tmp_path)
