"""Matches the tensors of a file with the leaves of a model: which goes where, how, and what is left over.

Nothing is read here. Whatever does not fit is an error unless a rule of the user expects it. Rules are ordered
`(pattern, action)` pairs, the first match wins: over paths of the model `load` (what holds without a rule), `resize`,
`reinitialise` and `leave`; over names of tensors in the file `skip`, where `*` crosses dots.
"""

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jxfer import paths
from jxfer.typing import InputError, Path, Rules
from jxfer.weights.manifest import LeafRecord, LeafStatus, Manifest, TensorRecord, TensorStatus
from jxfer.weights.naming import Naming, Rule, Same, Squeezed
from jxfer.weights.resize import Grid, Resize
from jxfer.weights.tensors import Rows, Tensor

ACTIONS = ("load", "resize", "reinitialise", "leave")
"""What a rule may do with a path."""

SKIP = "skip"
"""What a rule may do with a tensor."""

Resizes = Sequence[tuple[str, Resize]]
"""Pattern over our paths -> how such a leaf is resized; the first match wins."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Where one leaf comes from: some rows of a tensor, laid out our way and perhaps resized."""

    tensor: Tensor
    rule: Rule
    part: int
    """Which of the equal parts of the tensor's first axis it is."""
    shape: tuple[int, ...]
    """The leaf's shape in our layout, before it is resized."""
    resize: Resize | None = None

    @property
    def rows(self) -> Rows | None:
        """The tensor's rows that hold the leaf; None for all."""
        parts = len(self.rule.paths)
        size = self.tensor.shape[0] // parts if self.tensor.shape else 0
        return None if parts == 1 else (self.part * size, (self.part + 1) * size)

    @property
    def status(self) -> LeafStatus:
        """What the manifest says of the leaf."""
        if self.resize is not None:
            return "resized"
        return "loaded" if isinstance(self.rule.layout, Same | Squeezed) else "transposed"


@dataclasses.dataclass(frozen=True)
class Conversion:
    """The sources of the leaves that come from the file, the leaves that do not, and the record of it all."""

    sources: dict[Path, Source]
    fresh: tuple[Path, ...]
    """Leaves to re-initialise."""
    left: tuple[Path, ...]
    """Leaves of an existing model to leave alone."""
    grid: Grid | None
    manifest: Manifest


def convert(
    tensors: Mapping[str, Tensor],
    namings: Sequence[Naming],
    size: Any,
    expected: Mapping[Path, Any],
    rules: Rules = (),
    *,
    what: str,
    resizes: Resizes = (),
    grid: Grid | None = None,
) -> Conversion:
    """Decides for every leaf and every tensor what becomes of it.

    Args:
      tensors: name -> handle.
      namings: the ways in which the architecture is published; the one that fits most tensors is taken.
      size: the architecture's size, which the namings' rules depend on.
      expected: path -> array or `jax.ShapeDtypeStruct` of every parameter and statistic of the model.
      rules: see the module.
      what: names the weights in errors.
      resizes: how leaves are resized where a rule says `resize`.
      grid: the model's rows and columns of patches; None where they are equally many.

    Raises:
      InputError: the file is of another architecture; a leaf is missing, a tensor unused, a shape does not fit and no
        rule expects it; or a rule matches nothing.
    """
    actions, skipped = _apply(rules, expected, tensors, what)
    wanted = [path for path, action in actions.items() if action in ("load", "resize")]
    naming, found = _choose(tensors, namings, size, expected, wanted, what)
    sources: dict[Path, Source] = {}
    uses: dict[str, tuple[Path, ...]] = {}
    for name, (rule, ours) in found.items():
        uses[name] = tuple(path for path in ours if path in wanted and name not in skipped)
        for part, path in enumerate(ours):
            if path not in uses[name]:
                continue
            if path in sources:
                raise InputError(f"{what}: `{sources[path].tensor.name}` and `{name}` are both for `{path}`; skip one")
            source = Source(tensors[name], rule, part, _shape(tensors[name], rule, path, what))
            sources[path] = _fitted(source, path, actions[path], tuple(expected[path].shape), resizes, what)
    _check_missing(wanted, sources, tensors, naming, size, what)
    explained = {name for name, (_, ours) in found.items() if any(actions.get(path) in _KEPT for path in ours)}
    ignored = {name for name in tensors if name not in found and _matches(name, naming.ignored)}
    _check_unused(
        tensors, {name for name in uses if uses[name]} | explained | skipped | ignored, expected, naming, what
    )
    fresh, left = (tuple(path for path, each in actions.items() if each == action) for action in _KEPT)
    manifest = _manifest(what, naming, expected, sources, left, tensors, uses, ignored)
    return Conversion(sources, fresh, left, grid, manifest)


_KEPT = ("reinitialise", "leave")


def _apply(
    rules: Rules, expected: Mapping[Path, Any], tensors: Mapping[str, Tensor], what: str
) -> tuple[dict[Path, str], set[str]]:
    """Returns the action for each path and the tensors to skip."""
    for pattern, action in rules:
        if action not in (*ACTIONS, SKIP):
            raise paths.unknown(f"action of rule `{pattern}`:", str(action), (*ACTIONS, SKIP))
    own = [(pattern, action) for pattern, action in rules if action != SKIP]
    if any(not any(paths.match(path, pattern) for pattern, _ in own) for path in expected):
        own.append(("**", "load"))
    skipped: set[str] = set()
    for pattern in (pattern for pattern, action in rules if action == SKIP):
        matched = {name for name in tensors if _matches(name, (pattern,))}
        if not matched:
            raise InputError(f"{what}: no tensor matches `{pattern}`; nearest: {paths.nearest(pattern, tensors)}")
        skipped |= matched
    return paths.match_rules(expected, own), skipped


def _choose(
    tensors: Mapping[str, Tensor],
    namings: Sequence[Naming],
    size: Any,
    expected: Mapping[Path, Any],
    wanted: Sequence[Path],
    what: str,
) -> tuple[Naming, dict[str, tuple[Rule, tuple[Path, ...]]]]:
    """Returns the naming that places most tensors, and where it places each."""
    candidates = [(naming, _placed(tensors, naming, size, expected)) for naming in namings]
    if not candidates:
        raise InputError(f"{what}: no published names of this architecture are known; give a naming")
    naming, found = max(candidates, key=lambda candidate: len(candidate[1]))
    covered = {path for _, ours in found.values() for path in ours} & set(wanted)
    if 2 * len(covered) < len(wanted):
        missing = next(path for path in wanted if path not in covered)
        needs = _their_name(missing, naming, size)
        raise InputError(
            f"{what}: a checkpoint of another architecture, it has {len(covered)} of the model's {len(wanted)} leaves; "
            f"`{missing}` would be `{needs}` ({naming.name}), nearest there: {paths.nearest(needs, tensors)}"
        )
    return naming, found


def _placed(
    tensors: Mapping[str, Tensor], naming: Naming, size: Any, expected: Mapping[Path, Any]
) -> dict[str, tuple[Rule, tuple[Path, ...]]]:
    rules = naming.rules(size)
    placed = {}
    for name in tensors:
        short = [name.removeprefix(prefix) for prefix in ("", *naming.prefixes) if name.startswith(prefix)]
        matches = ((rule, rule.ours_of(each)) for each in short for rule in rules)
        fitting = ((rule, ours) for rule, ours in matches if ours and all(path in expected for path in ours))
        if (place := next(fitting, None)) is not None:
            placed[name] = place
    return placed


def _shape(tensor: Tensor, rule: Rule, path: Path, what: str) -> tuple[int, ...]:
    """Returns the shape of a leaf in our layout as the tensor has it."""
    parts = len(rule.paths)
    shape = tensor.shape if parts == 1 else (tensor.shape[0] // parts if tensor.shape else 0, *tensor.shape[1:])
    try:
        if parts > 1 and tensor.shape[0] % parts:
            raise ValueError
        # A boolean without strides takes no memory, whatever the shape.
        return rule.layout.to_ours(np.broadcast_to(np.zeros((), np.bool_), shape)).shape
    except (ValueError, IndexError) as error:
        raise InputError(
            f"{what}: `{tensor.name}` has shape {tensor.shape}, which cannot be laid out as `{path}`; "
            f"add the rule ('{path}', 'reinitialise')"
        ) from error


def _fitted(source: Source, path: Path, action: str, shape: tuple[int, ...], resizes: Resizes, what: str) -> Source:
    """Returns the source with what makes it fit the shape."""
    if source.shape == shape:
        return source
    resize = next((resize for pattern, resize in resizes if paths.match(path, pattern)), None)
    misfit = f"{what}: `{source.tensor.name}` gives `{path}` the shape {source.shape}, the model needs {shape}"
    if action != "resize":
        fix = (path, "resize") if resize is not None else (_module(path), "reinitialise")
        raise InputError(f"{misfit}; add the rule {fix}")
    if resize is None:
        raise InputError(f"{misfit}, and nothing is known about resizing it; use 'reinitialise'")
    return dataclasses.replace(source, resize=resize)


def _check_missing(
    wanted: Sequence[Path],
    sources: Mapping[Path, Source],
    tensors: Mapping[str, Tensor],
    naming: Naming,
    size: Any,
    what: str,
) -> None:
    missing = [path for path in wanted if path not in sources]
    if missing:
        needs = _their_name(missing[0], naming, size)
        unused = set(tensors) - {source.tensor.name for source in sources.values()}
        raise InputError(
            f"{what}: no tensor for `{missing[0]}`{_more(missing)}; it would be `{needs}` ({naming.name}), nearest "
            f"unused: {paths.nearest(needs, sorted(unused)) or 'none'}; to start it anew add the rule "
            f"('{_module(missing[0])}', 'reinitialise')"
        )


def _check_unused(
    tensors: Mapping[str, Tensor], accounted: set[str], expected: Mapping[Path, Any], naming: Naming, what: str
) -> None:
    unused = [name for name in tensors if name not in accounted]
    if unused:
        raise InputError(
            f"{what}: tensor `{unused[0]}`{_more(unused)} has no place in the model ({naming.name} names); nearest "
            f"paths: {paths.nearest(unused[0].replace('.', '/'), expected)}; to do without add the rule "
            f"('{unused[0]}', 'skip')"
        )


def _manifest(
    what: str,
    naming: Naming,
    expected: Mapping[Path, Any],
    sources: Mapping[Path, Source],
    left: Sequence[Path],
    tensors: Mapping[str, Tensor],
    uses: Mapping[str, tuple[Path, ...]],
    ignored: set[str],
) -> Manifest:
    def leaf(path: Path, value: Any) -> LeafRecord:
        nbytes = int(np.prod(value.shape, dtype=np.int64)) * np.dtype(value.dtype).itemsize
        source = sources.get(path)
        status: LeafStatus = "left alone" if path in left else "re-initialised"
        if source is not None:
            status = source.status
        name = None if source is None else source.tensor.name
        return LeafRecord(path, tuple(value.shape), str(value.dtype), nbytes, status, name)

    def tensor(name: str, each: Tensor) -> TensorRecord:
        ours = uses.get(name, ())
        status: TensorStatus = "used" if ours else "ignored" if name in ignored else "unused"
        return TensorRecord(name, each.shape, str(each.dtype), each.nbytes, status, ours)

    leaves = tuple(leaf(path, value) for path, value in expected.items())
    return Manifest(what, naming.name, leaves, tuple(tensor(name, each) for name, each in tensors.items()))


def _their_name(path: Path, naming: Naming, size: Any) -> str:
    names = (rule.theirs_of(path) for rule in naming.rules(size))
    return next((name for name in names if name is not None), path.replace("/", "."))


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _module(path: Path) -> str:
    return f"{path.rsplit('/', 1)[0]}/**" if "/" in path else path
