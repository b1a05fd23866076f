"""Transformer blocks (Vaswani et al. 2017, arXiv:1706.03762): attention, the two-layer network, both norm orders."""

from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

# The same object for every layer, so that equal blocks have equal graph definitions and can be scanned.
KERNEL_INIT = nnx.initializers.truncated_normal(0.02)
"""How BERT (Devlin et al. 2018, arXiv:1810.04805) and DeiT start every kernel and embedding."""


def linear(
    in_features: int, out_features: int, *, use_bias: bool = True, dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.Linear:
    """Returns a linear layer with a transformer's initialisation."""
    return nnx.Linear(in_features, out_features, use_bias=use_bias, kernel_init=KERNEL_INIT, dtype=dtype, rngs=rngs)


def layer_norm(num_features: int, epsilon: float, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Returns a layer norm (Ba et al. 2016, arXiv:1607.06450) with the variance in two passes, as in PyTorch.

    The mean of the squares less the square of the mean would lose the variance of activations far from zero.
    """
    return nnx.LayerNorm(num_features, epsilon=epsilon, use_fast_variance=False, dtype=dtype, rngs=rngs)


def dropout(rate: float, *, per_example: tuple[int, ...] = (), rngs: nnx.Rngs) -> Callable[[Array], Array]:
    """Returns dropout, or what returns its input where the rate is 0, which needs no keys.

    Args:
      rate: the probability of dropping.
      per_example: axes that are dropped together; all but the first for stochastic depth.
      rngs: the keys it draws from.
    """
    return nnx.Dropout(rate, broadcast_dims=per_example, rngs=rngs) if rate > 0 else _same


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The exact form with the error function (Hendrycks and Gimpel 2016, arXiv:1606.08415)."""
    return jax.nn.gelu(x, approximate=False)


class SelfAttention(nnx.Module):
    """Attention of every token over all tokens, in several heads of `num_features / num_heads` features."""

    without_effect: ClassVar[tuple[str, ...]] = ("key/bias",)
    """It adds one number to all scores of a query, which the softmax takes away."""

    def __init__(self, num_features: int, num_heads: int, *, use_bias: bool = True, dtype: DTypeLike, rngs: nnx.Rngs):
        """`use_bias` says whether queries, keys and values have one; the output always has."""
        self.num_heads = num_heads
        self.query = linear(num_features, num_features, use_bias=use_bias, dtype=dtype, rngs=rngs)
        self.key = linear(num_features, num_features, use_bias=use_bias, dtype=dtype, rngs=rngs)
        self.value = linear(num_features, num_features, use_bias=use_bias, dtype=dtype, rngs=rngs)
        self.out = linear(num_features, num_features, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B L D"], mask: Bool[Array, "B L"] | None = None) -> Float[Array, "B L D"]:
        """Attends to the tokens where the mask is True; a row without any attends to all alike, so it stays finite."""
        heads = (*x.shape[:2], self.num_heads, -1)  # [B L N D/N]
        query, key, value = (layer(x).reshape(heads) for layer in (self.query, self.key, self.value))
        over_keys = None if mask is None else mask[:, None, None, :]
        mixed = jax.nn.dot_product_attention(query, key, value, mask=over_keys)
        return self.out(mixed.reshape(*x.shape[:2], -1))


class Mlp(nnx.Module):
    """Two linear layers with a gelu between, on each token (or pixel) alone."""

    def __init__(self, num_features: int, hidden_features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.up = linear(num_features, hidden_features, dtype=dtype, rngs=rngs)
        self.down = linear(hidden_features, num_features, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Keeps the shape."""
        return self.down(gelu(self.up(x)))


class LayerScale(nnx.Module):
    """A learned factor per feature on a residual branch (Touvron et al. 2021, arXiv:2103.17239, section 2)."""

    def __init__(self, num_features: int, start: float):
        self.scale = nnx.Param(jnp.full((num_features,), start))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Multiplies in the type of the activations."""
        return x * self.scale.astype(x.dtype)


class PreNormBlock(nnx.Module):
    """Norm before attention and before the network, inside their shortcuts: the block of a vision transformer."""

    def __init__(
        self,
        num_features: int,
        num_heads: int,
        mlp_dim: int,
        *,
        norm_eps: float,
        qkv_bias: bool,
        layer_scale: float | None,
        dropout_rate: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        """`layer_scale` is what its factors start from; None where a block has none."""
        self.norm1 = layer_norm(num_features, norm_eps, dtype=dtype, rngs=rngs)
        self.attention = SelfAttention(num_features, num_heads, use_bias=qkv_bias, dtype=dtype, rngs=rngs)
        self.scale1 = _same if layer_scale is None else LayerScale(num_features, layer_scale)
        self.norm2 = layer_norm(num_features, norm_eps, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(num_features, mlp_dim, dtype=dtype, rngs=rngs)
        self.scale2 = _same if layer_scale is None else LayerScale(num_features, layer_scale)
        self.dropout = dropout(dropout_rate, rngs=rngs)

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """Keeps the shape."""
        x = x + self.scale1(self.dropout(self.attention(self.norm1(x))))
        return x + self.scale2(self.dropout(self.mlp(self.norm2(x))))


class PostNormBlock(nnx.Module):
    """Norm after each shortcut's sum, as in the first transformers and BERT."""

    def __init__(
        self,
        num_features: int,
        num_heads: int,
        mlp_dim: int,
        *,
        norm_eps: float,
        dropout_rate: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.attention = SelfAttention(num_features, num_heads, dtype=dtype, rngs=rngs)
        self.norm1 = layer_norm(num_features, norm_eps, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(num_features, mlp_dim, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(num_features, norm_eps, dtype=dtype, rngs=rngs)
        self.dropout = dropout(dropout_rate, rngs=rngs)

    def __call__(self, x: dict[str, Array]) -> dict[str, Array]:
        """Maps {"hidden": [B L D], "mask": [B L] bool} to the same; what the mask leaves out is attended to by none."""
        hidden = x["hidden"]
        hidden = self.norm1(hidden + self.dropout(self.attention(hidden, x["mask"])))
        return {**x, "hidden": self.norm2(hidden + self.dropout(self.mlp(hidden)))}


def _same(x: Array) -> Array:
    return x
