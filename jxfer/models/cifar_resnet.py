"""Residual networks for 32×32 images, 6n + 2 layers deep (He et al. 2015, arXiv:1512.03385, section 4.2)."""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jxfer.models import blocks
from jxfer.models.stages import run_stages


@dataclasses.dataclass(frozen=True)
class CifarResNetConfig:
    """One size of the network."""

    num_blocks: int
    """The paper's n: blocks in each of the three layers."""
    widths: tuple[int, int, int] = (16, 32, 64)
    """Channels of the three layers; the stem has those of the first."""
    total_stride: int = 4
    """Pixels of the image per pixel of the last feature map: also the smallest side of an image."""


CONFIGS = {
    "resnet20": CifarResNetConfig(num_blocks=3),
    "resnet32": CifarResNetConfig(num_blocks=5),
    "resnet44": CifarResNetConfig(num_blocks=7),
    "resnet56": CifarResNetConfig(num_blocks=9),
}


class CifarResNet(nnx.Module):
    """A 3×3 stem and three layers of basic blocks; `layer2` and `layer3` begin by halving the image."""

    def __init__(
        self,
        config: CifarResNetConfig,
        *,
        input_shape: tuple[int, ...],
        num_classes: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        first, second, third = config.widths
        count = config.num_blocks
        self.stages = ("stem", "layer1", "layer2", "layer3", "pool", "head")
        self.stem = blocks.ConvLayer(input_shape[-1], first, dtype=dtype, rngs=rngs)
        self.layer1 = nnx.List(_layer(first, first, count, stride=1, dtype=dtype, rngs=rngs))
        self.layer2 = nnx.List(_layer(first, second, count, stride=2, dtype=dtype, rngs=rngs))
        self.layer3 = nnx.List(_layer(second, third, count, stride=2, dtype=dtype, rngs=rngs))
        self.pool = blocks.GlobalPool()
        self.head = blocks.linear_head(third, num_classes, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B K"]:
        """Maps images to float32 logits."""
        return run_stages(self, x)

    def features(self, x: Float[Array, "B H W C"]) -> Float[Array, "B D"]:
        """Maps images to what the head sees."""
        return run_stages(self, x, stop="head")


class PaddedShortcut(nnx.Module):
    """The paper's option A, free of parameters: every second pixel, with zeros for the channels that are new."""

    def __init__(self, in_features: int, out_features: int):
        # The paper leaves open where the zeros go. Half on each side, so that published weights keep their meaning.
        before = (out_features - in_features) // 2
        self.padding = (before, out_features - in_features - before)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        """Halves the sides of the image, rounding up."""
        return jnp.pad(x[:, ::2, ::2, :], ((0, 0), (0, 0), (0, 0), self.padding))


def _layer(
    in_features: int, out_features: int, num_blocks: int, *, stride: int, dtype: DTypeLike, rngs: nnx.Rngs
) -> list[nnx.Module]:
    shortcut = PaddedShortcut(in_features, out_features) if stride > 1 else None
    first = blocks.BasicBlock(in_features, out_features, stride=stride, downsample=shortcut, dtype=dtype, rngs=rngs)
    rest = [blocks.BasicBlock(out_features, out_features, dtype=dtype, rngs=rngs) for _ in range(num_blocks - 1)]
    return [first, *rest]
