"""The parts that convolutional architectures share, with PyTorch's padding and the papers' initialisation."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

# Kaiming normal over the fan-out (He et al. 2015, arXiv:1502.01852, section 2.2).
_HE_FAN_OUT = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


def conv(
    in_features: int,
    out_features: int,
    size: int,
    *,
    stride: int = 1,
    padding: int | str | None = None,
    groups: int = 1,
    use_bias: bool = False,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """Returns a square convolution; `groups` of as many channels as there are make it depthwise.

    Where `padding` is None it keeps the size at stride 1 and pads both sides alike, as PyTorch does; at stride 2 `SAME`
    would pad more at the end and shift the image.
    """
    return nnx.Conv(
        in_features,
        out_features,
        (size, size),
        strides=stride,
        padding=size // 2 if padding is None else padding,
        feature_group_count=groups,
        use_bias=use_bias,
        kernel_init=_HE_FAN_OUT,
        dtype=dtype,
        rngs=rngs,
    )


def batch_norm(num_features: int, *, epsilon: float = 1e-5, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.BatchNorm:
    """Returns a batch normalisation with PyTorch's constants; its momentum 0.1 is the complement of ours.

    The running variance is that of the batch, where PyTorch stores the unbiased estimate, n / (n - 1) times it.
    """
    return nnx.BatchNorm(num_features, momentum=0.9, epsilon=epsilon, dtype=dtype, rngs=rngs)


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


class MaxPool(nnx.Module):
    """The maximum of windows of pixels; `round_up` lets the last window hang over the edge (PyTorch's `ceil_mode`)."""

    def __init__(self, size: int, stride: int, *, round_up: bool = False):
        self.size = size
        self.stride = stride
        self.round_up = round_up

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
        """Divides the sides of the image by the stride, less what the first window spans beyond it."""
        over = [-(side - self.size) % self.stride if self.round_up else 0 for side in x.shape[1:3]]
        window = (self.size, self.size)
        return nnx.max_pool(x, window, strides=(self.stride, self.stride), padding=tuple((0, end) for end in over))


class AdaptivePool(nnx.Module):
    """Averages images of any size into `side` × `side` pixels and flattens them to rows, columns, channels.

    Windows are PyTorch's: from floor(i n / side) to ceil((i + 1) n / side), so they overlap where n is no multiple.
    """

    def __init__(self, side: int):
        self.side = side

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B D"]:
        """Maps activations of any size to one vector of side² C each."""
        x = _averages(_averages(x, self.side, axis=1), self.side, axis=2)
        return x.reshape(x.shape[0], -1)  # [B side side C] -> [B side·side·C]


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


def _averages(x: Float[Array, "B H W C"], count: int, *, axis: int) -> Float[Array, "B h w C"]:
    """Returns `count` averages along an axis; static slices, so that nothing depends on the values."""
    side = x.shape[axis]
    windows = [(index * side // count, -(-(index + 1) * side // count)) for index in range(count)]
    means = [jnp.mean(jax.lax.slice_in_dim(x, *window, axis=axis), axis=axis) for window in windows]
    return jnp.stack(means, axis=axis)
