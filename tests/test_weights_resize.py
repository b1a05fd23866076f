"""Weights for another resolution, patch size or number of channels, and the rule that asks for it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from jxfer.models.resnet import ResNet, ResNetConfig
from jxfer.models.vit import ViT, ViTConfig
from jxfer.typing import InputError
from jxfer.weights.load import load, weights_of
from jxfer.weights.names import namings_of, resizes_of
from jxfer.weights.names import vit as vit_names
from jxfer.weights.resize import InputChannels, PatchKernel, Positions, resample
from jxfer.weights.save import export_tensors
from jxfer.weights.tensors import in_memory

SIDES = st.integers(1, 7)


def array(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@given(SIDES, SIDES, st.booleans())
def test_what_is_the_same_everywhere_stays_so_at_any_size(old, new, antialias):
    np.testing.assert_allclose(resample(np.full((2, old), 3.0), new, axis=1, antialias=antialias), 3.0, rtol=1e-12)


@given(SIDES, SIDES, SIDES, SIDES, st.integers(0, 3))
def test_prefix_tokens_stay_and_patches_keep_their_rows_and_columns(rows, columns, new_rows, new_columns, prefix):
    tokens = array(prefix + rows * columns, 4)
    resize = Positions(prefix=prefix, grid=(rows, columns))
    resized = resize(tokens, (prefix + new_rows * new_columns, 4), grid=(new_rows, new_columns))
    np.testing.assert_array_equal(resized[:prefix], tokens[:prefix])
    assert resized.dtype == np.float32
    turned = Positions(prefix=prefix, grid=(columns, rows))
    image = tokens[prefix:].reshape(rows, columns, 4).transpose(1, 0, 2).reshape(-1, 4)
    other = turned(np.concatenate([tokens[:prefix], image]), resized.shape, grid=(new_columns, new_rows))
    expected = resized[prefix:].reshape(new_rows, new_columns, 4).transpose(1, 0, 2).reshape(-1, 4)
    np.testing.assert_allclose(other[prefix:], expected, rtol=1e-5, atol=1e-6)  # rounded once to float32
    if (rows, columns) == (new_rows, new_columns):
        np.testing.assert_allclose(resized, tokens, rtol=1e-6)


def test_a_grid_that_cannot_be_known_is_asked_for():
    with pytest.raises(InputError, match=r"6 patches are no square; give the grid of rows and columns"):
        Positions(prefix=1)(array(10, 4), (7, 4))
    with pytest.raises(InputError, match=r"8 position embeddings are not 1 and a grid of 2×3 patches"):
        Positions(prefix=1)(array(10, 4), (8, 4), grid=(2, 3))


@pytest.mark.parametrize(
    ("resize", "shape"),
    [(Positions(), (9, 5)), (InputChannels(), (3, 3, 1, 9)), (PatchKernel(), (2, 2, 3, 9)), (Positions(), (1, 9, 4))],
)
def test_what_no_resizing_can_change_is_refused(resize, shape):
    old = array(4, 4) if isinstance(resize, Positions) else array(3, 3, 3, 8)
    with pytest.raises(InputError, match=r"cannot be resized to .*; only grid, patch size and channels may differ"):
        resize(old, shape)


@given(st.sampled_from([1, 3, 4]), st.integers(1, 7))
def test_images_of_equal_channels_give_the_same_whatever_their_number(old, new):
    kernel = array(3, 3, old, 5)
    resized = InputChannels()(kernel, (3, 3, new, 5))
    if new % old == 0 or new == 1:
        np.testing.assert_allclose(resized.sum(2), kernel.sum(2), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(resized[:, :, 0] if new > 1 else resized.sum(2), _first(kernel, new), rtol=1e-5)


def _first(kernel: np.ndarray, new: int) -> np.ndarray:
    return kernel.sum(2) if new == 1 else kernel[:, :, 0] * kernel.shape[2] / new


@pytest.mark.parametrize(("old", "rows", "columns"), [(4, 8, 8), (2, 3, 5), (6, 11, 6)])
def test_a_resized_patch_gives_a_larger_kernel_what_it_gave_the_old(old, rows, columns):
    kernel, patch = array(old, old, 3, 5), array(old, old, 3)
    larger = np.asarray(jax.image.resize(patch, (rows, columns, 3), "bilinear", antialias=False))
    resized = PatchKernel()(kernel, (rows, columns, 3, 5))
    # Float32 sums of a hundred products, of which some cancel.
    np.testing.assert_allclose(
        np.einsum("rci,rcio->o", larger, resized), np.einsum("rci,rcio->o", patch, kernel), rtol=1e-4, atol=1e-4
    )


SMALL = ResNetConfig((1, 1, 1, 1), small_images=True, widths=(4, 4, 4, 4))


def resnet(channels: int) -> nnx.Module:
    return ResNet(SMALL, input_shape=(16, 16, channels), num_classes=3, dtype=jnp.float32, rngs=nnx.Rngs(0))


def published(size: Any) -> Any:
    return namings_of(size)[0]


@pytest.mark.parametrize("channels", [1, 6])
def test_a_resnet_reads_grey_and_many_channelled_images_as_it_read_coloured_ones(channels):
    old = resnet(3)
    tensors = in_memory(export_tensors(weights_of(old), published(SMALL), SMALL))
    settings = {"what": "ckpt", "resizes": resizes_of(SMALL)}
    build = lambda: resnet(channels)  # noqa: E731
    with pytest.raises(InputError, match=r"add the rule \('stem/conv/kernel', 'resize'\)"):
        load(build, tensors, namings_of(SMALL), SMALL, **settings)
    rules = [("stem/conv/kernel", "resize")]
    new, manifest = load(build, tensors, namings_of(SMALL), SMALL, rules=rules, **settings)
    assert manifest.paths("resized") == ("stem/conv/kernel",)
    grey = jax.random.normal(jax.random.key(0), (2, 16, 16, 1))
    old.eval()
    new.eval()
    expected = nnx.jit(lambda model, x: model(x))(old, jnp.repeat(grey, 3, -1))
    np.testing.assert_allclose(
        nnx.jit(lambda model, x: model(x))(new, jnp.repeat(grey, channels, -1)), expected, rtol=1e-4, atol=1e-5
    )


VIT = ViTConfig(8, 8, 2, 2, 16)


def vit(rows: int, columns: int, size: ViTConfig = VIT, channels: int = 3) -> ViT:
    shape = (rows, columns, channels)
    return ViT(size, input_shape=shape, num_classes=3, dtype=jnp.float32, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "size",
    [
        VIT,
        ViTConfig(8, 8, 1, 2, 16, distilled=True, pooling="cls_dist"),
        ViTConfig(8, 8, 1, 2, 16, class_token=False, pooling="mean"),
    ],
    ids=["class token", "distilled", "no token"],
)
def test_a_vit_is_loaded_for_images_of_another_shape(size):
    old = vit(32, 32, size)
    model = nnx.eval_shape(lambda: vit(48, 32, size))
    assert model.grid == (6, 4)
    naming = vit_names.NAMINGS[0]
    tensors = in_memory(export_tensors(weights_of(old), naming, size))
    new, manifest = load(
        lambda: vit(48, 32, size),
        tensors,
        (naming,),
        size,
        what="ckpt",
        rules=[("embed/position", "resize")],
        resizes=vit_names.RESIZES,
    )
    assert manifest.paths("resized") == ("embed/position",)
    prefix = size.num_prefix
    trained, resized = old.embed.position[...], new.embed.position[...]
    np.testing.assert_array_equal(resized[:prefix], trained[:prefix])
    expected = Positions(prefix, grid=(4, 4))(np.asarray(trained), resized.shape, grid=(6, 4))
    np.testing.assert_array_equal(resized, expected)


def test_patches_of_another_size_and_colour_come_from_the_same_kernel():
    old, size = vit(32, 32), ViTConfig(16, 8, 2, 2, 16)
    naming = vit_names.NAMINGS[0]
    tensors = in_memory(export_tensors(weights_of(old), naming, VIT))
    new, manifest = load(
        lambda: vit(64, 64, size, channels=1),
        tensors,
        (naming,),
        size,
        what="ckpt",
        rules=[("embed/patch/kernel", "resize")],
        resizes=vit_names.RESIZES,
    )
    assert manifest.paths("resized") == ("embed/patch/kernel",)
    grey = jax.random.normal(jax.random.key(0), (1, 32, 32, 1))
    patches = jnp.stack(jnp.split(jnp.stack(jnp.split(grey[0], 4, 0)), 4, 2), 1).reshape(16, 8, 8, 1)
    larger = jax.image.resize(patches, (16, 16, 16, 1), "bilinear", antialias=False)
    np.testing.assert_allclose(
        new.embed.patch(larger)[:, 0, 0], old.embed.patch(jnp.repeat(patches, 3, -1))[:, 0, 0], rtol=1e-4, atol=1e-5
    )
