"""A small plain ConvNet for small images, from 8×8 up: a training step takes milliseconds on a CPU."""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jxfer.models import blocks
from jxfer.models.stages import run_stages


@dataclasses.dataclass(frozen=True)
class ConvNetConfig:
    """One size of the network."""

    widths: tuple[int, int, int] = (32, 64, 128)
    """Channels of the stem, of `layer1` and of `layer2`."""
    dropout: float = 0.0
    """Share of whole channels dropped at the end of `layer1` and `layer2` in training."""
    total_stride: int = 4
    """Pixels of the image per pixel of the last feature map: also the smallest side of an image."""


CONFIGS = {"convnet": ConvNetConfig(), "convnet_dropout": ConvNetConfig(dropout=0.2)}


class ConvNet(nnx.Module):
    """Three layers, each one convolution; the stem halves the image at once, so that the wide layers are cheap."""

    def __init__(
        self, config: ConvNetConfig, *, input_shape: tuple[int, ...], num_classes: int, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        narrow, middle, wide = config.widths
        rate = config.dropout
        self.stages = ("stem", "layer1", "layer2", "pool", "head")
        self.stem = PooledLayer(input_shape[-1], narrow, window=2, dropout=0.0, dtype=dtype, rngs=rngs)
        self.layer1 = PooledLayer(narrow, middle, window=1, dropout=rate, dtype=dtype, rngs=rngs)
        self.layer2 = PooledLayer(middle, wide, window=2, dropout=rate, dtype=dtype, rngs=rngs)
        self.pool = blocks.GlobalPool()
        self.head = blocks.linear_head(wide, num_classes, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B K"]:
        """Maps images to float32 logits."""
        return run_stages(self, x)

    def features(self, x: Float[Array, "B H W C"]) -> Float[Array, "B D"]:
        """Maps images to what the head sees."""
        return run_stages(self, x, stop="head")


class PooledLayer(nnx.Module):
    """3×3 convolution, batch norm, ReLU, the maximum of each window, and dropout of whole channels if any."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        window: int,
        dropout: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        """`window` is the side of the windows in pixels; 1 keeps every pixel."""
        self.conv = blocks.conv(in_features, out_features, 3, dtype=dtype, rngs=rngs)
        self.bn = blocks.batch_norm(out_features, dtype=dtype, rngs=rngs)
        self.window = window
        self.dropout = nnx.Dropout(dropout, broadcast_dims=(1, 2), rngs=rngs) if dropout else None

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        """Divides the sides of the image by the window, rounding down."""
        x = _window_max(nnx.relu(self.bn(self.conv(x))), self.window)
        return x if self.dropout is None else self.dropout(x)


def _window_max(x: Float[Array, "B H W C"], window: int) -> Float[Array, "B h w C"]:
    """Returns the maximum of windows side by side: by a reshape, whose gradient XLA runs faster than a pooling's."""
    count, rows, columns, channels = x.shape
    rows, columns = rows // window, columns // window
    x = x[:, : rows * window, : columns * window]
    return jnp.max(x.reshape(count, rows, window, columns, window, channels), axis=(2, 4))
