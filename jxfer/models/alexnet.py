"""AlexNet as PyTorch publishes it: the one-column network of Krizhevsky 2014 (arXiv:1404.5997), without its norms."""

import dataclasses
from typing import ClassVar

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jxfer.models import blocks
from jxfer.models.stages import run_stages

POOLED_SIDE = 6
"""Pixels along each side of the feature map that the fully connected layers see, whatever the image."""


@dataclasses.dataclass(frozen=True)
class AlexNetConfig:
    """One size of the network."""

    reads: ClassVar[str] = "image"
    widths: tuple[int, int, int, int, int] = (64, 192, 384, 256, 256)
    """Channels of `conv1` to `conv5`."""
    hidden_dim: int = 4096
    """Features of each of the two hidden layers."""
    dropout: float = 0.5
    """Share of the inputs that each hidden layer drops in training."""
    total_stride: int = 63
    """Pixels of the image that become a single one of the last feature map: also the smallest side of an image."""


CONFIGS = {"alexnet": AlexNetConfig()}


class AlexNet(nnx.Module):
    """Five convolutions, three of them with a maximum behind, an average of 6×6 windows, and two hidden layers."""

    def __init__(
        self, config: AlexNetConfig, *, input_shape: tuple[int, ...], num_classes: int, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        first, second, third, fourth, fifth = config.widths
        hidden, rate = config.hidden_dim, config.dropout
        self.stages = ("conv1", "conv2", "conv3", "conv4", "conv5", "pool", "hidden1", "hidden2", "head")
        self.conv1 = PooledConv(input_shape[-1], first, 11, stride=4, padding=2, pooled=True, dtype=dtype, rngs=rngs)
        self.conv2 = PooledConv(first, second, 5, padding=2, pooled=True, dtype=dtype, rngs=rngs)
        self.conv3 = PooledConv(second, third, 3, padding=1, pooled=False, dtype=dtype, rngs=rngs)
        self.conv4 = PooledConv(third, fourth, 3, padding=1, pooled=False, dtype=dtype, rngs=rngs)
        self.conv5 = PooledConv(fourth, fifth, 3, padding=1, pooled=True, dtype=dtype, rngs=rngs)
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


class PooledConv(nnx.Module):
    """Convolution with bias, ReLU and, if `pooled`, the maximum of 3×3 windows two pixels apart."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        size: int,
        *,
        stride: int = 1,
        padding: int,
        pooled: bool,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.conv = blocks.conv(
            in_features, out_features, size, stride=stride, padding=padding, use_bias=True, dtype=dtype, rngs=rngs
        )
        self.pool = blocks.MaxPool(3, 2) if pooled else None

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        """Shrinks the image by the stride of the convolution, and by two more if pooled, rounding down."""
        x = nnx.relu(self.conv(x))
        return x if self.pool is None else self.pool(x)


class HiddenLayer(nnx.Module):
    """Dropout of the input, linear, ReLU: the dropout comes first, so that a frozen layer gives the head all of it."""

    def __init__(self, in_features: int, out_features: int, *, dropout: float, dtype: DTypeLike, rngs: nnx.Rngs):
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout else None
        self.linear = nnx.Linear(in_features, out_features, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B E"]:
        """Maps one vector of features to another."""
        x = x if self.dropout is None else self.dropout(x)
        return nnx.relu(self.linear(x))
