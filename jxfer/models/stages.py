"""What a stage is: one of a model's named parts, run in order, from the pixels to the head."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx

from jxfer import paths
from jxfer.models.scan import run_again, scan_blocks
from jxfer.typing import InputError, Path, PyTree

FEATURES = "features"
"""The key of stored activations in a batch, followed by `/NAME` for each where a stage returns several."""


@runtime_checkable
class Staged(Protocol):
    """A model made of stages: `stages` names its parts in the order in which they run, `head` last.

    A stage is an attribute, a callable module or an `nnx.List` of blocks applied in turn, so that parameter paths read
    `layer4/0/conv1/kernel`; or one block of a list, `blocks/3`. What flows between stages is an array or a flat dict of
    arrays. A model whose attribute `scan` is true runs consecutive blocks of a list as one loop. One whose `remat`
    names a stage keeps for a backward pass, from there up to the head, only what goes into each block, and runs the
    block again for the rest (Chen et al. 2016, arXiv:1604.06174).
    """

    stages: tuple[str, ...]

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images [B H W C], token ids [B L] or samples [B T] to float32 logits [B K]: all stages."""
        ...

    def features(self, x: jax.Array) -> jax.Array:
        """Maps the same to what the head sees, [B D]: all stages but the last."""
        ...


def run_stages(model: Any, x: PyTree, *, start: str | None = None, stop: str | None = None) -> PyTree:
    """Runs the stages from `start` (inclusive) up to `stop` (exclusive); None means from the first, to the end.

    Args:
      model: a `Staged` model.
      x: what the stage `start` takes: the input where it is None, else what `run_stages(..., stop=start)` returned.
      start: the first stage to run.
      stop: the first stage not to run.

    Raises:
      InputError: the model has no such stage, or `stop` comes before `start`.
    """
    first = 0 if start is None else _index(start, model.stages)
    last = len(model.stages) if stop is None else _index(stop, model.stages)
    if last < first:
        raise InputError(f"cannot run from stage `{start}` up to `{stop}`, which comes before it; swap them")
    head = len(model.stages) - 1
    if getattr(model, "taps", ()) and first < head <= last:
        if first:
            raise InputError(f"the head of this {type(model).__name__} sees every stage; run it from the first")
        x = jnp.concatenate(tapped(model, x, [name for name, _ in model.taps]), axis=-1)
        first = head
    return _run(model, x, model.stages[first:last])


def tapped(model: Any, x: PyTree, names: Sequence[str]) -> list[jax.Array]:
    """Returns the pooled activations after each of these stages, [B D] each.

    `names` are in the order of the stages. A model with a surgery's `taps`, pairs of a stage and its width, hands them
    to its head in this order.
    """
    pooled, done = [], 0
    for name in names:
        end = _index(name, model.stages) + 1
        x, done = _run(model, x, model.stages[done:end]), end
        pooled.append(pool(x))
    return pooled


def pool(activations: PyTree) -> jax.Array:
    """Returns the mean over all axes but the first and the last, of texts over the tokens that are not padding."""
    if isinstance(activations, Mapping):
        weights = activations["mask"][..., None].astype(activations["hidden"].dtype)
        return jnp.sum(activations["hidden"] * weights, axis=1) / jnp.maximum(jnp.sum(weights, axis=1), 1)
    return jnp.mean(activations, axis=tuple(range(1, activations.ndim - 1)))


def _run(model: Any, x: PyTree, names_of_all: Sequence[str]) -> PyTree:
    again = _rematerialised(model)
    for parent, group in itertools.groupby(names_of_all, key=lambda name: name.rpartition("/")[0]):
        names = list(group)
        if parent and getattr(model, "scan", False):
            cuts = tuple(index for index, name in enumerate(names) if name in getattr(model, "cuts", ()))
            remat = tuple(name in again for name in names)
            x = scan_blocks([stage(model, name) for name in names], x, cuts=cuts, remat=remat)
            continue
        for name in names:
            part = stage(model, name)
            for block in part if isinstance(part, nnx.List) else (part,):
                x = run_again(block, x) if name in again and isinstance(block, nnx.Module) else block(x)
    return x


def _rematerialised(model: Any) -> tuple[str, ...]:
    """Returns the stages whose blocks run again in the backward pass; the head's would run again at once."""
    first = getattr(model, "remat", None)
    return () if first is None else model.stages[_index(first, model.stages) : -1]


def stage(model: Any, name: str) -> Any:
    """Returns the part of a model that a stage names."""
    part = model
    for fragment in name.split("/"):
        part = part[int(fragment)] if isinstance(part, nnx.List) else getattr(part, fragment)
    return part


def pack(activations: PyTree) -> dict[str, Any]:
    """Returns activations as the entries of a batch: `features`, or `features/NAME` for each of several."""
    if isinstance(activations, Mapping):
        return {f"{FEATURES}/{name}": value for name, value in activations.items()}
    return {FEATURES: activations}


def unpack(batch: Mapping[str, Any]) -> PyTree:
    """Returns the activations that `pack` put into a batch, None where there are none."""
    if FEATURES in batch:
        return batch[FEATURES]
    prefix = f"{FEATURES}/"
    return {name.removeprefix(prefix): value for name, value in batch.items() if name.startswith(prefix)} or None


def stage_of(path: Path, stages: tuple[str, ...]) -> str | None:
    """Returns the stage that a parameter path lies in, None where it lies in none."""
    return next((name for name in stages if path == name or path.startswith(name + "/")), None)


def _index(name: str, stages: tuple[str, ...]) -> int:
    if name not in stages:
        raise paths.unknown("stage", name, stages)
    return stages.index(name)
