"""The encoders of BERT, MiniLM, DistilBERT and RoBERTa, which differ in size, positions and how they pool.

BERT: Devlin et al. 2018, arXiv:1810.04805. RoBERTa: Liu et al. 2019, arXiv:1907.11692. DistilBERT: Sanh et al. 2019,
arXiv:1910.01108. MiniLM: Wang et al. 2020, arXiv:2002.10957. Dropout is on embeddings, on what each layer adds and
before the head; the papers also drop attention weights.
"""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jxfer.models import attention, blocks
from jxfer.models.stages import run_stages
from jxfer.typing import InputError


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """One size of the encoder."""

    reads: ClassVar[str] = "text"

    hidden_dim: int
    """Features of a token."""
    num_layers: int
    """Transformer blocks."""
    num_heads: int
    """Heads of attention in a block."""
    mlp_dim: int
    """Features between the two linear layers of a block."""
    vocab_size: int = 30522
    """Tokens in the vocabulary."""
    max_positions: int = 512
    """Rows of the table of positions; texts have up to this many tokens, less `position_offset`."""
    num_token_types: int = 2
    """Rows of the table of token types, of which the first is added to every token; 0 where there is no table."""
    position_offset: int = 0
    """0 numbers tokens by their place. Above 0, only real tokens are counted, from this number on, and padding has the
    number before it, as in RoBERTa."""
    pad_id: int = 0
    """The token that fills short texts; nothing attends to it."""
    norm_eps: float = 1e-12
    """Added to the variance by layer norms."""
    dropout: float = 0.1
    """Probability of dropping an activation while training."""
    pooling: Literal["mean", "cls", "pooler"] = "mean"
    """What the head sees: the mean of the real tokens (Reimers and Gurevych 2019, arXiv:1908.10084), the first token,
    or the first token after a linear layer and `pooler_activation`."""
    pooler_activation: Literal["tanh", "relu"] = "tanh"
    """BERT and RoBERTa have tanh, DistilBERT has relu."""
    scan: bool = False
    """Whether equal blocks run as one loop, which compiles faster."""


CONFIGS = {
    "bert_tiny": BertConfig(128, 2, 2, 512),
    "bert_base": BertConfig(768, 12, 12, 3072),
    "bert_large": BertConfig(1024, 24, 16, 4096),
    "minilm_l6": BertConfig(384, 6, 12, 1536),
    "minilm_l12": BertConfig(384, 12, 12, 1536),
    "distilbert_base": BertConfig(768, 6, 12, 3072, num_token_types=0, pooler_activation="relu"),
    "roberta_base": BertConfig(
        768,
        12,
        12,
        3072,
        vocab_size=50265,
        max_positions=514,
        num_token_types=1,
        position_offset=2,
        pad_id=1,
        norm_eps=1e-5,
    ),
}


class Bert(nnx.Module):
    """Embeddings, transformer blocks, one vector per text, and a linear head."""

    def __init__(
        self, config: BertConfig, *, input_shape: tuple[int, ...], num_classes: int, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        """Raises InputError where texts are longer than the table of positions."""
        longest = config.max_positions - config.position_offset
        if input_shape[0] > longest:
            raise InputError(
                f"texts of {input_shape[0]} tokens are longer than the {longest} positions of this model; set "
                f"`max_tokens` to {longest} or less"
            )
        self.stages = ("embed", *(f"blocks/{i}" for i in range(config.num_layers)), "pool", "head")
        self.scan = config.scan
        self.embed = Embeddings(config, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([_block(config, dtype, rngs) for _ in range(config.num_layers)])
        self.pool = _pool(config, dtype, rngs)
        self.head = blocks.linear_head(config.hidden_dim, num_classes, rngs=rngs)

    def __call__(self, x: Int[Array, "B L"]) -> Float[Array, "B K"]:
        """Maps token ids to float32 logits."""
        return run_stages(self, x)

    def features(self, x: Int[Array, "B L"]) -> Float[Array, "B D"]:
        """Maps token ids to what the head sees."""
        return run_stages(self, x, stop="head")


class Embeddings(nnx.Module):
    """The sum of token, position and type, normalised."""

    def __init__(self, config: BertConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.pad_id = config.pad_id
        self.position_offset = config.position_offset
        self.token = _table(config.vocab_size, config.hidden_dim, dtype, rngs)
        self.position = _table(config.max_positions, config.hidden_dim, dtype, rngs)
        types = config.num_token_types
        self.token_type = _table(types, config.hidden_dim, dtype, rngs) if types else None
        self.norm = attention.layer_norm(config.hidden_dim, config.norm_eps, dtype=dtype, rngs=rngs)
        self.dropout = attention.dropout(config.dropout, rngs=rngs)

    def __call__(self, ids: Int[Array, "B L"]) -> dict[str, Array]:
        """Maps token ids to {"hidden": [B L D], "mask": [B L] bool}, the mask True at tokens that are not padding."""
        mask = ids != self.pad_id
        hidden = self.token(ids) + self.position(self._positions(mask))
        if self.token_type is not None:
            hidden = hidden + self.token_type(jnp.zeros((1, 1), jnp.int32))
        return {"hidden": self.dropout(self.norm(hidden)), "mask": mask}

    def _positions(self, mask: Bool[Array, "B L"]) -> Int[Array, "b L"]:
        if not self.position_offset:
            return jnp.arange(mask.shape[1])[None]
        return jnp.where(mask, jnp.cumsum(mask, axis=1), 0) + self.position_offset - 1


class MeanTokens(nnx.Module):
    """Averages over the tokens that are not padding."""

    def __call__(self, x: dict[str, Array]) -> Float[Array, "B D"]:
        """Maps {"hidden", "mask"} to one vector each, zeros for a text without tokens."""
        mask = x["mask"][..., None].astype(x["hidden"].dtype)
        return (x["hidden"] * mask).sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1)


class FirstToken(nnx.Module):
    """Takes the first token, which BERT trains to stand for the text."""

    def __call__(self, x: dict[str, Array]) -> Float[Array, "B D"]:
        """Maps {"hidden", "mask"} to one vector each."""
        return x["hidden"][:, 0]


class Pooler(nnx.Module):
    """The first token through a linear layer, an activation and dropout."""

    def __init__(self, config: BertConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.dense = attention.linear(config.hidden_dim, config.hidden_dim, dtype=dtype, rngs=rngs)
        self.activation = {"tanh": jnp.tanh, "relu": nnx.relu}[config.pooler_activation]
        self.dropout = attention.dropout(config.dropout, rngs=rngs)

    def __call__(self, x: dict[str, Array]) -> Float[Array, "B D"]:
        """Maps {"hidden", "mask"} to one vector each."""
        return self.dropout(self.activation(self.dense(x["hidden"][:, 0])))


def _block(config: BertConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Module:
    return attention.PostNormBlock(
        config.hidden_dim,
        config.num_heads,
        config.mlp_dim,
        norm_eps=config.norm_eps,
        dropout_rate=config.dropout,
        dtype=dtype,
        rngs=rngs,
    )


def _pool(config: BertConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Module:
    if config.pooling == "pooler":
        return Pooler(config, dtype=dtype, rngs=rngs)
    return {"mean": MeanTokens, "cls": FirstToken}[config.pooling]()


def _table(num_rows: int, num_features: int, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Embed:
    return nnx.Embed(num_rows, num_features, embedding_init=attention.KERNEL_INIT, dtype=dtype, rngs=rngs)
