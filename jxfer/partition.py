"""Partitions: labels over a model's variables, and what follows from them - masks, split, merge, modes, audit, table.

A parameter's label comes from the rules. What is not a parameter follows its layer, the smallest enclosing module that
has parameters: normalisation statistics move only where the whole layer trains, random keys wherever any of it does.
"""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
import optax
from flax import nnx

from jxfer import distributed, paths
from jxfer.config import Group
from jxfer.models.stages import stage_of
from jxfer.typing import Arrays, InputError, Path, PyTree, Rules

FROZEN = "frozen"

STATISTICS = "statistics"
"""The label of normalisation statistics that are estimated anew whatever their layers do."""

Kind = Literal["parameter", "statistic", "random"]
Keys = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One variable of a model and its label; `keys` is its path as NNX spells it."""

    path: Path
    keys: Keys
    shape: tuple[int, ...]
    dtype: str
    kind: Kind
    label: str

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def moves(self) -> bool:
        """Whether training changes it."""
        return self.label != FROZEN

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: to kernels and embeddings, not to biases and norms."""
        return self.moves and self.kind == "parameter" and len(self.shape) > 1


@dataclasses.dataclass(frozen=True)
class Audit:
    """What moved over a phase: `leaks` should not have, `stuck` should."""

    leaks: tuple[Path, ...]
    stuck: tuple[Path, ...]
    trainable_total: int

    @property
    def ok(self) -> bool:
        """Whether what is frozen is bit-identical and deterministic, and every trainable leaf moved."""
        return not self.leaks and not self.stuck

    def to_json(self) -> dict[str, Any]:
        """Returns the audit as the results record it."""
        moved = self.trainable_total - len(self.stuck)
        return {
            "frozen_unchanged": not self.leaks,
            "trainable_moved": moved,
            "trainable_total": self.trainable_total,
        }

    def __str__(self) -> str:
        parts = [f"frozen but changed or not deterministic: {', '.join(self.leaks[:3])}"] if self.leaks else []
        parts += [f"trainable but never moved: {', '.join(self.stuck[:3])}"] if self.stuck else []
        return "; ".join(parts) or f"frozen unchanged, all {self.trainable_total} trainable leaves moved"


@dataclasses.dataclass(frozen=True)
class Partition:
    """The labels of one phase over every variable of a model. Compares and hashes by value."""

    leaves: tuple[Leaf, ...]
    groups: tuple[tuple[str, Group], ...] = ()
    statistics: bool = False
    """Whether all normalisation statistics move."""

    @classmethod
    def of(
        cls,
        model: nnx.Module,
        rules: Rules,
        *,
        groups: Mapping[str, Group] | None = None,
        statistics: bool = False,
    ) -> "Partition":
        """Labels a model, real or abstract (`nnx.eval_shape`).

        Args:
          model: any NNX module.
          rules: pattern -> label; the label `frozen` is reserved for what does not train.
          groups: label -> how it trains, for the labels that differ from `Group()`.
          statistics: whether the normalisation statistics of frozen layers move too.

        Raises:
          InputError: a parameter no rule covers, a rule that decides nothing, a group for a label that is not there.
        """
        variables = _variables(model)
        labels = paths.match_rules([path for path, _, kind, _ in variables if kind == "parameter"], rules)
        groups = dict(groups or {})
        for name in groups:
            if name not in labels.values():
                raise paths.unknown("label in groups:", name, dict.fromkeys(labels.values()))
        leaves = tuple(
            Leaf(path, keys, tuple(value.shape), str(value.dtype), kind, _label(path, keys, kind, labels, statistics))
            for path, keys, kind, value in variables
        )
        return cls(leaves, tuple(sorted(groups.items())), statistics)

    @property
    def labels(self) -> dict[Path, str]:
        """Path -> label of every parameter."""
        return {leaf.path: leaf.label for leaf in self.leaves if leaf.kind == "parameter"}

    @property
    def trainable(self) -> tuple[Leaf, ...]:
        """The parameters that train."""
        return tuple(leaf for leaf in self.leaves if leaf.kind == "parameter" and leaf.moves)

    @property
    def params_total(self) -> int:
        """Number of parameter elements, frozen and trainable."""
        return sum(leaf.count for leaf in self.leaves if leaf.kind == "parameter")

    @property
    def params_trainable(self) -> int:
        """Number of parameter elements that train."""
        return sum(leaf.count for leaf in self.trainable)

    def group(self, label: str) -> Group:
        """Returns how the parameters of a label train."""
        return dict(self.groups).get(label, Group())

    def mask(self, *labels: str) -> Callable[[PyTree], PyTree]:
        """Returns a function from any tree of this model's parameters to the same tree of booleans.

        It serves as the mask of `optax.masked`, `optax.add_decayed_weights` and others, on nested dicts, flat dicts
        and `nnx.State` alike. Mind that `optax.masked` passes the updates outside the mask through unchanged: to
        freeze, train only what `split` returns, or use `optimizer`.

        Raises:
          InputError: a label no parameter has.
        """
        if not labels:
            raise InputError(f"mask() needs a label; there are: {', '.join(dict.fromkeys(self.labels.values()))}")
        for label in labels:
            if label not in self.labels.values():
                raise paths.unknown("label", label, dict.fromkeys(self.labels.values()))
        return _Labels(tuple(self.labels.items()), labels)

    def optimizer(self, transforms: Mapping[str, optax.GradientTransformation]) -> optax.GradientTransformation:
        """Returns one transform that applies to each label its own; frozen leaves, where given, stay still.

        It works on what trains alone (as `init_state` uses it, with no state for anything frozen) and on full trees.

        Raises:
          InputError: a trainable label without a transform, or a transform for a label that is not there.
        """
        needed = {leaf.label for leaf in self.trainable}
        for label in sorted(needed - set(transforms)):
            raise InputError(f"no transform for label `{label}`; given: {', '.join(sorted(transforms))}")
        for label in sorted(set(transforms) - needed):
            raise paths.unknown("label with a transform:", label, sorted(needed))
        return optax.partition({**transforms, FROZEN: optax.set_to_zero()}, _Labels(tuple(self.labels.items())))

    def split(self, arrays: Mapping[Path, Any]) -> tuple[Arrays, Arrays]:
        """Splits a flat dict of all variables into what moves and what is frozen; `merge` is the inverse."""
        paths.check_same(arrays, {leaf.path: leaf for leaf in self.leaves}, what="split")
        moving = {leaf.path: arrays[leaf.path] for leaf in self.leaves if leaf.moves}
        return moving, {leaf.path: arrays[leaf.path] for leaf in self.leaves if not leaf.moves}

    def merge(self, moving: Mapping[Path, Any], frozen: Mapping[Path, Any]) -> Arrays:
        """Joins the halves of `split`.

        Raises:
          InputError: a path in both halves, in neither, on the wrong side, or of another shape than the model's.
        """
        for leaf in self.leaves:
            if (leaf.path in moving) != leaf.moves or (leaf.path in frozen) == leaf.moves:
                raise InputError(
                    f"merge: `{leaf.path}` belongs to the {'moving' if leaf.moves else 'frozen'} half alone"
                )
        merged = {**moving, **frozen}
        paths.check_same(merged, {leaf.path: leaf for leaf in self.leaves}, what="merge")
        return {leaf.path: merged[leaf.path] for leaf in self.leaves}

    def assemble(self, graphdef: nnx.GraphDef, arrays: Mapping[Path, Any]) -> nnx.Module:
        """Returns the module with these arrays, compared by path and shape first because `nnx.merge` is positional."""
        paths.check_same(arrays, {leaf.path: leaf for leaf in self.leaves}, what="assemble")
        return nnx.merge(graphdef, nnx.from_flat_state([(leaf.keys, arrays[leaf.path]) for leaf in self.leaves]))

    def train_graphdef(self, model: nnx.Module) -> nnx.GraphDef:
        """Returns the structure for training: frozen layers normalise by their statistics and drop nothing out."""
        labels = self.labels
        view: Any = _copy(model)
        for keys, module in nnx.iter_modules(view):
            _set_mode(module, *_modes(keys, labels, self.statistics))
        if getattr(view, "scan", False):
            view.cuts = self._cuts(view.stages)
        return nnx.graphdef(view)

    def _cuts(self, stages: Sequence[str]) -> tuple[str, ...]:
        """Returns the stages whose labels differ from those of the stage before: a loop over blocks must not cross."""
        labels: dict[str | None, set[str]] = {}
        for path, label in self.labels.items():
            labels.setdefault(stage_of(path, tuple(stages)), set()).add(label)
        pairs = itertools.pairwise(stages)
        return tuple(stage for before, stage in pairs if labels.get(before) != labels.get(stage))

    def random_modules(self, graphdef: nnx.GraphDef) -> tuple[Path, ...]:
        """Returns the modules of frozen layers that are not in inference mode in `graphdef`: there should be none."""
        return self._random(self._modules(graphdef))

    def audit(self, before: Mapping[Path, str], after: Mapping[Path, str], graphdef: nnx.GraphDef) -> Audit:
        """Compares the fingerprints of all variables at the start and at the end of a phase.

        A parameter that a module lists as `without_effect` has no gradient but rounding, and need not move.
        """
        leaks = [leaf.path for leaf in self.leaves if not leaf.moves and before[leaf.path] != after[leaf.path]]
        modules = self._modules(graphdef)
        idle = {
            "/".join(map(str, (*keys, name))) for keys, each in modules for name in getattr(each, "without_effect", ())
        }
        expected = [leaf.path for leaf in self.trainable if leaf.path not in idle]
        stuck = [path for path in expected if before[path] == after[path]]
        return Audit((*leaks, *self._random(modules)), tuple(stuck), len(expected))

    def _random(self, modules: Sequence[tuple[Keys, Any]]) -> tuple[Path, ...]:
        labels = self.labels
        return tuple(
            "/".join(map(str, keys)) for keys, each in modules if _breaks(each, *_modes(keys, labels, self.statistics))
        )

    def _modules(self, graphdef: nnx.GraphDef) -> list[tuple[Keys, Any]]:
        """Returns the modules of a structure by the keys that lead to them."""
        template: list[Any] = [(leaf.keys, jax.ShapeDtypeStruct(leaf.shape, np.float32)) for leaf in self.leaves]
        return list(nnx.iter_modules(nnx.merge(graphdef, nnx.from_flat_state(template))))

    def __str__(self) -> str:
        rows = [("path", "shape", "dtype", "count", "label", "rate ×", "decay ×")]
        for leaf in self.leaves:
            rate, decay = self.scales(leaf)
            shape = "×".join(map(str, leaf.shape)) or "scalar"
            rows.append((leaf.path, shape, leaf.dtype, f"{leaf.count:,}", leaf.label, f"{rate:g}", f"{decay:g}"))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, f"{self.params_trainable:,} of {self.params_total:,} parameters train"])

    def scales(self, leaf: Leaf) -> tuple[float, float]:
        """Returns the factors of the run's learning rate and weight decay for a leaf; 0 where they do not apply."""
        if not leaf.moves or leaf.kind != "parameter":
            return 0.0, 0.0
        group = self.group(leaf.label)
        return group.learning_rate_scale, group.weight_decay_scale if leaf.decays else 0.0


def arrays_of(model: nnx.Module) -> Arrays:
    """Returns all variables of a model as a flat dict; the arrays are shared with the model, not copied."""
    return {path: value for path, _, _, value in _variables(model)}


def eval_graphdef(model: nnx.Module) -> nnx.GraphDef:
    """Returns the structure for inference: every layer normalises by its statistics and drops nothing out."""
    view = _copy(model)
    for _, module in nnx.iter_modules(view):
        _set_mode(module, True, True)
    return nnx.graphdef(view)


def frozen_boundary(partition: Partition, stages: Sequence[str]) -> str | None:
    """Returns the first stage with anything trainable or random; None where nothing before it could be stored.

    That is where it is the model's first stage, where nothing moves, or where something outside all stages does.
    """
    moving = {stage_of(leaf.path, tuple(stages)) for leaf in partition.leaves if leaf.moves}
    first = next((stage for stage in stages if stage in moving), None)
    return None if None in moving or first in stages[:1] else first


def fingerprint(arrays: Mapping[Path, Any]) -> dict[Path, str]:
    """Returns a hash of the bits of each array; equal exactly where dtype, shape and every bit are.

    It does not depend on where the array lies; where that is in several processes, all of them must call this.
    """
    return {path: _digest(value) for path, value in arrays.items()}


@dataclasses.dataclass(frozen=True)
class _Labels:
    """Maps a tree of parameters to their labels or, with `selected`, to whether the label is one of these."""

    labels: tuple[tuple[Path, str], ...]
    selected: tuple[str, ...] = ()

    def __call__(self, tree: PyTree) -> PyTree:
        by_path = dict(self.labels)

        def label(path: Path, _: Any) -> Any:
            if path not in by_path:
                raise InputError(
                    f"the tree has `{path}`, the partition does not; nearest: {paths.nearest(path, by_path)}"
                )
            return by_path[path] in self.selected if self.selected else by_path[path]

        return paths.map_with_paths(label, tree)


def _variables(model: nnx.Module) -> list[tuple[Path, Keys, Kind, Any]]:
    found = []
    for keys, variable in nnx.to_flat_state(nnx.state(model)):
        found.append(("/".join(map(str, keys)), keys, _kind(variable), _value(variable)))
    return found


def _value(variable: Any) -> Any:
    return variable.get_value() if isinstance(variable, nnx.Variable) else variable  # a module may hold bare arrays


def _kind(variable: Any) -> Kind:
    if isinstance(variable, nnx.Param):
        return "parameter"
    return "random" if isinstance(variable, nnx.RngState) else "statistic"


def _layer_labels(keys: Keys, labels: Mapping[Path, str]) -> set[str]:
    """Returns the labels in the smallest module around `keys` that has parameters."""
    for depth in range(len(keys), -1, -1):
        prefix = "/".join(map(str, keys[:depth]))
        if found := {label for path, label in labels.items() if not prefix or path.startswith(prefix + "/")}:
            return found
    return set()


def _follow(keys: Keys, kind: Kind, labels: Mapping[Path, str]) -> str:
    found = _layer_labels(keys[:-1], labels)
    moving = sorted(found - {FROZEN})
    if not moving or (kind == "statistic" and FROZEN in found):
        return FROZEN
    return moving[0]


def _label(path: Path, keys: Keys, kind: Kind, labels: Mapping[Path, str], statistics: bool) -> str:
    own = labels.get(path) or _follow(keys, kind, labels)
    return STATISTICS if statistics and kind == "statistic" and own == FROZEN else own


def _modes(keys: Keys, labels: Mapping[Path, str], statistics: bool) -> tuple[bool, bool]:
    """Returns whether a module is deterministic and whether it uses running averages while its partition trains."""
    averages = not statistics and _follow((*keys, ""), "statistic", labels) == FROZEN
    return _follow((*keys, ""), "random", labels) == FROZEN, averages


def _breaks(module: nnx.Module, deterministic: bool, use_running_average: bool) -> bool:
    """Tells whether a module is in training mode where it should not be."""
    return (deterministic and getattr(module, "deterministic", None) is False) or (
        use_running_average and getattr(module, "use_running_average", None) is False
    )


def _set_mode(module: nnx.Module, deterministic: bool, use_running_average: bool) -> None:
    if hasattr(module, "deterministic"):
        module.deterministic = deterministic
    if hasattr(module, "use_running_average"):
        module.use_running_average = use_running_average


def _copy(model: nnx.Module) -> nnx.Module:
    """Returns another module over the same arrays, so that setting its modes leaves the caller's alone."""
    return nnx.merge(*nnx.split(model))


def _digest(value: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for leaf in jax.tree.leaves(value):  # of what is held in fewer bits there are two
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        digest.update(f"{leaf.dtype}{leaf.shape}".encode())
        digest.update(np.ascontiguousarray(distributed.fetch(leaf)).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
