"""ConvNeXt, a convolutional network built like a transformer (Liu et al. 2022, arXiv:2201.03545)."""

import dataclasses
from typing import ClassVar

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jxfer.models import attention, blocks
from jxfer.models.stages import run_stages

NORM_EPS = 1e-6
"""Added to the variance by the norms of stem, blocks and downsampling, wherever it is published."""


@dataclasses.dataclass(frozen=True)
class ConvNeXtConfig:
    """One size of the network."""

    reads: ClassVar[str] = "image"
    total_stride: ClassVar[int] = 32

    num_blocks: tuple[int, int, int, int]
    """Blocks in `layer1` to `layer4`."""
    widths: tuple[int, int, int, int] = (96, 192, 384, 768)
    """Channels of `layer1` to `layer4`."""
    layer_scale: float = 1e-6
    """What the factors per channel of each residual branch start from."""
    drop_path: float = 0.0
    """Probability of dropping the last block's residual branch in training, for a whole image; it rises to this from 0
    in the first block (Huang et al. 2016, arXiv:1603.09382). The paper trains with 0.1, 0.4 and 0.5."""
    head_norm_eps: float = 1e-6
    """Added to the variance by the norm before the head; 1e-12 in transformers' networks."""


CONFIGS = {
    "convnext_tiny": ConvNeXtConfig((3, 3, 9, 3)),
    "convnext_small": ConvNeXtConfig((3, 3, 27, 3)),
    "convnext_base": ConvNeXtConfig((3, 3, 27, 3), widths=(128, 256, 512, 1024)),
}


class ConvNeXt(nnx.Module):
    """A stem and four layers of blocks; all layers but the first begin by halving the image."""

    def __init__(
        self,
        config: ConvNeXtConfig,
        *,
        input_shape: tuple[int, ...],
        num_classes: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        """Of the input's shape only the channels matter."""
        layers = _layers(config, dtype, rngs)
        self.stages = ("stem", "layer1", "layer2", "layer3", "layer4", "pool", "norm", "head")
        self.stem = Stem(input_shape[2], config.widths[0], dtype=dtype, rngs=rngs)
        self.layer1, self.layer2, self.layer3, self.layer4 = (nnx.List(layer) for layer in layers)
        self.pool = blocks.GlobalPool()
        self.norm = attention.layer_norm(config.widths[-1], config.head_norm_eps, dtype=dtype, rngs=rngs)
        self.head = blocks.linear_head(config.widths[-1], num_classes, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B K"]:
        """Maps images to float32 logits."""
        return run_stages(self, x)

    def features(self, x: Float[Array, "B H W C"]) -> Float[Array, "B D"]:
        """Maps images to what the head sees."""
        return run_stages(self, x, stop="head")


class Stem(nnx.Module):
    """4×4 convolution of stride 4 and a norm."""

    def __init__(self, in_features: int, out_features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = _conv(in_features, out_features, 4, stride=4, dtype=dtype, rngs=rngs)
        self.norm = attention.layer_norm(out_features, NORM_EPS, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        """Quarters the sides of the image, rounding down."""
        return self.norm(self.conv(x))


class Downsample(nnx.Module):
    """A norm and a 2×2 convolution of stride 2."""

    def __init__(self, in_features: int, out_features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm = attention.layer_norm(in_features, NORM_EPS, dtype=dtype, rngs=rngs)
        self.conv = _conv(in_features, out_features, 2, stride=2, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        """Halves the sides of the image, rounding down."""
        return self.conv(self.norm(x))


class Block(nnx.Module):
    """Depthwise 7×7 convolution, norm and two linear layers inside a shortcut, behind a `downsample` if it has one."""

    def __init__(
        self,
        num_features: int,
        *,
        layer_scale: float,
        drop_rate: float,
        downsample: nnx.Module | None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        """`drop_rate` is the probability of dropping the whole branch for an image."""
        self.downsample = downsample
        self.conv = _conv(num_features, num_features, 7, padding=3, groups=num_features, dtype=dtype, rngs=rngs)
        self.norm = attention.layer_norm(num_features, NORM_EPS, dtype=dtype, rngs=rngs)
        self.mlp = attention.Mlp(num_features, 4 * num_features, dtype=dtype, rngs=rngs)
        self.scale = attention.LayerScale(num_features, layer_scale)
        self.drop_path = attention.dropout(drop_rate, per_example=(1, 2, 3), rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        """Keeps the shape, or halves the sides of the image first."""
        x = x if self.downsample is None else self.downsample(x)
        return x + self.drop_path(self.scale(self.mlp(self.norm(self.conv(x)))))


def _layers(config: ConvNeXtConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> list[list[nnx.Module]]:
    total = sum(config.num_blocks)
    rates = iter([config.drop_path * index / max(1, total - 1) for index in range(total)])
    layers: list[list[nnx.Module]] = []
    for number, (width, count) in enumerate(zip(config.widths, config.num_blocks, strict=True)):
        layers.append([])
        for index in range(count):
            halves = number > 0 and index == 0
            before = Downsample(config.widths[number - 1], width, dtype=dtype, rngs=rngs) if halves else None
            block = Block(
                width,
                layer_scale=config.layer_scale,
                drop_rate=next(rates),
                downsample=before,
                dtype=dtype,
                rngs=rngs,
            )
            layers[-1].append(block)
    return layers


def _conv(
    in_features: int,
    out_features: int,
    size: int,
    *,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    return nnx.Conv(
        in_features,
        out_features,
        (size, size),
        strides=stride,
        padding=padding,
        feature_group_count=groups,
        kernel_init=attention.KERNEL_INIT,
        dtype=dtype,
        rngs=rngs,
    )
