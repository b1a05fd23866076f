"""A small plain ConvNet for small images, from 8×8 up: a training step takes milliseconds on a CPU."""

import dataclasses

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
    """Three stages of 3×3 convolution, batch norm and ReLU; the last two then halve the image by a maximum."""

    def __init__(self, config: ConvNetConfig, *, in_channels: int, num_classes: int, dtype: DTypeLike, rngs: nnx.Rngs):
        narrow, middle, wide = config.widths
        self.stages = ("stem", "layer1", "layer2", "pool", "head")
        self.stem = ConvLayer(in_channels, narrow, dtype=dtype, rngs=rngs)
        self.layer1 = Downsampling(narrow, middle, dropout=config.dropout, dtype=dtype, rngs=rngs)
        self.layer2 = Downsampling(middle, wide, dropout=config.dropout, dtype=dtype, rngs=rngs)
        self.pool = blocks.GlobalPool()
        self.head = blocks.linear_head(wide, num_classes, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B K"]:
        """Maps images to float32 logits."""
        return run_stages(self, x)

    def features(self, x: Float[Array, "B H W C"]) -> Float[Array, "B D"]:
        """Maps images to what the head sees."""
        return run_stages(self, x, stop="head")


class ConvLayer(nnx.Module):
    """3×3 convolution, batch norm, ReLU."""

    def __init__(self, in_features: int, out_features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = blocks.conv(in_features, out_features, 3, dtype=dtype, rngs=rngs)
        self.bn = blocks.batch_norm(out_features, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        """Keeps the size of the image."""
        return nnx.relu(self.bn(self.conv(x)))


class Downsampling(nnx.Module):
    """3×3 convolution, batch norm, ReLU, 2×2 maximum, and dropout of whole channels where asked for."""

    def __init__(self, in_features: int, out_features: int, *, dropout: float, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = blocks.conv(in_features, out_features, 3, dtype=dtype, rngs=rngs)
        self.bn = blocks.batch_norm(out_features, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, broadcast_dims=(1, 2), rngs=rngs) if dropout else None

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        """Halves the sides of the image, rounding down."""
        x = blocks.max_pool(nnx.relu(self.bn(self.conv(x))), 2)
        return x if self.dropout is None else self.dropout(x)
