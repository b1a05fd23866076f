"""A method's phases resolved against a model: whose labels train where, at which rates, and what could be stored."""

import dataclasses
from collections.abc import Sequence

from flax import nnx

from jxfer import models, paths
from jxfer.config import Experiment, Method, Phase
from jxfer.partition import FROZEN, Leaf, Partition, frozen_boundary
from jxfer.sharding import check_placement
from jxfer.typing import InputError
from jxfer.variants import why_not_together

_SOLVED = "solved once for all that begin alike"


@dataclasses.dataclass(frozen=True)
class PlannedPhase:
    """A phase resolved against a model."""

    phase: Phase
    num_steps: int
    partition: Partition
    boundary: str | None
    """The first stage that is not frozen; None where nothing before it could be stored."""
    stored: bool
    """Whether the phase trains on stored activations before `boundary`."""
    why: str
    first_trained: str | None = None
    """The first stage with a parameter that trains, where the backward pass ends; None where no stage has one."""
    apart: str | None = None
    """Why variants cannot train this phase as one population; None where they can."""


def plan_phases(experiment: Experiment, method: Method, model: nnx.Module) -> tuple[PlannedPhase, ...]:
    """Resolves a method's phases against a model, real or abstract.

    Raises:
      InputError: the rules do not fit the model, or a phase trains a label that no parameter has.
    """
    check_placement(model, experiment.mesh)
    stages = tuple(getattr(model, "stages", ()))
    layers = _layers(model, stages)
    rules = [(each, label) for pattern, label in method.rules for each in _resolve(pattern, model, layers)]
    ends = [
        round(sum(phase.part for phase in method.phases[: i + 1]) * experiment.train.num_steps)
        for i in range(len(method.phases))
    ]
    planned: list[PlannedPhase] = []
    moved = _begin_apart(experiment, method, model)
    for phase, start, end in zip(method.phases, [0, *ends], ends, strict=False):
        partition = _phase_partition(method, phase, model, rules, layers)
        boundary = frozen_boundary(partition, stages)
        first = _first_trained(partition, stages)
        stored, why = (_feature_choice if phase.solver is None else _solver_choice)(experiment, boundary)
        apart = why_not_together(partition, boundary, moved) if phase.solver is None else _SOLVED
        planned.append(PlannedPhase(phase, end - start, partition, boundary, stored, why, first, apart))
        moved |= {leaf.path for leaf in partition.leaves if leaf.moves and leaf.kind != "random"}
    return tuple(planned)


def _begin_apart(experiment: Experiment, method: Method, model: nnx.Module) -> frozenset[str]:
    """Returns the paths in which the variants of a search may differ before anything has trained."""
    if not (experiment.search.head_seed or experiment.search.adapter_scale):
        return frozenset()
    fresh = [pattern for surgery in method.surgeries for pattern in surgery.fresh]
    leaves = Partition.of(model, [("**", FROZEN)]).leaves
    return frozenset(leaf.path for leaf in leaves if any(paths.match(leaf.path, pattern) for pattern in fresh))


def _first_trained(partition: Partition, stages: tuple[str, ...]) -> str | None:
    trained = {models.stage_of(leaf.path, stages) for leaf in partition.trainable}
    return next((stage for stage in stages if stage in trained or None in trained), None)


def _phase_partition(
    method: Method, phase: Phase, model: nnx.Module, rules: Sequence[tuple[str, str]], layers: Sequence[Sequence[str]]
) -> Partition:
    labels = {label for _, label in rules}
    for label in (*phase.train, *(name for name, _ in phase.groups)):
        if label not in labels:
            raise paths.unknown(f"label in phase `{phase.name}` of method `{method.name}`:", label, sorted(labels))
    phase_rules = [(pattern, label if label in phase.train else FROZEN) for pattern, label in rules]
    groups = {label: group for label, group in phase.groups if label in phase.train}
    partition = Partition.of(model, phase_rules, groups=groups, statistics=phase.statistics)
    if phase.statistics and all(leaf.kind != "statistic" for leaf in partition.leaves):
        name = type(model).__name__
        raise InputError(f"phase `{phase.name}` of method `{method.name}` estimates statistics; {name} keeps none")
    if phase.layer_decay == 1.0:
        return partition
    return _decayed(partition, phase, model, layers)


def _decayed(partition: Partition, phase: Phase, model: nnx.Module, layers: Sequence[Sequence[str]]) -> Partition:
    """Gives each layer a group of its own, whose rate falls with its distance from the head (arXiv:1801.06146)."""
    stages = tuple(stage for layer in layers for stage in layer)
    distance = {stage: len(layers) - 1 - index for index, layer in enumerate(layers) for stage in layer}
    rules, groups = [], {}
    for leaf in partition.leaves:
        stage = models.stage_of(leaf.path, stages)
        if leaf.kind != "parameter":
            continue
        if leaf.label == FROZEN or stage is None:
            rules.append((leaf.path, leaf.label))
            continue
        label = f"{leaf.label}-{distance[stage]}"
        group = partition.group(leaf.label)
        scale = group.learning_rate_scale * phase.layer_decay ** distance[stage]
        groups[label] = dataclasses.replace(group, learning_rate_scale=scale)
        rules.append((leaf.path, label))
    return Partition.of(model, rules, groups=groups, statistics=phase.statistics)


def _layers(model: nnx.Module, stages: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Groups the stages into layers, each a stage with kernels and the norms and poolings that follow it."""
    kernels = {models.stage_of(leaf.path, tuple(stages)) for leaf in _leaves(model) if len(leaf.shape) > 1}
    layers: list[list[str]] = []
    for stage in stages:
        if not layers or (stage in kernels and kernels.intersection(layers[-1])):
            layers.append([])
        layers[-1].append(stage)
    return tuple(map(tuple, layers))


def _leaves(model: nnx.Module) -> list[Leaf]:
    return [leaf for leaf in Partition.of(model, [("**", FROZEN)]).leaves if leaf.kind == "parameter"]


def _resolve(pattern: str, model: nnx.Module, layers: Sequence[Sequence[str]]) -> list[str]:
    """Returns what a rule's pattern stands for: `{last}` is each stage with parameters of the layer before the head."""
    if "{last}" not in pattern:
        return [pattern]
    before_head = [[stage for stage in layer if stage != "head"] for layer in layers]
    last = next((layer for layer in reversed(before_head) if layer), [])
    with_parameters = [stage for stage in last if any(paths.match(leaf.path, f"{stage}/**") for leaf in _leaves(model))]
    if not with_parameters:
        name = type(model).__name__
        raise InputError(f"rule `{pattern}` needs a stage before the head; {name}.stages names none with parameters")
    return [pattern.replace("{last}", stage) for stage in with_parameters]


def _feature_choice(experiment: Experiment, boundary: str | None) -> tuple[bool, str]:
    if boundary is None:
        return False, "online: the first stage trains, so there is no frozen prefix to store"
    if experiment.features == "off":
        return False, "online: features=off"
    once = f"stored: the frozen stages before `{boundary}` run once per example"
    if not experiment.target.augment.active:
        return True, once
    if experiment.views is None:
        return False, "online: every step sees a newly augmented image; views=K would store K views of each"
    return True, f"{once} and view (views={experiment.views})"


def _solver_choice(experiment: Experiment, boundary: str | None) -> tuple[bool, str]:
    if boundary != "head":
        raise InputError(f"a solver finds the head and nothing else, but `{boundary}` would train too; freeze it")
    once = "solved: the frozen stages before `head` run once per example"
    if experiment.features == "off":
        return True, f"{once}, their features kept in memory alone (features=off)"
    if experiment.target.augment.active:
        return True, f"{once}, without augmentation"
    return True, once
