"""Checkpoints through Orbax: the state of a run with its place in the data, and the weights of a finished run.

On disk a tree is flat, `params/head/kernel` -> array, because nested containers come back in the order of their
names: of twelve layers the third would be layer 10. A manifest, written last, makes a checkpoint whole: it lists
every array, and the size and checksum of every file, and all are checked before anything is restored.
"""

import copy
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jxfer import distributed, paths
from jxfer.damage import checksums, damage_of, measured, read_manifest, size_of, write_manifest
from jxfer.sharding import put
from jxfer.typing import InputError, PyTree


class Checkpoints:
    """The checkpoints of one run: a sub-directory per step, of which the newest and the best stay.

    Saving happens in the background, one save at a time; leaving the `with` block waits for the last. All processes
    make the same calls; each writes its part of the arrays, and process 0 says which checkpoints there are.
    """

    def __init__(
        self, directory: Path, *, keep_last: int = 2, keep_best: bool = True, best_metric: str = "accuracy"
    ) -> None:
        """Opens the checkpoints in `directory`, which the first save creates.

        Args:
          directory: holds nothing else.
          keep_last: how many of the newest stay.
          keep_best: whether the one with the largest `best_metric` stays too; of equals, the earliest.
          best_metric: name of a metric given to `save`; the larger the better.
        """
        self._directory = Path(directory).absolute()
        self._keep_last = keep_last
        self._keep_best = keep_best
        self._best_metric = best_metric
        self._worker = ThreadPoolExecutor(max_workers=1)
        self._pending: Future[None] | None = None

    def save(
        self,
        step: int,
        state: PyTree,
        *,
        metrics: Mapping[str, float] | None = None,
        extra: dict[str, Any] | None = None,
        passing: bool = False,
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        """Starts saving the state after `step` updates; the caller may donate `state` at once.

        Args:
          step: names the checkpoint; one that exists is replaced.
          state: any tree of arrays, typed keys and numbers.
          metrics: decide which checkpoint is the best.
          extra: JSON-ready, and may be changed after the call; returned by `restore`.
          passing: whether it was made where a run happened to be stopped: it does not count among those that stay, and
            goes with the next save unless it is the best.
          guard: called before anything is written, and once more before others are removed; may raise.

        Raises:
          InputError: the directory cannot be written; or what an earlier save raised.
          OSError: from an earlier save, as on a full disk; the checkpoints before it are whole.
        """
        self.wait()
        guard()
        distributed.on_main(lambda: _make_writable(self._directory))
        flat = _flatten(state)
        scores = {name: float(value) for name, value in (metrics or {}).items()}
        # Copied, because the caller may change what it gave while the background thread has yet to write it.
        metadata = {"metrics": scores, "extra": copy.deepcopy(extra or {}), "passing": passing}
        manifest = {"arrays": _describe(flat), "metadata": metadata}
        directory = self._directory / str(step)
        response = _start_write(directory, flat)
        self._pending = self._worker.submit(self._finish, response, directory, manifest, guard, next(_numbers))

    def restore(self, template: PyTree, *, step: int | None = None) -> tuple[PyTree, dict[str, Any]]:
        """Returns the state at `step` (None: the newest) and the `extra` saved with it.

        Args:
          template: a tree like the saved one, of arrays or of `jax.ShapeDtypeStruct`s with shardings; the result has
            its structure and shardings, whatever devices the checkpoint was written from.
          step: one of `steps()`.

        Raises:
          InputError: there is no such whole checkpoint, or its paths, shapes or types differ from the template's.
        """
        steps = self.steps()
        if not steps or step not in (None, *steps):
            wanted = "no whole checkpoint" if step is None else f"no whole checkpoint at step {step}"
            raise InputError(f"{wanted} in {self._directory}; steps there: {', '.join(map(str, steps)) or 'none'}")
        step = steps[-1] if step is None else step
        directory = self._directory / str(step)
        manifest = distributed.on_main(lambda: _read_manifest(directory))
        state = _read(directory, manifest["arrays"], template, what=f"checkpoint at step {step}")
        return state, manifest["metadata"]["extra"]

    def steps(self) -> list[int]:
        """Returns the steps of the whole checkpoints, ascending; one that is half-written or truncated is not one."""
        self.wait()
        return distributed.on_main(lambda: sorted(_manifests(self._directory)))

    def latest(self) -> int | None:
        """Returns the newest step there is a whole checkpoint of, or None."""
        return max(self.steps(), default=None)

    def go_back(self) -> int | None:
        """Removes what is newer than the newest checkpoint that is not `passing`, and returns its step; or all."""
        self.wait()
        return distributed.on_main(self._remove_newest)

    def best(self) -> int | None:
        """Returns the step with the largest `best_metric`, or None where no checkpoint has it."""
        self.wait()
        return distributed.on_main(lambda: self._best(_manifests(self._directory)))

    def wait(self) -> None:
        """Waits until the last save is on disk, and raises what it raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits for the last save and ends the background thread."""
        try:
            self.wait()
        finally:
            self._worker.shutdown()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _finish(
        self, response: Any, directory: Path, manifest: dict[str, Any], guard: Callable[[], None], number: int
    ) -> None:
        _await_write(response, directory)
        _seal(directory, manifest, number, guard=guard)
        if distributed.is_main():
            self._prune()

    def _prune(self) -> None:
        manifests = _manifests(self._directory)
        keep = {str(step) for step in [*_regular(manifests)[-self._keep_last :], max(manifests)]}
        if self._keep_best:
            keep.add(str(self._best(manifests)))
        for entry in _entries(self._directory):
            if entry.name not in keep:
                shutil.rmtree(entry)

    def _remove_newest(self) -> int | None:
        step = max(_regular(_manifests(self._directory)), default=None)
        for entry in _entries(self._directory):
            if step is None or int(entry.name.split(".")[0]) > step:
                shutil.rmtree(entry)
        return step

    def _best(self, manifests: dict[int, dict[str, Any]]) -> int | None:
        values = {step: manifests[step]["metadata"]["metrics"].get(self._best_metric) for step in sorted(manifests)}
        known = {step: value for step, value in values.items() if value is not None and not math.isnan(value)}
        return max(known, key=lambda step: known[step], default=None)


def newest_step(directory: Path) -> int | None:
    """Returns the newest step there is a whole checkpoint of in a directory, or None; asks no other process."""
    return max(_manifests(directory), default=None)


def save_arrays(directory: Path, arrays: Mapping[str, Any], *, metadata: dict[str, Any]) -> None:
    """Writes the weights of a finished run, whole or not at all; an earlier save in `directory` is replaced.

    All processes must call it.

    Raises:
      InputError: the directory cannot be written.
      OSError: writing failed, as on a full disk.
    """
    directory = Path(directory).absolute()
    distributed.on_main(lambda: _make_writable(directory.parent))
    _await_write(_start_write(directory, dict(arrays)), directory)
    _seal(directory, {"arrays": _describe(arrays), "metadata": metadata}, next(_numbers))
    distributed.barrier()


def load_arrays(directory: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns what `save_arrays` wrote: arrays by path, on the host, and the metadata; all processes must call it.

    Raises:
      InputError: there are no whole weights in `directory`.
    """
    directory = Path(directory).absolute()
    if problem := distributed.on_main(lambda: damage_of(directory)):
        raise InputError(f"weights in {directory} are damaged: {problem}; remove them and run what made them again")
    manifest = distributed.on_main(lambda: _read_manifest(directory))
    if not manifest:
        raise InputError(f"no whole weights in {directory}; was the run that writes them interrupted?")
    template = {path: np.empty(array["shape"], jnp.dtype(array["dtype"])) for path, array in manifest["arrays"].items()}
    return _read(directory, manifest["arrays"], template, what=f"weights in {directory}"), manifest["metadata"]


def weights_hash(arrays: Mapping[str, Any]) -> str:
    """Returns the first 16 hex digits of the SHA-256 of paths, shapes, types and bytes, whatever their order."""
    digest = hashlib.sha256()
    for path, description in sorted(_describe(arrays).items()):
        digest.update(json.dumps([path, description["shape"], description["dtype"]]).encode())
        digest.update(np.ascontiguousarray(arrays[path]).tobytes())
    return digest.hexdigest()[:16]


def _start_write(directory: Path, flat: Mapping[str, Any]) -> Any:
    # Orbax refuses arrays of no elements and NumPy scalars; the manifest alone keeps the former.
    # And of several processes' own copies it refuses those on devices; of those on hosts process 0 writes its own.
    stored = {path: leaf if _is_written_from_device(leaf) else np.array(leaf) for path, leaf in flat.items()}
    v1 = _orbax()
    # Floats hardly shrink, by a tenth for all the work, which on a CPU is taken from training.
    context = v1.Context()
    context.array.saving.use_compression = False
    with context:
        return v1.save_async(directory, {k: v for k, v in stored.items() if v.size}, overwrite=True)


def _await_write(response: Any, directory: Path) -> None:
    """Waits for Orbax; what a file system refused is an OSError, and leaves what was there before and no more."""
    try:
        response.result()
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else _os_error(str(error))
        if code is None:
            raise
        _remove_half(directory)  # a full disk has no room for it
        raise OSError(code, os.strerror(code), str(directory)) from error


def _remove_half(directory: Path) -> None:
    """Removes what a failed save has written, again while other arrays of it are still being written there."""
    started = last_seen = time.monotonic()
    while time.monotonic() < min(last_seen + 0.15, started + 2):
        for leftover in directory.parent.glob(f"{directory.name}.orbax-checkpoint-tmp*"):
            shutil.rmtree(leftover, ignore_errors=True)
            last_seen = time.monotonic()
        time.sleep(0.02)


def _os_error(text: str) -> int | None:
    """Returns the number of the error of the system that TensorStore names, whose exceptions are those of a bug."""
    found = re.search(r"os_error_code='(\d+)'", text)
    return int(found[1]) if found else None


def _is_written_from_device(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not (distributed.count() > 1 and leaf.is_fully_addressable)


def _read(directory: Path, saved: Mapping[str, Any], template: PyTree, *, what: str) -> PyTree:
    wanted = _flatten(template)
    _check(saved, wanted, what=what)
    abstract = {path: _abstract(leaf) for path, leaf in wanted.items() if math.prod(np.shape(leaf))}
    try:
        loaded = _orbax().load(directory, abstract)
    except Exception as error:  # Orbax and TensorStore raise many types for a damaged file
        raise InputError(f"{what} cannot be read: {str(error).splitlines()[0]}") from error
    leaves = [_like(leaf, loaded.get(path)) for path, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _check(saved: Mapping[str, Any], wanted: Mapping[str, Any], *, what: str) -> None:
    expected = _describe(wanted)
    for path in expected:
        if path not in saved:
            raise InputError(f"{what} has no `{path}`; nearest: {paths.nearest(path, saved)}")
    for path, array in saved.items():
        if path not in expected:
            raise InputError(
                f"{what} has `{path}`, for which there is no place; nearest: {paths.nearest(path, expected)}"
            )
        if array != expected[path]:
            here, there = (f"{tuple(a['shape'])} {a['dtype']}" for a in (array, expected[path]))
            raise InputError(f"{what}: `{path}` is {here}, but {there} is needed")


def _describe(flat: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        path: {
            "shape": list(np.shape(leaf)),
            "dtype": str(leaf.dtype if hasattr(leaf, "dtype") else np.array(leaf).dtype),
        }
        for path, leaf in flat.items()
    }


def _flatten(tree: PyTree) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    flat = {paths.keypath(keys): leaf for keys, leaf in leaves}
    if len(flat) != len(leaves):
        raise ValueError("two leaves of the tree have the same path")
    return flat


def _abstract(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return np.array(leaf)
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _like(leaf: Any, value: Any) -> Any:
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        value = np.empty(leaf.shape, leaf.dtype) if value is None else value
        # Orbax returns keys under another spelling of the same sharding, which jit would compile for again.
        return put(value, _abstract(leaf).sharding)
    if isinstance(leaf, np.ndarray):
        return leaf.copy() if value is None else value
    return type(leaf)(value.item())


_numbers = itertools.count()
"""Of the saves so far, which all processes make in the same order."""


def _seal(directory: Path, manifest: dict[str, Any], number: int, *, guard: Callable[[], None] = lambda: None) -> None:
    """Makes a checkpoint whole: process 0 writes its manifest, with the checksums that each process has of its files.

    Args:
      directory: on which Orbax is done in all processes.
      manifest: but for the files.
      number: of the save.
      guard: called before.
    """
    own = checksums(directory)
    if not distributed.is_main():
        distributed.hand_over(f"save-{number}", own)
    guard()
    if distributed.is_main():
        known = {name: value for each in distributed.hand_over(f"save-{number}", own) for name, value in each.items()}
        write_manifest(directory, {**manifest, "files": measured(directory, known)})


def _read_manifest(directory: Path) -> dict[str, Any]:
    """Returns the manifest of a whole checkpoint, or an empty dict."""
    try:
        manifest = read_manifest(directory)
        whole = all((directory / name).stat().st_size == size_of(each) for name, each in manifest["files"].items())
    except (OSError, ValueError):
        return {}
    return manifest if whole else {}


def _manifests(directory: Path) -> dict[int, dict[str, Any]]:
    """Returns the manifests of the whole checkpoints by their steps."""
    named = [entry for entry in _entries(directory) if entry.name.isdigit()]
    return {int(entry.name): manifest for entry in named if (manifest := _read_manifest(entry))}


def _regular(manifests: Mapping[int, dict[str, Any]]) -> list[int]:
    """Returns the steps of those that are not `passing`, ascending."""
    return sorted(step for step, manifest in manifests.items() if not manifest["metadata"].get("passing"))


def _entries(directory: Path) -> list[Path]:
    # Orbax writes to `40.orbax-checkpoint-tmp` and renames; such a leftover is an entry too, but never whole.
    if not directory.is_dir():
        return []
    return [entry for entry in directory.iterdir() if entry.name.split(".")[0].isdigit()]


def _make_writable(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {directory}: {error.strerror}") from error
    if not os.access(directory, os.W_OK):
        raise InputError(f"cannot write to {directory}: permission denied")


def _orbax() -> Any:
    from orbax.checkpoint import v1  # a quarter of a second that `jxfer --help` need not wait

    return v1
