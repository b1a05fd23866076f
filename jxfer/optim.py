"""From the settings of a run and the labels of its partition to one Optax transform."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jxfer.config import Group, OptimizerName, Schedule, TrainConfig
from jxfer.partition import Partition
from jxfer.typing import PyTree


def optimizer(train: TrainConfig, partition: Partition, *, num_steps: int) -> optax.GradientTransformation:
    """Returns clipping over all that moves, then each label's own optimizer, rate and decay.

    The base learning rate and weight decay live in the optimizer state (`set_hyperparams`), so that runs that differ
    in them alone share one compiled step; equal settings return the very same transform for the same reason.

    Args:
      train: the run's settings.
      partition: gives the labels, their groups, and which leaves decay.
      num_steps: optimizer updates of the phase, over which the schedule runs.
    """
    neutral = dataclasses.replace(train, learning_rate=0.0, weight_decay=0.0)
    return _optimizer(neutral, partition, num_steps)


def learning_rate(train: TrainConfig) -> float:
    """Returns the base learning rate, for the run's batch size where it is given for another one.

    With sgd it grows as the batch (Goyal et al. 2017, arXiv:1706.02677, section 2.1), with adaptive optimizers as its
    square root (Malladi et al. 2022, arXiv:2205.10287, who also scale the decay rates of the moments, which stay here).
    """
    if train.base_batch_size is None:
        return train.learning_rate
    ratio = train.batch_size / train.base_batch_size
    return train.learning_rate * (ratio if train.optimizer == "sgd" else math.sqrt(ratio))


def scaling_rule(train: TrainConfig) -> str | None:
    """Says how `learning_rate` scales; None where it does not."""
    if train.base_batch_size is None:
        return None
    rule = "linear scaling (arXiv:1706.02677)" if train.optimizer == "sgd" else "square root (arXiv:2205.10287)"
    return f"{rule} from batches of {train.base_batch_size} to {train.batch_size}, with {train.optimizer}"


def set_hyperparams(opt_state: PyTree, *, learning_rate: ArrayLike, weight_decay: ArrayLike) -> PyTree:
    """Returns the optimizer state with this base learning rate and weight decay; of a population, with [V] of each."""
    values = {"learning_rate": learning_rate, "weight_decay": weight_decay}
    return optax.tree.set(opt_state, **{name: jnp.asarray(value, jnp.float32) for name, value in values.items()})


def schedule_scale(schedule: Schedule, step: jax.Array, *, num_steps: int, warmup_steps: int) -> Float[Array, ""]:
    """Returns the factor of the base learning rate for the update that follows `step` updates.

    Warm-up rises linearly and reaches 1 at update `warmup_steps`, never 0, so that the first update moves; then
    `cosine` (Loshchilov & Hutter 2017, arXiv:1608.03983, without restarts) and `linear` fall to 0 after the last one.
    """
    step = jnp.asarray(step, jnp.float32)
    progress = jnp.clip((step - warmup_steps) / max(num_steps - warmup_steps, 1), 0.0, 1.0)
    decay = {
        "constant": jnp.ones_like(progress),
        "cosine": 0.5 * (1 + jnp.cos(jnp.pi * progress)),
        "linear": 1 - progress,
    }
    return jnp.where(step < warmup_steps, (step + 1) / max(warmup_steps, 1), decay[schedule])


@functools.lru_cache(maxsize=512)
def _optimizer(train: TrainConfig, partition: Partition, num_steps: int) -> optax.GradientTransformation:
    labels = dict.fromkeys(leaf.label for leaf in partition.trainable)
    decays = tuple(leaf.path for leaf in partition.trainable if leaf.decays)

    def build(learning_rate: jax.Array, weight_decay: jax.Array) -> optax.GradientTransformation:
        def rate(step: jax.Array) -> jax.Array:
            scale = schedule_scale(train.schedule, step, num_steps=num_steps, warmup_steps=train.warmup_steps)
            return learning_rate * scale

        return partition.optimizer(
            {label: _group_optimizer(train, partition.group(label), rate, weight_decay, decays) for label in labels}
        )

    clip = optax.identity() if train.clip_norm is None else optax.clip_by_global_norm(train.clip_norm)
    return optax.chain(clip, optax.inject_hyperparams(build)(learning_rate=0.0, weight_decay=0.0))


def _group_optimizer(
    train: TrainConfig, group: Group, rate: optax.Schedule, weight_decay: jax.Array, decays: tuple[str, ...]
) -> optax.GradientTransformation:
    decay = optax.add_decayed_weights(
        weight_decay * group.weight_decay_scale, mask=lambda params: {path: path in decays for path in params}
    )
    return optax.chain(
        *_directions(train.optimizer, train.momentum, decay),
        optax.scale_by_learning_rate(lambda step: rate(step) * group.learning_rate_scale),
    )


def _directions(
    name: OptimizerName, momentum: float, decay: optax.GradientTransformation
) -> tuple[optax.GradientTransformation, ...]:
    """Returns the chain before the learning rate; decay is decoupled except in sgd, where it joins the gradient."""
    return {
        "sgd": lambda: (decay, optax.trace(momentum)),  # as torch.optim.SGD does, not Loshchilov & Hutter's SGDW
        "adamw": lambda: (optax.scale_by_adam(), decay),  # Loshchilov & Hutter 2019, arXiv:1711.05101
        "lamb": lambda: (optax.scale_by_adam(eps=1e-6), decay, optax.scale_by_trust_ratio()),  # arXiv:1904.00962
        "lion": lambda: (optax.scale_by_lion(), decay),  # Chen et al. 2023, arXiv:2302.06675
    }[name]()
