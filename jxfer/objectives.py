"""Loss and metrics of each kind of task: sums over examples on the device, means only at the end, on the host."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jxfer.typing import Batch, Metrics


@runtime_checkable
class Objective(Protocol):
    """What a task asks of a model's outputs."""

    def losses(self, outputs: jax.Array, batch: Batch) -> jax.Array:
        """Returns the loss of each example, [B] float32."""
        ...

    def metrics(self, outputs: jax.Array, batch: Batch) -> Metrics:
        """Returns sums over the examples whose mask is 1, with their number as `count`."""
        ...


@dataclasses.dataclass(frozen=True)
class Classification:
    """Softmax cross-entropy over K classes; see `classification`."""

    label_smoothing: float | jax.Array = 0.0

    def losses(self, outputs: Float[Array, "B K"], batch: Batch) -> Float[Array, " B"]:
        """Returns the cross-entropy in nats against the labels, or against `label_probs` where mixing made some."""
        logits = outputs.astype(jnp.float32)
        probs = batch.get("label_probs")
        if probs is None:
            probs = jax.nn.one_hot(batch["label"], logits.shape[-1])
        return optax.softmax_cross_entropy(logits, optax.smooth_labels(probs, self.label_smoothing))

    def metrics(self, outputs: Float[Array, "B K"], batch: Batch) -> Metrics:
        """Returns the sums of `loss` (against the true labels, not smoothed) and `accuracy`, and `count`."""
        logits = outputs.astype(jnp.float32)
        losses = _cross_entropy(logits, batch["label"])
        correct = jnp.argmax(logits, -1) == batch["label"]
        mask = batch["mask"]
        return {"loss": jnp.sum(losses * mask), "accuracy": jnp.sum(correct * mask), "count": jnp.sum(mask)}


def classification(label_smoothing: float = 0.0) -> Classification:
    """Returns the objective of classification into exclusive classes.

    Label smoothing mixes the labels with the uniform distribution (Szegedy et al. 2016, arXiv:1512.00567, section 7).
    """
    return Classification(label_smoothing)


def _cross_entropy(logits: Float[Array, "B K"], label: jax.Array) -> Float[Array, " B"]:
    """Returns what `optax.softmax_cross_entropy_with_integer_labels` does, from the very terms of `jax.nn.log_softmax`.

    A training step has the gradient of the latter, so that it takes the exponentials once for loss and metrics.
    """
    highest = jnp.max(logits, -1, keepdims=True)
    log_sums = jnp.log(jnp.sum(jnp.exp(logits - highest), -1, keepdims=True)) + highest
    return (log_sums - jnp.take_along_axis(logits, label[:, None], -1))[:, 0]


def means(sums: Iterable[Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """Merges batches of sums and divides once by the number of examples, in float64.

    Returns a float for each metric, or [V] where the sums are those of the variants of a population.
    """
    rows = list(sums)
    totals = {name: np.sum([np.asarray(row[name], np.float64) for row in rows], axis=0) for name in rows[0]}
    return {name: _scalar(total / totals["count"]) for name, total in totals.items() if name != "count"}


def _scalar(value: Any) -> Any:
    return float(value) if np.ndim(value) == 0 else value
