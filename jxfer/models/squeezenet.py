"""SqueezeNet 1.1: AlexNet's accuracy with 1.2 million parameters (Iandola et al. 2016, arXiv:1602.07360).

The published top is a 1×1 convolution to the classes, a ReLU and then the average over the pixels. That ReLU makes it
no function of the averaged features, so no linear head equals it. Ours is a linear layer on the average of the last
fire module's 512 channels, like every other head here. Published weights are taken over without their top, and the
dropout that belonged to it is left out as well.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jxfer.models import blocks
from jxfer.models.stages import run_stages


@dataclasses.dataclass(frozen=True)
class SqueezeNetConfig:
    """One size of the network."""

    reads: ClassVar[str] = "image"
    stem_width: int = 64
    """Channels that leave the stem."""
    squeezed: tuple[int, ...] = (16, 16, 32, 32, 48, 48, 64, 64)
    """Channels between the two halves of each of the eight fire modules."""
    expanded: tuple[int, ...] = (64, 64, 128, 128, 192, 192, 256, 256)
    """Channels of each kernel size in the second half; twice as many leave the module."""
    total_stride: int = 17
    """Pixels of the image that become a single one of the last feature map: also the smallest side of an image."""


CONFIGS = {"squeezenet1_1": SqueezeNetConfig()}


class SqueezeNet(nnx.Module):
    """A stem and eight fire modules in three layers; the stem and the first two layers end with a maximum."""

    def __init__(
        self,
        config: SqueezeNetConfig,
        *,
        input_shape: tuple[int, ...],
        num_classes: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        inputs = (config.stem_width, *(2 * width for width in config.expanded[:-1]))
        sizes = zip(inputs, config.squeezed, config.expanded, strict=True)
        fires = [Fire(*size, dtype=dtype, rngs=rngs) for size in sizes]
        self.stages = ("stem", "layer1", "layer2", "layer3", "pool", "head")
        self.stem = SqueezeNetStem(input_shape[-1], config.stem_width, dtype=dtype, rngs=rngs)
        self.layer1 = nnx.List([*fires[:2], _halve()])
        self.layer2 = nnx.List([*fires[2:4], _halve()])
        self.layer3 = nnx.List(fires[4:])
        self.pool = blocks.GlobalPool()
        self.head = blocks.linear_head(2 * config.expanded[-1], num_classes, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B K"]:
        """Maps images to float32 logits."""
        return run_stages(self, x)

    def features(self, x: Float[Array, "B H W C"]) -> Float[Array, "B D"]:
        """Maps images to what the head sees."""
        return run_stages(self, x, stop="head")


class SqueezeNetStem(nnx.Module):
    """3×3 convolution of stride 2 without padding, ReLU, maximum."""

    def __init__(self, in_features: int, out_features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = blocks.conv(
            in_features, out_features, 3, stride=2, padding=0, use_bias=True, dtype=dtype, rngs=rngs
        )
        self.pool = _halve()

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        """Quarters the sides of the image, less the pixels at its edge."""
        return self.pool(nnx.relu(self.conv(x)))


class Fire(nnx.Module):
    """A 1×1 convolution to few channels, then 1×1 and 3×3 ones side by side (section 3.2)."""

    def __init__(self, in_features: int, squeezed: int, expanded: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.squeeze = blocks.conv(in_features, squeezed, 1, use_bias=True, dtype=dtype, rngs=rngs)
        self.expand1 = blocks.conv(squeezed, expanded, 1, use_bias=True, dtype=dtype, rngs=rngs)
        self.expand3 = blocks.conv(squeezed, expanded, 3, use_bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        """Keeps the size of the image."""
        x = nnx.relu(self.squeeze(x))
        return jnp.concatenate([nnx.relu(self.expand1(x)), nnx.relu(self.expand3(x))], axis=-1)


def _halve() -> blocks.MaxPool:
    """Returns the maximum between layers; Caffe, where the network comes from, lets windows hang over the edge."""
    return blocks.MaxPool(3, 2, round_up=True)
