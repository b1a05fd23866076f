"""Vision transformers (Dosovitskiy et al. 2020, arXiv:2010.11929), with what DeiT and DINOv2 changed in them.

DeiT: Touvron et al. 2020, arXiv:2012.12877. DINOv2: Oquab et al. 2023, arXiv:2304.07193; its registers: Darcet et al.
2023, arXiv:2309.16588.
"""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jxfer.models import attention, blocks
from jxfer.models.stages import run_stages
from jxfer.typing import InputError


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """One size of the network."""

    reads: ClassVar[str] = "image"

    patch_size: int
    """Side of a patch in pixels."""
    hidden_dim: int
    """Features of a token."""
    num_layers: int
    """Transformer blocks."""
    num_heads: int
    """Heads of attention in a block."""
    mlp_dim: int
    """Features between the two linear layers of a block."""
    norm_eps: float = 1e-6
    """Added to the variance by layer norms; 1e-12 in transformers' ViT and DeiT."""
    qkv_bias: bool = True
    """Whether queries, keys and values have a bias."""
    layer_scale: float | None = None
    """What the factors per feature of each residual branch start from; None where there are none. DINOv2 has them."""
    class_token: bool = True
    """Whether a learned token goes before the patches."""
    distilled: bool = False
    """Whether a second learned token follows the class token, trained with the labels of a teacher."""
    num_registers: int = 0
    """Further learned tokens after those, without positions, whose outputs nothing reads."""
    pooling: Literal["cls", "mean", "cls_mean", "cls_dist"] = "cls"
    """What the head sees: the class token, the mean of the patches, both in one vector, or class and distillation token
    in one vector. A linear head on the last can be the mean of DeiT's two heads."""
    dropout: float = 0.0
    """Probability of dropping an activation on a residual branch while training."""
    scan: bool = False
    """Whether equal blocks run as one loop, which compiles faster."""

    @property
    def total_stride(self) -> int:
        """The smallest side of an image."""
        return self.patch_size

    @property
    def num_prefix(self) -> int:
        """Tokens with a position before the patches."""
        return self.class_token + self.distilled


_TINY, _SMALL, _BASE, _LARGE = (192, 12, 3, 768), (384, 12, 6, 1536), (768, 12, 12, 3072), (1024, 24, 16, 4096)

CONFIGS = {
    "vit_ti_16": ViTConfig(16, *_TINY),
    "vit_s_16": ViTConfig(16, *_SMALL),
    "vit_b_16": ViTConfig(16, *_BASE),
    "vit_b_32": ViTConfig(32, *_BASE),
    "vit_l_16": ViTConfig(16, *_LARGE),
    "vit_s_14": ViTConfig(14, *_SMALL, layer_scale=1.0),
    "vit_b_14": ViTConfig(14, *_BASE, layer_scale=1.0),
    "vit_l_14": ViTConfig(14, *_LARGE, layer_scale=1.0),
    "deit_ti_16_distilled": ViTConfig(16, *_TINY, distilled=True, pooling="cls_dist"),
    "deit_s_16_distilled": ViTConfig(16, *_SMALL, distilled=True, pooling="cls_dist"),
    "deit_b_16_distilled": ViTConfig(16, *_BASE, distilled=True, pooling="cls_dist"),
}


class ViT(nnx.Module):
    """Patches as tokens, transformer blocks, a norm, one vector per image, and a linear head."""

    def __init__(
        self, config: ViTConfig, *, input_shape: tuple[int, ...], num_classes: int, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        """Raises InputError where images are not made of whole patches, or the head is to see a token there is not."""
        _check(config)
        self.stages = ("embed", *(f"blocks/{i}" for i in range(config.num_layers)), "norm", "pool", "head")
        self.scan = config.scan
        self.grid = _grid(config.patch_size, input_shape)  # for positions that come from images of another shape
        self.embed = Embeddings(config, input_shape, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([_block(config, dtype, rngs) for _ in range(config.num_layers)])
        self.norm = attention.layer_norm(config.hidden_dim, config.norm_eps, dtype=dtype, rngs=rngs)
        self.pool = TokenPool(config)
        width = 2 if config.pooling in ("cls_mean", "cls_dist") else 1
        self.head = blocks.linear_head(width * config.hidden_dim, num_classes, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B K"]:
        """Maps images to float32 logits."""
        return run_stages(self, x)

    def features(self, x: Float[Array, "B H W C"]) -> Float[Array, "B D"]:
        """Maps images to what the head sees."""
        return run_stages(self, x, stop="head")


class Embeddings(nnx.Module):
    """Patches through one linear layer, learned tokens before them, and positions added."""

    def __init__(self, config: ViTConfig, input_shape: tuple[int, ...], *, dtype: DTypeLike, rngs: nnx.Rngs):
        rows, columns = _grid(config.patch_size, input_shape)
        size, dim = (config.patch_size, config.patch_size), config.hidden_dim
        self.patch = nnx.Conv(input_shape[2], dim, size, strides=size, padding="VALID", dtype=dtype, rngs=rngs)
        self.class_token = _tokens((dim,), rngs) if config.class_token else None
        self.distillation_token = _tokens((dim,), rngs) if config.distilled else None
        self.registers = _tokens((config.num_registers, dim), rngs) if config.num_registers else None
        self.position = _tokens((config.num_prefix + rows * columns, dim), rngs)
        self.num_prefix = config.num_prefix

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B L D"]:
        """Maps images to the class token, the distillation token, registers and patches row by row, as far as there."""
        x = self.patch(x)
        batch, _, _, dim = x.shape
        x = x.reshape(batch, -1, dim)
        prefix = [token[None] for token in (self.class_token, self.distillation_token) if token is not None]
        x = jnp.concatenate([*(_for_all(token, x) for token in prefix), x], axis=1) + self.position.astype(x.dtype)
        if self.registers is None:
            return x
        first, patches = x[:, : self.num_prefix], x[:, self.num_prefix :]
        return jnp.concatenate([first, _for_all(self.registers[...], x), patches], axis=1)


class TokenPool(nnx.Module):
    """Takes one or two vectors from the tokens."""

    def __init__(self, config: ViTConfig):
        self.pooling = config.pooling
        self.num_before = config.num_prefix + config.num_registers

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B E"]:
        """Maps tokens to one vector each, of D features or where it joins two of 2 D."""
        if self.pooling == "cls":
            return x[:, 0]
        if self.pooling == "cls_dist":
            return jnp.concatenate([x[:, 0], x[:, 1]], axis=1)
        mean = x[:, self.num_before :].mean(axis=1)
        return mean if self.pooling == "mean" else jnp.concatenate([x[:, 0], mean], axis=1)


def _check(config: ViTConfig) -> None:
    if "cls" in config.pooling and not config.class_token:
        raise InputError(f"pooling `{config.pooling}` needs the class token; set `class_token` or pool by `mean`")
    if config.pooling == "cls_dist" and not config.distilled:
        raise InputError("pooling `cls_dist` needs the distillation token; set `distilled` or pool by `cls`")


def _grid(patch_size: int, input_shape: tuple[int, ...]) -> tuple[int, int]:
    rows, columns, _ = input_shape
    if rows % patch_size or columns % patch_size:
        near = max(1, round(min(rows, columns) / patch_size)) * patch_size
        raise InputError(
            f"images of {rows}×{columns} are not made of patches of {patch_size}×{patch_size}; set `image_size` to "
            f"{near} or another multiple of {patch_size}"
        )
    return rows // patch_size, columns // patch_size


def _tokens(shape: tuple[int, ...], rngs: nnx.Rngs) -> nnx.Param:
    return nnx.Param(attention.KERNEL_INIT(rngs.params(), shape))


def _for_all(tokens: Float[Array, "N D"], x: Float[Array, "B L D"]) -> Float[Array, "B N D"]:
    return jnp.broadcast_to(tokens.astype(x.dtype), (x.shape[0], *tokens.shape))


def _block(config: ViTConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Module:
    return attention.PreNormBlock(
        config.hidden_dim,
        config.num_heads,
        config.mlp_dim,
        norm_eps=config.norm_eps,
        qkv_bias=config.qkv_bias,
        layer_scale=config.layer_scale,
        dropout_rate=config.dropout,
        dtype=dtype,
        rngs=rngs,
    )
