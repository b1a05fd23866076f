"""What a solver returns: one head per setting of its path, and how well each is solved."""

import dataclasses
import functools
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jxfer.solvers.basis import HIGHEST
from jxfer.typing import Arrays, Proceed, always


@runtime_checkable
class Heads(Protocol):
    """Heads for the same features under several settings."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the settings, in the order of the path."""
        ...

    @property
    def gradient_norms(self) -> tuple[float, ...]:
        """How far each is from solved; 0 for closed forms."""
        ...

    @property
    def converged(self) -> tuple[bool, ...]:
        """Whether each is solved."""
        ...

    @property
    def flops(self) -> float:
        """Of finding all of them."""
        ...

    def logits(self, features: Float[Array, "M D"], index: int) -> Float[Array, "M K"]:
        """Returns what the head of one setting says."""
        ...

    def arrays(self, index: int) -> Arrays:
        """Returns the arrays of one setting's head, by their paths inside it."""
        ...


@runtime_checkable
class Solver(Protocol):
    """A frozen dataclass that finds heads from features."""

    def fit(self, features: Any, labels: Any, num_classes: int, *, proceed: Proceed = always) -> Heads:
        """Returns a head for every setting, from features [N D] float32 and labels [N] int32.

        What takes seconds calls `proceed` in between, as do the heads where asking them takes as long.
        """
        ...

    def cost(self, num_examples: int, num_features: int, num_classes: int) -> tuple[float, int]:
        """Returns the floating-point operations of one iteration, or of all where there are none, and its bytes."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class LinearHeads:
    """Linear heads: logits are features @ kernel + bias."""

    names: tuple[str, ...]
    kernels: Float[Array, "P D K"]
    biases: Float[Array, "P K"]
    gradient_norms: tuple[float, ...]
    converged: tuple[bool, ...]
    flops: float

    def logits(self, features: Float[Array, "M D"], index: int) -> Float[Array, "M K"]:
        """Returns what the head of one setting says."""
        return jnp.matmul(features, self.kernels[index], precision=HIGHEST) + self.biases[index]

    def arrays(self, index: int) -> Arrays:
        """Returns `kernel` [D K] and `bias` [K]."""
        return {"kernel": self.kernels[index], "bias": self.biases[index]}


def closed_form(names: tuple[str, ...], kernels: Any, biases: Any, flops: float) -> LinearHeads:
    """Returns heads that a formula gives, so that there is nothing to converge."""
    return LinearHeads(names, kernels, biases, (0.0,) * len(names), (True,) * len(names), flops)


def as_arrays(features: Any, labels: Any) -> tuple[Float[Array, "N D"], Any]:
    """Returns features as float32 and labels as int32 on the device; what is there as such stays where it is."""
    return jnp.asarray(features, jnp.float32), jnp.asarray(labels, jnp.int32)


@functools.lru_cache(maxsize=256)
def flops_of(function: jax.stages.Wrapped, *arguments: Any, **static: Any) -> float:
    """Returns XLA's count of a jitted function's operations on arrays of these shapes, before compilation.

    The body of a loop counts once. What is lowered for it need not be lowered again to be called.
    """
    analysis: Any = function.lower(*arguments, **static).cost_analysis()
    return float((analysis or {}).get("flops", 0.0))


def shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    """Returns an array's shape and type in place of the array."""
    return jax.ShapeDtypeStruct(sizes, dtype)
