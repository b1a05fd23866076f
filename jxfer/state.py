"""What flows through the step: the state that moves, the fixed part that does not, and many variants as one."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jxfer.config import FrozenDType, MeshConfig
from jxfer.partition import Partition, arrays_of, eval_graphdef
from jxfer.rounding import expand, hold
from jxfer.sharding import check_heads, param_specs, place, put, state_shardings
from jxfer.typing import Arrays, PyTree

STACKED = ("params", "variables", "opt_state", "ema")
"""The parts of the state that each variant of a population has for itself."""


@dataclasses.dataclass(frozen=True, eq=False)
class Definition:
    """The code of a phase: structures for training and inference, the labels, the optimizer, where the state lives.

    Equal definitions are one object (`_define`), so that jit compares them by identity at every call.
    """

    partition: Partition
    train_graphdef: nnx.GraphDef
    eval_graphdef: nnx.GraphDef
    tx: optax.GradientTransformation
    shardings: tuple[jax.sharding.Sharding, ...] = ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What moves: trainable parameters, moving statistics and random keys, optimizer state, average, step, key."""

    step: PyTree
    params: PyTree
    variables: PyTree
    opt_state: PyTree
    ema: PyTree
    key: PyTree
    skipped: PyTree = dataclasses.field(default_factory=dict)
    """Where such steps are skipped, how many were not finite: `in_a_row` up to now, and in `total`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fixed:
    """What does not: frozen parameters and statistics, the pretrained reference of penalties, the definition.

    A value of `params` is an array, or a `rounding.Held` that stands for one.
    """

    params: PyTree
    variables: PyTree
    reference: PyTree
    definition: Definition = dataclasses.field(metadata={"static": True})
    numbers: PyTree = dataclasses.field(default_factory=dict)
    """Settings that differ between the variants of a population: `label_smoothing`, `penalty_weight`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Population:
    """What moves in V variants that train as one: `state` stacked on a leading axis, but for its step and key."""

    state: PyTree
    alive: PyTree
    """[V] bool: whether every loss and gradient norm was finite so far; what is not alive moves no more."""

    @property
    def step(self) -> PyTree:
        """How many updates it has taken."""
        return self.state.step


def init_state(
    model: nnx.Module,
    partition: Partition,
    tx: optax.GradientTransformation,
    *,
    key: jax.Array | None = None,
    ema: bool = False,
    skips: bool = False,
    reference: tuple[str, ...] = (),
) -> tuple[TrainState, Fixed]:
    """Splits a model once, before the loop. What moves is copied, so the caller's model survives the donation.

    Args:
      model: any NNX module; `partition` was made from it or from one of the same structure.
      partition: the labels of the phase.
      tx: any Optax transform over the flat dict of trainable parameters, such as `partition.optimizer(...)`.
      key: for augmentation; `jax.random.key(0)` when None.
      ema: whether to keep an average of the trainable parameters.
      skips: whether to count steps that are skipped because they are not finite.
      reference: paths whose starting values penalties will need.
    """
    moving, frozen = partition.split(arrays_of(model))
    definition = _define(partition, partition.train_graphdef(model), eval_graphdef(model), tx)
    state, fixed = _begin(definition, jax.tree.map(jnp.copy, moving), frozen, tx.init, key, ema, reference)
    skipped = {name: jnp.zeros((), jnp.int32) for name in ("in_a_row", "total")} if skips else {}
    return dataclasses.replace(state, skipped=skipped), fixed


def hold_frozen(fixed: Fixed, dtype: FrozenDType) -> Fixed:
    """Returns the fixed part with frozen kernels and embeddings rounded to a type of fewer bits; see `rounding.hold`.

    The step expands them where it uses them. It works on arrays and on their shapes.
    """
    held = hold(fixed.params, dtype)
    held = jax.tree.map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf, held)
    return dataclasses.replace(fixed, params=held)


def place_state(
    state: TrainState, fixed: Fixed, mesh: jax.sharding.Mesh, config: MeshConfig
) -> tuple[TrainState, Fixed]:
    """Puts the state and the frozen part onto a mesh by the placement rules of each; the step keeps them there."""
    params = {**state.params, **fixed.params}  # rules are judged against the whole model, not against one phase's part
    specs = param_specs(params, config.trainable, mesh)
    shardings = state_shardings(state, specs, mesh)
    placed = _place_fixed(fixed, params, mesh, config, shardings)
    reference = put(fixed.reference, state_shardings(fixed.reference, specs, mesh))
    return place(state, shardings), dataclasses.replace(placed, reference=reference)


def place_population(
    population: Population, fixed: Fixed, mesh: jax.sharding.Mesh, config: MeshConfig, *, spread: bool
) -> tuple[Population, Fixed]:
    """Puts a population and the frozen part onto a mesh; the step keeps them there.

    Args:
      population: from `stack_population`.
      fixed: its `reference` and `numbers` have the axis of variants too.
      mesh: where to.
      config: the placement rules, of which those of the frozen part apply.
      spread: whether the variants are divided over the `data` axis, which must divide their number, so that every
        device needs the whole batch; otherwise each device holds all variants and may have its share of the batch.
    """
    axis = NamedSharding(mesh, PartitionSpec("data") if spread else PartitionSpec())
    whole = NamedSharding(mesh, PartitionSpec())
    state = jax.tree.map(lambda _: axis, population.state)
    state = dataclasses.replace(state, step=whole, key=whole)
    shardings = Population(state, axis)
    params = {**population.state.params, **fixed.params}
    placed = _place_fixed(fixed, params, mesh, config, shardings)
    numbers, reference = (put(tree, axis) for tree in (fixed.numbers, fixed.reference))
    return place(population, shardings), dataclasses.replace(placed, numbers=numbers, reference=reference)


def merge_state(state: TrainState, fixed: Fixed) -> Arrays:
    """Returns all variables of the model as one flat dict, the average in place of the parameters where one is kept."""
    moving = {**state.params, **state.ema, **state.variables}
    return fixed.definition.partition.merge(moving, {**expand(fixed.params), **fixed.variables})


def init_population(
    models: Sequence[nnx.Module],
    partition: Partition,
    tx: optax.GradientTransformation,
    *,
    key: jax.Array | None = None,
    ema: bool = False,
    reference: tuple[str, ...] = (),
    multiple: int = 1,
) -> tuple[Population, Fixed]:
    """Splits the models of several variants once, before the loop; see `init_state` for the other arguments.

    Args:
      models: of one structure, one for each variant; what is frozen is that of the first.
      partition: the labels of the phase.
      tx: as for one; hyperparameters in its state can be set to [V] arrays afterwards.
      key: shared, so that all variants see the same augmented images.
      ema: whether to keep averages.
      reference: paths whose starting values penalties will need.
      multiple: copies of the last variant fill the population up to a multiple of it.
    """
    models = [*models, *[models[-1]] * (-len(models) % multiple)]
    # Once for all variants that begin from the same model: taking a model apart takes longer than a step.
    distinct = {id(model): model for model in models}
    moving, (frozen, *_) = zip(*(partition.split(arrays_of(model)) for model in distinct.values()), strict=True)
    rows = np.array([list(distinct).index(id(model)) for model in models])
    stacked = jax.tree.map(lambda leaf: leaf[rows], stack(moving))
    definition = _define(partition, partition.train_graphdef(models[0]), eval_graphdef(models[0]), tx)
    state, fixed = _begin(definition, stacked, frozen, jax.vmap(tx.init), key, ema, reference)
    return Population(state, jnp.ones(len(models), bool)), fixed


def stack(trees: Sequence[PyTree]) -> PyTree:
    """Returns one tree whose leaves have a leading axis over those of equal trees."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def member(population: Population, index: int) -> TrainState:
    """Returns one variant of a population."""
    parts = pick({name: getattr(population.state, name) for name in STACKED}, index)
    return dataclasses.replace(population.state, **parts)


@jax.jit
def pick(stacked: PyTree, index: int | jax.Array) -> PyTree:
    """Returns what a stacked tree holds of one variant; one program picks any of them."""
    return jax.tree.map(lambda x: x[index], stacked)


def _begin(
    definition: Definition,
    moving: Arrays,
    frozen: Arrays,
    init: Callable[[Arrays], PyTree],
    key: jax.Array | None,
    ema: bool,
    reference: tuple[str, ...],
) -> tuple[TrainState, Fixed]:
    """Returns what moves, which is donated and so nobody else's, under a fresh optimizer state, and what does not."""
    kinds = {leaf.path: leaf.kind for leaf in definition.partition.leaves}
    params, variables = _by_kind(moving, kinds)
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        variables=variables,
        opt_state=jax.tree.map(jnp.copy, init(params)),  # some keep the parameters themselves: both are donated
        ema=jax.tree.map(jnp.copy, params) if ema else {},
        key=jnp.copy(jax.random.key(0) if key is None else key),
    )
    start = {path: jnp.copy(params[path]) for path in reference if path in params}
    return state, Fixed(*_by_kind(frozen, kinds), start, definition)


@functools.lru_cache(maxsize=512)
def _define(*code: Any) -> Definition:
    return Definition(*code)


def _place_fixed(fixed: Fixed, params: Arrays, mesh: jax.sharding.Mesh, config: MeshConfig, shardings: PyTree) -> Fixed:
    """Places what is frozen, and remembers where the state lives; `params` are those of the whole model."""
    old = fixed.definition
    _check_heads(old, config)
    specs = param_specs(params, config.frozen, mesh)
    leaves = tuple(jax.tree.leaves(shardings))
    return dataclasses.replace(
        fixed,
        params=put(fixed.params, state_shardings(fixed.params, specs, mesh)),
        variables=put(fixed.variables, state_shardings(fixed.variables, {}, mesh)),
        definition=_define(old.partition, old.train_graphdef, old.eval_graphdef, old.tx, leaves),
    )


def _check_heads(definition: Definition, config: MeshConfig) -> None:
    if config.model == 1:
        return
    shapes = {leaf.path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for leaf in definition.partition.leaves}
    model = definition.partition.assemble(definition.eval_graphdef, shapes)
    for rules in (config.frozen, config.trainable):
        check_heads(model, rules, config.model)


def _by_kind(arrays: Arrays, kinds: Mapping[str, str]) -> tuple[Arrays, Arrays]:
    params = {path: value for path, value in arrays.items() if kinds[path] == "parameter"}
    return params, {path: value for path, value in arrays.items() if path not in params}
