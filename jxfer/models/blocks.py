"""The parts that convolutional architectures share, with PyTorch's padding and the papers' initialisation."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

# Kaiming normal over the fan-out (He et al. 2015, arXiv:1502.01852, section 2.2).
_HE_FAN_OUT = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


def conv(
    in_features: int, out_features: int, size: int, *, stride: int = 1, dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.Conv:
    """Returns a square convolution without bias.

    It pads both sides alike, as PyTorch does; at stride 2 `SAME` would pad more at the end and shift the image.
    """
    return nnx.Conv(
        in_features,
        out_features,
        (size, size),
        strides=stride,
        padding=size // 2,
        use_bias=False,
        kernel_init=_HE_FAN_OUT,
        dtype=dtype,
        rngs=rngs,
    )


def batch_norm(num_features: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.BatchNorm:
    """Returns a batch normalisation with PyTorch's constants; its momentum 0.1 is the complement of ours.

    The running variance is that of the batch, where PyTorch stores the unbiased estimate, n / (n - 1) times it.
    """
    return nnx.BatchNorm(num_features, momentum=0.9, epsilon=1e-5, dtype=dtype, rngs=rngs)


class ConvLayer(nnx.Module):
    """3×3 convolution, batch norm, ReLU."""

    def __init__(self, in_features: int, out_features: int, *, stride: int = 1, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = conv(in_features, out_features, 3, stride=stride, dtype=dtype, rngs=rngs)
        self.bn = batch_norm(out_features, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        """Divides the sides of the image by the stride, rounding up."""
        return nnx.relu(self.bn(self.conv(x)))


class GlobalPool(nnx.Module):
    """Averages over all pixels."""

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B C"]:
        """Maps activations of any size to one vector each."""
        return jnp.mean(x, axis=(1, 2))


class BasicBlock(nnx.Module):
    """Two 3×3 convolutions around a shortcut (He et al. 2015, arXiv:1512.03385, figure 5 left)."""

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
        self.conv1 = conv(in_features, out_features, 3, stride=stride, dtype=dtype, rngs=rngs)
        self.bn1 = batch_norm(out_features, dtype=dtype, rngs=rngs)
        self.conv2 = conv(out_features, out_features, 3, dtype=dtype, rngs=rngs)
        self.bn2 = batch_norm(out_features, dtype=dtype, rngs=rngs)
        self.downsample = downsample

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        """Divides the sides of the image by the stride, rounding up."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = nnx.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        return nnx.relu(x + shortcut)


def linear_head(in_features: int, num_classes: int, *, rngs: nnx.Rngs) -> nnx.Linear:
    """Returns the last stage; it computes in float32 whatever the other stages do, so logits are float32."""
    return nnx.Linear(in_features, num_classes, dtype=jnp.float32, rngs=rngs)
