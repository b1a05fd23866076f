"""Preparation on the device: scale, change, mix and normalise, the same on one device as on many."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jxfer.config import AugmentConfig, DataConfig
from jxfer.data import Prepare
from jxfer.typing import InputError

KEY = jax.random.key(0)
PLAIN = DataConfig(mean=(0.0,), std=(1.0,))
OFF = AugmentConfig()


def make_batch(num=16, side=6, channels=3, padded=0):
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (num, side, side, channels)).astype(np.uint8),
        "label": rng.integers(0, 4, num).astype(np.int32),
        "mask": (np.arange(num) < num - padded).astype(np.float32),
    }


@functools.cache
def compiled(config, train):
    return jax.jit(Prepare(config, num_classes=4, train=train))


def prepare(batch, augment=OFF, *, train=True, config=PLAIN, key=KEY):
    return compiled(dataclasses.replace(config, augment=augment), train)(key, batch)


ALL = AugmentConfig(crop_padding=2, flip=True, brightness=0.3, mixup=0.4, cutmix=1.0)
EACH = [
    AugmentConfig(crop_padding=2),
    AugmentConfig(flip=True),
    AugmentConfig(brightness=0.3),
    AugmentConfig(mixup=0.4),
    AugmentConfig(cutmix=1.0),
    ALL,
]


def test_pixels_are_scaled_and_normalised_per_channel():
    batch = make_batch()
    config = DataConfig(mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))
    wanted = (batch["image"] / 255 - np.array(config.mean)) / np.array(config.std)
    np.testing.assert_allclose(prepare(batch, config=config)["image"], wanted, atol=1e-6)


@pytest.mark.parametrize("augment", EACH)
def test_evaluation_changes_nothing_and_training_does(augment):
    batch = make_batch()
    still, moved = prepare(batch, augment, train=False), prepare(batch, augment)
    np.testing.assert_allclose(still["image"], batch["image"] / 255, atol=1e-6)
    assert "label_probs" not in still
    assert not np.allclose(moved["image"], still["image"])
    assert moved["image"].shape == still["image"].shape
    assert (np.asarray(moved["label"]) == batch["label"]).all()
    assert np.asarray(moved["image"]).min() >= 0
    assert np.asarray(moved["image"]).max() <= 1 + 1e-6


@pytest.mark.parametrize("augment", [ALL, AugmentConfig(flip=True)])
def test_a_sharded_batch_gives_the_same_values(augment):
    batch = make_batch()
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    one, many = prepare(batch, augment), prepare(sharded, augment)
    for name in one:
        np.testing.assert_allclose(one[name], many[name], atol=1e-6)


def test_features_pass_unchanged():
    batch = {"features": np.ones((4, 3), np.float32), "label": np.zeros(4, np.int32), "mask": np.ones(4, np.float32)}
    assert (prepare(batch, ALL)["features"] == batch["features"]).all()


def test_a_crop_is_a_shift_with_black_edges():
    batch = make_batch(num=64, side=5)
    padded = np.pad(batch["image"] / 255, ((0, 0), (2, 2), (2, 2), (0, 0)))
    for image, source in zip(np.asarray(prepare(batch, AugmentConfig(crop_padding=2))["image"]), padded, strict=True):
        windows = [source[top : top + 5, left : left + 5] for top in range(5) for left in range(5)]
        assert any(np.allclose(image, window, atol=1e-6) for window in windows)


def test_about_half_are_mirrored():
    batch = make_batch(num=200)
    image = np.asarray(prepare(batch, AugmentConfig(flip=True))["image"])
    mirrored = np.isclose(image, batch["image"][:, :, ::-1] / 255, atol=1e-6).all((1, 2, 3))
    kept = np.isclose(image, batch["image"] / 255, atol=1e-6).all((1, 2, 3))
    assert (mirrored | kept).all()
    assert 60 < mirrored.sum() < 140  # 5.6 standard deviations of 200 tosses


@pytest.mark.parametrize("augment", [AugmentConfig(mixup=0.4), AugmentConfig(cutmix=1.0), ALL])
def test_mixed_labels_are_probabilities_of_the_two_sources(augment):
    batch = make_batch()
    probs = np.asarray(prepare(batch, augment)["label_probs"])
    np.testing.assert_allclose(probs.sum(1), 1, atol=1e-6)
    assert (probs >= 0).all()
    allowed = np.eye(4)[batch["label"]] + np.eye(4)[np.roll(batch["label"], 1)]
    assert (probs[allowed == 0] == 0).all()


def test_mixup_weighs_pixels_as_labels():
    batch = make_batch()
    batch["label"] = (np.arange(16) % 2).astype(np.int32)  # each neighbour has the other label
    prepared = prepare(batch, AugmentConfig(mixup=0.4))
    own = np.asarray(prepared["label_probs"])[np.arange(16), batch["label"]][:, None, None, None]
    image = batch["image"] / 255
    wanted = own * image + (1 - own) * np.roll(image, 1, axis=0)
    np.testing.assert_allclose(prepared["image"], wanted, atol=1e-6)


def test_cutmix_weighs_labels_by_the_pixels_that_stayed():
    batch = make_batch()
    batch["label"] = (np.arange(16) % 2).astype(np.int32)
    batch["image"] = np.broadcast_to(batch["label"][:, None, None, None] * 255, (16, 6, 6, 3)).astype(np.uint8)
    prepared = prepare(batch, AugmentConfig(cutmix=1.0))
    np.testing.assert_allclose(np.asarray(prepared["image"]).mean((1, 2, 3)), prepared["label_probs"][:, 1], atol=1e-6)
    assert set(np.unique(prepared["image"])) == {0.0, 1.0}


@pytest.mark.parametrize("augment", [AugmentConfig(mixup=0.4), AugmentConfig(cutmix=1.0), ALL])
def test_padded_rows_are_never_mixed_into_real_ones(augment):
    batch = make_batch(padded=5)
    other = {**batch, "image": batch["image"].copy(), "label": batch["label"].copy()}
    other["image"][-5:] = 255 - other["image"][-5:]
    other["label"][-5:] = (other["label"][-5:] + 1) % 4
    first, second = prepare(batch, augment), prepare(other, augment)
    for name in ("image", "label_probs"):
        assert (first[name][:-5] == second[name][:-5]).all()


def test_wrong_number_of_means_is_refused():
    with pytest.raises(InputError, match=r"data.mean has 2 values for images of 3 channels"):
        prepare(make_batch(), config=DataConfig(mean=(0.1, 0.2)))


def test_brightness_one_keeps_pixels_in_range():
    image = prepare(make_batch(), AugmentConfig(brightness=1.0))["image"]
    assert bool(jnp.isfinite(image).all())
    assert float(image.min()) >= 0
    assert float(image.max()) <= 1
