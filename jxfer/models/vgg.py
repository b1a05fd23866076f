"""Plain deep networks of 3×3 convolutions, some with batch norm (Simonyan and Zisserman 2014, arXiv:1409.1556)."""

import dataclasses
from typing import ClassVar

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jxfer.models import blocks
from jxfer.models.stages import run_stages

POOLED_SIDE = 7
"""Pixels along each side of the feature map that the fully connected layers see, whatever the image."""


@dataclasses.dataclass(frozen=True)
class VGGConfig:
    """One size of the network: a column of the paper's table 1."""

    reads: ClassVar[str] = "image"
    num_convs: tuple[int, int, int, int, int]
    """Convolutions in `layer1` to `layer5`."""
    batch_norm: bool = False
    """Whether each convolution is followed by a batch norm (Ioffe and Szegedy 2015, arXiv:1502.03167)."""
    widths: tuple[int, int, int, int, int] = (64, 128, 256, 512, 512)
    """Channels of `layer1` to `layer5`."""
    hidden_dim: int = 4096
    """Features of each of the two hidden layers."""
    dropout: float = 0.5
    """Share of each hidden layer's features dropped in training."""
    total_stride: int = 32
    """Pixels of the image per pixel of the last feature map: also the smallest side of an image."""


CONFIGS = {
    "vgg11": VGGConfig((1, 1, 2, 2, 2)),
    "vgg11_bn": VGGConfig((1, 1, 2, 2, 2), batch_norm=True),
    "vgg16": VGGConfig((2, 2, 3, 3, 3)),
    "vgg16_bn": VGGConfig((2, 2, 3, 3, 3), batch_norm=True),
}


class VGG(nnx.Module):
    """Five layers of convolutions, each of which ends by halving the image, and two hidden layers."""

    def __init__(
        self, config: VGGConfig, *, input_shape: tuple[int, ...], num_classes: int, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        first, second, third, fourth, fifth = config.widths
        hidden, rate = config.hidden_dim, config.dropout
        self.stages = ("layer1", "layer2", "layer3", "layer4", "layer5", "pool", "hidden1", "hidden2", "head")
        self.layer1 = nnx.List(_layer(input_shape[-1], first, config, 0, dtype=dtype, rngs=rngs))
        self.layer2 = nnx.List(_layer(first, second, config, 1, dtype=dtype, rngs=rngs))
        self.layer3 = nnx.List(_layer(second, third, config, 2, dtype=dtype, rngs=rngs))
        self.layer4 = nnx.List(_layer(third, fourth, config, 3, dtype=dtype, rngs=rngs))
        self.layer5 = nnx.List(_layer(fourth, fifth, config, 4, dtype=dtype, rngs=rngs))
        self.pool = blocks.AdaptivePool(POOLED_SIDE)
        self.hidden1 = HiddenLayer(POOLED_SIDE**2 * fifth, hidden, dropout=rate, dtype=dtype, rngs=rngs)
        self.hidden2 = HiddenLayer(hidden, hidden, dropout=rate, dtype=dtype, rngs=rngs)
        self.head = blocks.linear_head(hidden, num_classes, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B K"]:
        """Maps images to float32 logits."""
        return run_stages(self, x)

    def features(self, x: Float[Array, "B H W C"]) -> Float[Array, "B D"]:
        """Maps images to what the head sees."""
        return run_stages(self, x, stop="head")


class VGGConv(nnx.Module):
    """3×3 convolution with bias, batch norm if the size has it, ReLU."""

    def __init__(self, in_features: int, out_features: int, *, batch_norm: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = blocks.conv(in_features, out_features, 3, use_bias=True, dtype=dtype, rngs=rngs)
        self.bn = blocks.batch_norm(out_features, dtype=dtype, rngs=rngs) if batch_norm else None

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        """Keeps the size of the image."""
        x = self.conv(x)
        return nnx.relu(x if self.bn is None else self.bn(x))


class HiddenLayer(nnx.Module):
    """Linear, ReLU, dropout."""

    def __init__(self, in_features: int, out_features: int, *, dropout: float, dtype: DTypeLike, rngs: nnx.Rngs):
        self.linear = nnx.Linear(in_features, out_features, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout else None

    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B E"]:
        """Maps one vector of features to another."""
        x = nnx.relu(self.linear(x))
        return x if self.dropout is None else self.dropout(x)


def _layer(
    in_features: int, out_features: int, config: VGGConfig, index: int, *, dtype: DTypeLike, rngs: nnx.Rngs
) -> list[nnx.Module]:
    inputs = [in_features] + [out_features] * (config.num_convs[index] - 1)
    convs = [VGGConv(width, out_features, batch_norm=config.batch_norm, dtype=dtype, rngs=rngs) for width in inputs]
    return [*convs, blocks.MaxPool(2, 2)]
