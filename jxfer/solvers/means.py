"""The nearest class mean as a linear head, in closed form."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jxfer.solvers.basis import HIGHEST, one_hot
from jxfer.solvers.heads import LinearHeads, as_arrays, closed_form, flops_of, shape
from jxfer.typing import InputError, Proceed, always


@dataclasses.dataclass(frozen=True)
class NearestMean:
    """Takes an example for the class whose mean is nearest: -‖x - μ‖² / 2 is x · μ - ‖μ‖² / 2, but for ‖x‖².

    On whitened features that is linear discriminant analysis, but for the classes' sizes.
    """

    map: Any = None
    """From `jxfer.solvers.maps`: distances are those of the mapped features; folded into the head afterwards."""

    def fit(self, features: Any, labels: Any, num_classes: int, *, proceed: Proceed = always) -> LinearHeads:
        """Returns the one head, from features [N D] and labels [N]; `proceed` is called before the means are taken.

        Raises:
          InputError: a class has no example.
        """
        features, labels = as_arrays(features, labels)
        counts = np.bincount(np.asarray(labels), minlength=num_classes)
        if not counts.all():
            raise InputError(f"class {int(np.argmin(counts))} has no training example whose mean could be taken")
        linear = None if self.map is None else self.map.fit(features)
        mapped = features if linear is None else linear(features)
        proceed()
        means = class_means(mapped, labels, num_classes=num_classes)
        kernels, biases = means.T[None], -jnp.sum(jnp.square(means), axis=1)[None] / 2
        kernels, biases = (kernels, biases) if linear is None else linear.fold(kernels, biases)
        flops, _ = self.cost(len(labels), mapped.shape[1], num_classes)
        return closed_form(("mean",), kernels, biases, flops)

    def cost(self, num_examples: int, num_features: int, num_classes: int) -> tuple[float, int]:
        """Returns the floating-point operations of the means and the bytes of the data."""
        data = shape(num_examples, num_features), shape(num_examples, dtype=jnp.int32)
        return flops_of(class_means, *data, num_classes=num_classes), 4 * num_examples * (num_features + num_classes)


@functools.partial(jax.jit, static_argnames="num_classes")
def class_means(features: Float[Array, "N D"], labels: Int[Array, " N"], *, num_classes: int) -> Float[Array, "K D"]:
    """Returns the mean of each class."""
    targets = one_hot(labels, num_classes)
    return jnp.matmul(targets.T, features, precision=HIGHEST) / jnp.sum(targets, axis=0)[:, None]
