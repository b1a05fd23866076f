"""Residual networks with 18, 34, 50 and 101 layers (He et al. 2015, arXiv:1512.03385, table 1).

As in torchvision's version 1.5 the stride of a bottleneck is in its 3×3 convolution; the paper has it in the first 1×1.
"""

import dataclasses
from typing import Any, Literal

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jxfer.models import blocks
from jxfer.models.stages import run_stages

EXPANSION = 4
"""Channels that leave a bottleneck per channel of its 3×3 convolution."""


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """One size of the network."""

    num_blocks: tuple[int, int, int, int]
    """Blocks in `layer1` to `layer4`."""
    block: Literal["basic", "bottleneck"] = "basic"
    small_images: bool = False
    """A 3×3 stem that keeps the size, for images of 32×32, instead of 7×7 and a maximum that quarter it."""
    widths: tuple[int, int, int, int] = (64, 128, 256, 512)
    """Channels of the 3×3 convolutions in `layer1` to `layer4`; the stem has those of the first."""

    @property
    def expansion(self) -> int:
        """Channels that leave a layer per channel of its 3×3 convolutions."""
        return EXPANSION if self.block == "bottleneck" else 1

    @property
    def total_stride(self) -> int:
        """Pixels of the image per pixel of the last feature map: also the smallest side of an image."""
        return 8 if self.small_images else 32


CONFIGS = {
    "resnet18": ResNetConfig((2, 2, 2, 2)),
    "resnet34": ResNetConfig((3, 4, 6, 3)),
    "resnet50": ResNetConfig((3, 4, 6, 3), block="bottleneck"),
    "resnet101": ResNetConfig((3, 4, 23, 3), block="bottleneck"),
    "resnet18_32": ResNetConfig((2, 2, 2, 2), small_images=True),
    "resnet34_32": ResNetConfig((3, 4, 6, 3), small_images=True),
    "resnet50_32": ResNetConfig((3, 4, 6, 3), block="bottleneck", small_images=True),
}


class ResNet(nnx.Module):
    """A stem and four layers of residual blocks; all layers but the first begin by halving the image."""

    def __init__(
        self, config: ResNetConfig, *, input_shape: tuple[int, ...], num_classes: int, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        block = Bottleneck if config.block == "bottleneck" else blocks.BasicBlock
        stem = blocks.ConvLayer if config.small_images else ImageNetStem
        narrow = config.widths[0]
        first, second, third, fourth = (width * config.expansion for width in config.widths)
        count1, count2, count3, count4 = config.num_blocks
        self.stages = ("stem", "layer1", "layer2", "layer3", "layer4", "pool", "head")
        self.stem = stem(input_shape[-1], narrow, dtype=dtype, rngs=rngs)
        self.layer1 = nnx.List(_layer(block, narrow, first, count1, stride=1, dtype=dtype, rngs=rngs))
        self.layer2 = nnx.List(_layer(block, first, second, count2, stride=2, dtype=dtype, rngs=rngs))
        self.layer3 = nnx.List(_layer(block, second, third, count3, stride=2, dtype=dtype, rngs=rngs))
        self.layer4 = nnx.List(_layer(block, third, fourth, count4, stride=2, dtype=dtype, rngs=rngs))
        self.pool = blocks.GlobalPool()
        self.head = blocks.linear_head(fourth, num_classes, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B K"]:
        """Maps images to float32 logits."""
        return run_stages(self, x)

    def features(self, x: Float[Array, "B H W C"]) -> Float[Array, "B D"]:
        """Maps images to what the head sees."""
        return run_stages(self, x, stop="head")


class ImageNetStem(nnx.Module):
    """7×7 convolution of stride 2, batch norm, ReLU, 3×3 maximum of stride 2."""

    def __init__(self, in_features: int, out_features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = blocks.conv(in_features, out_features, 7, stride=2, dtype=dtype, rngs=rngs)
        self.bn = blocks.batch_norm(out_features, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        """Quarters the sides of the image, rounding up."""
        x = nnx.relu(self.bn(self.conv(x)))
        return nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


class Bottleneck(nnx.Module):
    """1×1, 3×3 and 1×1 convolutions around a shortcut (figure 5 right)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        stride: int = 1,
        downsample: nnx.Module | None = None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        """`downsample` is what the shortcut does to its input; None where the block changes no shape."""
        width = out_features // EXPANSION
        self.conv1 = blocks.conv(in_features, width, 1, dtype=dtype, rngs=rngs)
        self.bn1 = blocks.batch_norm(width, dtype=dtype, rngs=rngs)
        self.conv2 = blocks.conv(width, width, 3, stride=stride, dtype=dtype, rngs=rngs)
        self.bn2 = blocks.batch_norm(width, dtype=dtype, rngs=rngs)
        self.conv3 = blocks.conv(width, out_features, 1, dtype=dtype, rngs=rngs)
        self.bn3 = blocks.batch_norm(out_features, dtype=dtype, rngs=rngs)
        self.downsample = downsample

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        """Divides the sides of the image by the stride, rounding up."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = nnx.relu(self.bn1(self.conv1(x)))
        x = nnx.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        return nnx.relu(x + shortcut)


class Projection(nnx.Module):
    """The shortcut where a block changes the shape, the paper's option B: 1×1 convolution and batch norm."""

    def __init__(self, in_features: int, out_features: int, *, stride: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = blocks.conv(in_features, out_features, 1, stride=stride, dtype=dtype, rngs=rngs)
        self.bn = blocks.batch_norm(out_features, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        """Divides the sides of the image by the stride, rounding up."""
        return self.bn(self.conv(x))


def _layer(
    block: Any, in_features: int, out_features: int, num_blocks: int, *, stride: int, dtype: DTypeLike, rngs: nnx.Rngs
) -> list[nnx.Module]:
    shortcut = None
    if stride > 1 or in_features != out_features:
        shortcut = Projection(in_features, out_features, stride=stride, dtype=dtype, rngs=rngs)
    first = block(in_features, out_features, stride=stride, downsample=shortcut, dtype=dtype, rngs=rngs)
    rest = [block(out_features, out_features, dtype=dtype, rngs=rngs) for _ in range(num_blocks - 1)]
    return [first, *rest]
