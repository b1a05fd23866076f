"""MobileNetV2: inverted residuals with depthwise convolutions (Sandler et al. 2018, arXiv:1801.04381)."""

import dataclasses
from typing import ClassVar

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jxfer.models import blocks
from jxfer.models.stages import run_stages

# Expansion, channels, blocks and first stride of `layer1` to `layer7`: the paper's table 2.
_LAYERS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
NUM_BLOCKS = tuple(count for _, _, count, _ in _LAYERS)
"""Blocks in `layer1` to `layer7`."""


@dataclasses.dataclass(frozen=True)
class MobileNetV2Config:
    """One size of the network."""

    reads: ClassVar[str] = "image"
    width: float = 1.0
    """Factor of all channels, which are then rounded to multiples of eight; below 1 the last 1280 stay."""
    dropout: float = 0.2
    """Share of the pooled features dropped in training."""
    epsilon: float = 1e-5
    """Added to the variance in batch norms: 1e-5 in torchvision's network, 1e-3 in Google's."""
    tf_padding: bool = False
    """Whether convolutions of stride 2 pad as TensorFlow's `SAME`, more at the end than at the start."""
    total_stride: int = 32
    """Pixels of the image per pixel of the last feature map: also the smallest side of an image."""

    def channels(self, count: int) -> int:
        """Returns a number of channels times the width, rounded to a multiple of eight but not down by over 10 %."""
        exact = count * self.width
        rounded = max(8, int(exact + 4) // 8 * 8)
        return rounded + 8 if rounded < 0.9 * exact else rounded

    @property
    def last_channels(self) -> int:
        """Channels of the last convolution."""
        return self.channels(1280) if self.width > 1 else 1280


CONFIGS = {"mobilenet_v2": MobileNetV2Config()}


class MobileNetV2(nnx.Module):
    """A stem, seven layers of inverted residuals and a 1×1 convolution; a convolution is always followed by a norm."""

    def __init__(
        self,
        config: MobileNetV2Config,
        *,
        input_shape: tuple[int, ...],
        num_classes: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        first = config.channels(32)
        widths = [first, *(config.channels(width) for _, width, _, _ in _LAYERS)]
        layers = [_layer(config, index, widths[index], dtype=dtype, rngs=rngs) for index in range(len(_LAYERS))]
        self.stages = ("stem", *(f"layer{number}" for number in range(1, len(layers) + 1)), "top", "head")
        self.stem = NormedConv(config, input_shape[-1], first, 3, stride=2, dtype=dtype, rngs=rngs)
        self.layer1, self.layer2, self.layer3, self.layer4, self.layer5, self.layer6, self.layer7 = layers
        self.top = Top(config, widths[-1], dtype=dtype, rngs=rngs)
        self.head = blocks.linear_head(config.last_channels, num_classes, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B K"]:
        """Maps images to float32 logits."""
        return run_stages(self, x)

    def features(self, x: Float[Array, "B H W C"]) -> Float[Array, "B D"]:
        """Maps images to what the head sees."""
        return run_stages(self, x, stop="head")


class NormedConv(nnx.Module):
    """Convolution, batch norm and, unless `linear`, ReLU cut off at 6."""

    def __init__(
        self,
        config: MobileNetV2Config,
        in_features: int,
        out_features: int,
        size: int,
        *,
        stride: int = 1,
        groups: int = 1,
        linear: bool = False,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        padding = "SAME" if config.tf_padding else None
        self.conv = blocks.conv(
            in_features, out_features, size, stride=stride, padding=padding, groups=groups, dtype=dtype, rngs=rngs
        )
        self.bn = blocks.batch_norm(out_features, epsilon=config.epsilon, dtype=dtype, rngs=rngs)
        self.linear = linear

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        """Divides the sides of the image by the stride, rounding up."""
        x = self.bn(self.conv(x))
        return x if self.linear else jax.nn.relu6(x)


class InvertedResidual(nnx.Module):
    """1×1 convolution to more channels, 3×3 on each channel alone, 1×1 to few channels (section 3.3, figure 3b)."""

    def __init__(
        self,
        config: MobileNetV2Config,
        in_features: int,
        out_features: int,
        *,
        expansion: int,
        stride: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        """Without expansion there is no first convolution; a shortcut where the block changes no shape."""
        wide = in_features * expansion
        self.expand = NormedConv(config, in_features, wide, 1, dtype=dtype, rngs=rngs) if expansion > 1 else None
        self.depthwise = NormedConv(config, wide, wide, 3, stride=stride, groups=wide, dtype=dtype, rngs=rngs)
        self.project = NormedConv(config, wide, out_features, 1, linear=True, dtype=dtype, rngs=rngs)
        self.shortcut = stride == 1 and in_features == out_features

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        """Divides the sides of the image by the stride, rounding up."""
        wide = x if self.expand is None else self.expand(x)
        y = self.project(self.depthwise(wide))
        return x + y if self.shortcut else y


class Top(nnx.Module):
    """1×1 convolution, the average over all pixels, dropout: one stage, so that a frozen one drops nothing out."""

    def __init__(self, config: MobileNetV2Config, in_features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.layer = NormedConv(config, in_features, config.last_channels, 1, dtype=dtype, rngs=rngs)
        self.pool = blocks.GlobalPool()
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs) if config.dropout else None

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B D"]:
        """Maps activations of any size to one vector each."""
        x = self.pool(self.layer(x))
        return x if self.dropout is None else self.dropout(x)


def _layer(
    config: MobileNetV2Config, index: int, in_features: int, *, dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.List[InvertedResidual]:
    expansion, width, count, stride = _LAYERS[index]
    out_features = config.channels(width)
    layer = []
    for number in range(count):
        inputs, step = (in_features, stride) if number == 0 else (out_features, 1)
        layer.append(
            InvertedResidual(config, inputs, out_features, expansion=expansion, stride=step, dtype=dtype, rngs=rngs)
        )
    return nnx.List(layer)
