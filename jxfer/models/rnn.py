"""Recurrent text classifiers: LSTM (Hochreiter and Schmidhuber 1997) and GRU (Cho et al. 2014, arXiv:1406.1078).

Gates, their order and the two biases are PyTorch's. Padding changes nothing: the state passes it as it is, and the
backward direction starts at the last token, as with PyTorch's packed sequences.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jxfer.models import blocks
from jxfer.models.attention import dropout
from jxfer.models.stages import run_stages
from jxfer.typing import InputError

NUM_GATES = {"lstm": 4, "gru": 3}
POOLINGS = ("last", "mean", "max")


@dataclasses.dataclass(frozen=True)
class RnnConfig:
    """One size of the network."""

    reads: ClassVar[str] = "text"
    cell: str = "lstm"
    """`lstm` or `gru`."""
    vocab_size: int = 20_000
    """Token ids that have an embedding; the tokeniser's must be below."""
    embedding_dim: int = 128
    hidden_dim: int = 128
    """Features of the state, in each direction."""
    num_layers: int = 1
    bidirectional: bool = True
    dropout: float = 0.0
    """Probability of dropping features of the embeddings and of what leaves each layer."""
    pad_id: int = 0
    pooling: str = "max"
    """What of the last layer the head sees: `last`, the final state of each direction, or `mean` or `max` over all
    tokens. Conneau et al. 2017 (arXiv:1705.02364) found the maximum to transfer best."""

    def __post_init__(self) -> None:
        for name, value, choices in (("cell", self.cell, tuple(NUM_GATES)), ("pooling", self.pooling, POOLINGS)):
            if value not in choices:
                raise InputError(f"`{name}` of a recurrent network is `{value}`; choose one of: {', '.join(choices)}")


CONFIGS = {"lstm": RnnConfig("lstm"), "gru": RnnConfig("gru")}


class Rnn(nnx.Module):
    """Embeddings, recurrent layers, one vector per text, and a linear head.

    Between the stages flow {"hidden": [B L D], "mask": [B L] bool}, the mask True at tokens that are not padding.
    """

    def __init__(
        self,
        config: RnnConfig,
        *,
        input_shape: tuple[int, ...],
        num_classes: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        del input_shape  # texts may have any length
        width = config.hidden_dim * (2 if config.bidirectional else 1)
        sizes = [config.embedding_dim, *[width] * (config.num_layers - 1)]
        self.stages = ("embed", *(f"layers/{i}" for i in range(config.num_layers)), "pool", "head")
        self.embed = Embedding(config, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([Layer(size, config, dtype=dtype, rngs=rngs) for size in sizes])
        self.pool = Pool(config)
        self.head = blocks.linear_head(width, num_classes, rngs=rngs)

    def __call__(self, x: Int[Array, "B L"]) -> Float[Array, "B K"]:
        """Maps token ids to float32 logits."""
        return run_stages(self, x)

    def features(self, x: Int[Array, "B L"]) -> Float[Array, "B D"]:
        """Maps token ids to what the head sees."""
        return run_stages(self, x, stop="head")


class Embedding(nnx.Module):
    """A table of word vectors; its rows are `embed/embedding`, so that given vectors have a plain place."""

    def __init__(self, config: RnnConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.pad_id = config.pad_id
        self.dtype = dtype
        shape = (config.vocab_size, config.embedding_dim)
        self.embedding = nnx.Param(nnx.initializers.normal(0.1)(rngs.params(), shape, jnp.float32))
        self.dropout = dropout(config.dropout, rngs=rngs)

    def __call__(self, ids: Int[Array, "B L"]) -> dict[str, Array]:
        """Maps token ids to {"hidden": [B L D], "mask": [B L]}."""
        return {"hidden": self.dropout(self.embedding[ids].astype(self.dtype)), "mask": ids != self.pad_id}


class Layer(nnx.Module):
    """One layer in one or both directions; it gives 0 at padding."""

    def __init__(self, in_features: int, config: RnnConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.forward = Direction(in_features, config, reverse=False, dtype=dtype, rngs=rngs)
        self.backward = (
            Direction(in_features, config, reverse=True, dtype=dtype, rngs=rngs) if config.bidirectional else None
        )
        self.dropout = dropout(config.dropout, rngs=rngs)

    def __call__(self, x: dict[str, Array]) -> dict[str, Array]:
        """Maps {"hidden": [B L C], "mask": [B L]} to {"hidden": [B L D], "mask"}, forward features first."""
        hidden, mask = x["hidden"], x["mask"]
        parts = [direction(hidden, mask) for direction in (self.forward, self.backward) if direction is not None]
        return {**x, "hidden": self.dropout(jnp.concatenate(parts, axis=-1))}


class Direction(nnx.Module):
    """A cell run over the tokens; `input` and `hidden` map tokens and state to all gates, in PyTorch's order."""

    def __init__(self, in_features: int, config: RnnConfig, *, reverse: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        """`reverse` runs from the last token to the first."""
        size = config.hidden_dim
        gates = NUM_GATES[config.cell] * size
        options: dict[str, Any] = {"kernel_init": _symmetric_uniform(size**-0.5), "dtype": dtype, "rngs": rngs}
        self.cell, self.reverse = config.cell, reverse
        self.input = nnx.Linear(in_features, gates, **options)
        self.hidden = nnx.Linear(size, gates, **options)

    def __call__(self, x: Float[Array, "B L C"], mask: Bool[Array, "B L"]) -> Float[Array, "B L D"]:
        """Returns the state after each token, 0 at padding."""
        step = _lstm_step if self.cell == "lstm" else _gru_step
        # All tokens at once outside the loop, where only the product with the state has to wait.
        gates = jnp.swapaxes(self.input(x), 0, 1)  # [L B gates]
        zeros = jnp.zeros((x.shape[0], self.hidden.in_features), gates.dtype)
        start: tuple[Array, ...] = (zeros, zeros) if self.cell == "lstm" else (zeros,)

        def body(state: tuple[Array, ...], token: tuple[Array, Array]) -> tuple[tuple[Array, ...], Array]:
            gates, real = token
            after = step(gates, self.hidden(state[0]), state)
            state = tuple(jnp.where(real[:, None], new, old) for new, old in zip(after, state, strict=True))
            return state, jnp.where(real[:, None], state[0], 0)

        _, states = jax.lax.scan(body, start, (gates, mask.T), reverse=self.reverse)
        return jnp.swapaxes(states, 0, 1)


class Pool(nnx.Module):
    """One vector per text; a text without tokens gives 0."""

    def __init__(self, config: RnnConfig):
        self.pooling = config.pooling
        self.split = config.hidden_dim
        """Features of the forward direction, which come first."""

    def __call__(self, x: dict[str, Array]) -> Float[Array, "B D"]:
        """Maps {"hidden": [B L D], "mask": [B L]} to [B D]."""
        hidden, mask = x["hidden"], x["mask"][..., None]
        if self.pooling == "mean":
            return jnp.sum(hidden, axis=1) / jnp.maximum(jnp.sum(mask, axis=1), 1).astype(hidden.dtype)
        if self.pooling == "max":
            most = jnp.max(jnp.where(mask, hidden, -jnp.inf), axis=1)
            return jnp.where(mask.any(axis=1), most, 0)
        first, last = jnp.argmax(mask, axis=1), mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)  # [B 1]
        forward = jnp.take_along_axis(hidden[..., : self.split], last[..., None], axis=1)
        backward = jnp.take_along_axis(hidden[..., self.split :], first[..., None], axis=1)
        return jnp.concatenate([forward[:, 0], backward[:, 0]], axis=-1)


def _lstm_step(
    from_token: Float[Array, "B gates"], from_state: Float[Array, "B gates"], state: tuple[Array, ...]
) -> tuple[Array, ...]:
    write, forget, value, read = jnp.split(from_token + from_state, 4, axis=-1)
    memory = nnx.sigmoid(forget) * state[1] + nnx.sigmoid(write) * jnp.tanh(value)
    return nnx.sigmoid(read) * jnp.tanh(memory), memory


def _gru_step(
    from_token: Float[Array, "B gates"], from_state: Float[Array, "B gates"], state: tuple[Array, ...]
) -> tuple[Array, ...]:
    """Resets after the product with the state, bias included, as PyTorch and cuDNN do; the paper resets before it."""
    tokens, states = (jnp.split(gates, 3, axis=-1) for gates in (from_token, from_state))
    reset, keep = (nnx.sigmoid(tokens[i] + states[i]) for i in (0, 1))
    value = jnp.tanh(tokens[2] + reset * states[2])
    return ((1 - keep) * value + keep * state[0],)


def _symmetric_uniform(limit: float) -> Any:
    """Returns the initialiser of PyTorch's recurrent layers, uniform in [-limit, limit]."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32, **_: Any) -> Array:
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return init
