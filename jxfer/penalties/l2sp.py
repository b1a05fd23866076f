"""L2-SP: pull what trains towards where it started (Li et al. 2018, arXiv:1802.01483, equation 2)."""

import dataclasses

import jax
import jax.numpy as jnp

from jxfer.typing import Arrays


@dataclasses.dataclass(frozen=True)
class L2SP:
    """Adds `weight` / 2 times the squared distance of the trainable parameters from the pretrained reference."""

    weight: float | jax.Array = 0.1
    """The paper's alpha."""

    def __call__(self, params: Arrays, reference: Arrays) -> jax.Array:
        """Returns the penalty, a float32 scalar, over the paths that `reference` holds."""
        distances = [jnp.sum(jnp.square(params[path] - value)) for path, value in reference.items() if path in params]
        return self.weight / 2 * sum(distances, start=jnp.float32(0))
