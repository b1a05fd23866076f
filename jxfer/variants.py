"""The settings that a search tries for a method, and which of them train together as one population."""

import dataclasses
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jxfer import distributed
from jxfer.config import Experiment, Method, SearchConfig, TrainConfig
from jxfer.cost import Cost
from jxfer.partition import Partition
from jxfer.typing import InputError

MEMORY_SHARE = 0.5
"""Of a device's memory, how much the variants of a population may take."""

_CONVOLUTION_NDIM = 4


@dataclasses.dataclass(frozen=True)
class Variant:
    """One setting of a method."""

    name: str
    train: TrainConfig
    method: Method
    """With the variant's penalty weight and adapter scale."""
    head_seed: int | None = None
    """Of the random weights that surgeries bring; None is the run's own seed."""


@dataclasses.dataclass(frozen=True)
class PlannedPopulation:
    """How many variants train a phase together, one part after the other."""

    parts: tuple[int, ...]
    """Sizes; all 1 where each variant trains alone."""
    why: str
    bytes_each: int = 0
    """What a variant adds to what a device holds; 0 where each trains alone."""
    cost: Cost | None = None
    """Of one step of one variant; None where each trains alone."""

    def to_json(self) -> dict[str, Any]:
        """Returns what plans and results record."""
        return {"parts": list(self.parts), "why": self.why, "bytes_each": self.bytes_each}

    def __str__(self) -> str:
        count = sum(self.parts)
        if max(self.parts) == 1:
            return f"{count}, one after the other: {self.why}" if count > 1 else "1"
        return f"{count} train as one, {self.bytes_each:,} bytes each: {self.why}"


def variants(experiment: Experiment, method: Method) -> tuple[Variant, ...]:
    """Returns what the search tries for a method: each combination of its values, or as many random ones as it says.

    What a method has nothing of is not varied: penalty weights without penalties, adapter scales without adapters, and
    nothing at all where no parameter takes steps. A random search draws the same settings for every method.

    Raises:
      InputError: a penalty weight is searched, and a penalty of the method has none.
    """
    stepping = any(phase.train and phase.solver is None for phase in method.phases)
    tried = {name: getattr(experiment.search, name) for name in SEARCHED} if stepping else {}
    tried = {name: values for name, values in tried.items() if values}
    if not method.penalties:
        tried.pop("penalty_weight", None)
    if not any(hasattr(surgery, "adapter_scale") for surgery in method.surgeries):
        tried.pop("adapter_scale", None)
    if not tried:
        return (Variant("default", experiment.train, method),)
    settings = _grid(tried) if experiment.search.samples is None else _random(tried, experiment.search)
    found = (_variant(experiment, method, values) for values in settings)
    return tuple({variant.name: variant for variant in found}.values())


SEARCHED = ("learning_rate", "weight_decay", "label_smoothing", "penalty_weight", "head_seed", "adapter_scale")
"""The fields of `SearchConfig` that hold values to try."""


def why_not_together(partition: Partition, boundary: str | None, moved_before: frozenset[str]) -> str | None:
    """Returns why the variants of a phase cannot train as one population, None where they can.

    Args:
      partition: of the phase.
      boundary: its frozen boundary.
      moved_before: paths in which variants differ, as they begin so or earlier phases trained them.
    """
    trainable = partition.trainable
    if not trainable:
        return "nothing takes steps"
    if boundary is None and partition.params_trainable > partition.params_total / 2:
        return "most parameters train, so that little could be shared"
    kernels = [leaf for leaf in trainable if len(leaf.shape) >= _CONVOLUTION_NDIM]
    if sum(leaf.count for leaf in kernels) > partition.params_trainable / 2:
        # Measured on a CPU: gradients of stacked 3×3 kernels take 3 to 5 times as long as one after the other. The
        # patches of a vision transformer are a convolution too, but hardly any of the work.
        return f"convolutions such as `{kernels[0].path}` are faster one after the other"
    moves = {leaf.path for leaf in partition.leaves if leaf.moves}
    if differing := sorted(moved_before - moves):
        return f"they differ in what is frozen now, such as `{differing[0]}`"
    return None


def parts_of(num_variants: int, *, bytes_each: int, memory: int | None, most: int | None) -> tuple[int, ...]:
    """Returns into how many variants each a population is split so that each part fits; sizes differ by at most one.

    Args:
      num_variants: of the population.
      bytes_each: what a variant takes on a device.
      memory: what they may take together; None where that is not known.
      most: the largest part that the user allows.
    """
    fits = num_variants if memory is None else max(memory // max(bytes_each, 1), 1)
    largest = min(num_variants, fits, num_variants if most is None else most)
    num_parts = -(-num_variants // largest)
    return tuple(len(part) for part in np.array_split(np.arange(num_variants), num_parts))


def device_memory() -> int | None:
    """Returns the bytes that a population may take on a device; of a CPU its share of the machine's memory."""
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is None and device.platform == "cpu" and hasattr(os, "sysconf"):
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(jax.local_devices())
    # Machines may differ a little, and all processes must split a population alike.
    return distributed.on_main(lambda: None if limit is None else int(limit * MEMORY_SHARE))


def _grid(tried: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(tried, values, strict=True)) for values in itertools.product(*tried.values())]


def _random(tried: Mapping[str, Sequence[Any]], search: SearchConfig) -> list[dict[str, Any]]:
    """Draws settings (Bergstra & Bengio 2012, JMLR 13): random search finds as good ones with fewer trials."""
    assert search.samples is not None
    # A stream for each setting, so that what is drawn of one does not depend on which others are searched.
    columns = {name: _draw(name, tried[name], search.samples) for name in tried}
    return [{name: columns[name][i] for name in tried} for i in range(search.samples)]


def _draw(name: str, values: Sequence[Any], count: int) -> list[Any]:
    """Draws numbers between the smallest and the largest value, log-uniformly where all are positive."""
    rng = np.random.default_rng([0, SEARCHED.index(name)])
    if name == "head_seed":
        return [int(value) for value in rng.choice(np.asarray(values), count)]
    low, high = min(values), max(values)
    if low > 0:
        return [float(value) for value in np.exp(rng.uniform(np.log(low), np.log(high), count))]
    return [float(value) for value in rng.uniform(low, high, count)]


def _variant(experiment: Experiment, method: Method, values: Mapping[str, Any]) -> Variant:
    name = ",".join(f"{field}={value:g}" for field, value in values.items())
    train_fields = {field.name for field in dataclasses.fields(TrainConfig)}
    train = dataclasses.replace(
        experiment.train, **{field: value for field, value in values.items() if field in train_fields}
    )
    if "penalty_weight" in values:
        penalties = tuple(_weighted(penalty, values["penalty_weight"], method.name) for penalty in method.penalties)
        method = dataclasses.replace(method, penalties=penalties)
    if "adapter_scale" in values:
        surgeries = tuple(_scaled(surgery, values["adapter_scale"]) for surgery in method.surgeries)
        method = dataclasses.replace(method, surgeries=surgeries)
    return Variant(name, train, method, values.get("head_seed"))


def _scaled(surgery: Any, scale: float) -> Any:
    return dataclasses.replace(surgery, adapter_scale=scale) if hasattr(surgery, "adapter_scale") else surgery


def _weighted(penalty: Any, weight: float, method: str) -> Any:
    if not hasattr(penalty, "weight"):
        kind = type(penalty).__name__
        raise InputError(f"search.penalty_weight is given, but penalty {kind} of method `{method}` has no `weight`")
    return dataclasses.replace(penalty, weight=weight)
