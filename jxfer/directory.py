"""The directory of an ablation: whose it is, its results, and what the report needs besides them."""

import contextlib
import errno
import importlib.metadata
import io
import json
import os
import platform
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jxfer import claims, config, data, distributed
from jxfer.claims import Claim
from jxfer.config import Experiment
from jxfer.peak import describe_peak
from jxfer.solvers import lbfgs
from jxfer.task import load_data
from jxfer.typing import InputError

NUM_EXAMPLES = 64
PACKAGES = ("jxfer", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy")

_GRID = ("methods", "shots", "seeds", "wandb")
"""Settings in which calls that share a directory may differ."""


@contextlib.contextmanager
def claimed(experiment: Experiment, directory: Path) -> Iterator[None]:
    """Makes a directory this experiment's, or checks that it is; other processes may work at the same one meanwhile.

    Raises:
      InputError: it holds another experiment, or this one with other settings, or somebody works at such a one in it;
        or it cannot be written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to '{directory}': {error.strerror}; choose another --out") from error
    with contextlib.ExitStack() as stack:
        with alone(directory):
            _claim(experiment, directory)
            stack.enter_context(claims.at_work(claims_of(directory)))
        yield


@contextlib.contextmanager
def reporting(directory: Path) -> Iterator[None]:
    """Turns what a file system refuses, to a run or its report, into one line on what was refused and what to do.

    Raises:
      InputError: the disk is full, read-only or out of order, or the directory is gone.
    """
    try:
        yield
    except OSError as error:
        if (advice := _advice(error, directory)) is None:
            raise
        raise InputError(
            f"cannot write to '{error.filename or directory}': {error.strerror}; what was saved before is kept: "
            f"{advice}, and run the same command again to continue"
        ) from error


def _advice(error: OSError, directory: Path) -> str | None:
    """Returns what to do about an error, or None where it is not of writing to a directory."""
    if error.errno == errno.ENOENT and not directory.is_dir():
        return "the directory is gone; bring it back"
    if error.filename is not None and not Path(error.filename).absolute().is_relative_to(directory.absolute()):
        return None
    return _ADVICE.get(error.errno or 0)


_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "make it writable"),
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.ENOTCONN), "see to the disk or file server"),
}


def claims_of(directory: Path) -> Path:
    """Returns the folder of the claims of a directory."""
    return directory / ".claims"


def alone(directory: Path) -> contextlib.AbstractContextManager[Claim]:
    """Keeps others from changing the files that all workers share, for the moment that this takes."""
    return claims.alone(claims_of(directory), "shared-files")


def read_results(directory: Path) -> list[dict[str, Any]]:
    """Returns the rows of `results.jsonl`; a last line that a crash cut short does not count.

    Raises:
      InputError: another line is not JSON.
    """
    path = directory / "results.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def append_result(directory: Path, row: dict[str, Any]) -> None:
    """Appends a row in one write that is on disk when this returns; what an earlier crash cut short is dropped.

    To be called `alone`.
    """
    path = directory / "results.jsonl"
    with path.open("ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def check_data(directory: Path, versions: dict[str, str]) -> None:
    """Records the versions of the data and weights behind the results, or checks that they are still the same.

    Raises:
      InputError: results in this directory were made from others.
    """
    path = directory / "data.json"
    with alone(directory):
        known = read_json(path, {})
        for name, version in versions.items():
            if known.get(name, version) != version:
                raise InputError(
                    f"the {name} has changed since '{directory}' was begun ({known[name]} then, {version} now); "
                    "choose another --out"
                )
        write_json(path, known | versions)


def save_plans(directory: Path, plans: dict[str, Any]) -> None:
    """Adds plans, by method, to those that are there: the report shows the widest grid."""
    path = directory / "plans.json"
    with alone(directory):
        known = {plan["method"]: plan for plan in read_json(path, [])}
        write_json(path, [*(known | plans).values()])


def save_examples(experiment: Experiment, directory: Path) -> None:
    """Saves some test images, spread over the split, for the report's pictures; of texts and sounds there are none."""
    dataset = load_data(experiment.target)
    if dataset.input != "image":
        return
    test = data.draw(dataset, experiment.target, experiment.shots[0], 0).test
    chosen = np.unique(np.linspace(0, len(test) - 1, min(NUM_EXAMPLES, len(test))).astype(int))
    content = io.BytesIO()
    np.savez(content, ids=test.ids[chosen], images=test.read(chosen)["image"])
    write_file(directory / "examples.npz", content.getvalue())


def versions(command: str) -> dict[str, str]:
    """Returns what results are made with."""
    devices = jax.devices()
    return {
        "command": command,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "device": f"{len(devices)} × {devices[0].device_kind}",
        "peak": describe_peak(devices),
        "processes": str(distributed.count()),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "xla_flags_of_paths": _flags(lbfgs.COMPILER_OPTIONS or {}),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
    }


def read_json(path: Path, default: Any) -> Any:
    """Returns what a JSON file holds, or `default` where there is none; raises InputError if it is damaged."""
    return _parse(path.read_text(), str(path)) if path.exists() else default


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    write_file(path, (json.dumps(value, indent=1) + "\n").encode())


def write_file(path: Path, content: bytes) -> None:
    """Writes a file, whole or not at all, also where others write it at the same time: the last one stays."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _claim(experiment: Experiment, directory: Path) -> None:
    record = directory / "experiment.json"
    settings = json.loads(json.dumps(config.to_dict(experiment)))
    # A start that failed before any run leaves nothing worth keeping, and must not stand in the corrected one's way.
    begun = any((directory / name).exists() for name in ("results.jsonl", "runs", "source"))
    others = claims.workers(claims_of(directory))
    if not others:
        for leftover in directory.glob(".*.tmp"):  # of `write_file`, in a process that was killed
            leftover.unlink(missing_ok=True)
    old = read_json(record, {}) if begun or others else {}
    if old and (differences := _differences(old, settings)):
        holds = "holds" if begun else f"is where {others[0]} begins"
        raise InputError(
            f"'{directory}' {holds} another experiment: {'; '.join(differences[:3])}; choose another --out"
        )
    write_json(record, _widest(old, settings))


def _widest(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Returns the new settings over the union of both grids, so that a narrower call does not unsay a wider one."""
    if not old:
        return new
    methods = {method["name"]: method for method in [*old["methods"], *new["methods"]]}
    shots = list(dict.fromkeys([*old["shots"], *new["shots"]]))
    return {**new, "methods": list(methods.values()), "shots": shots, "seeds": max(old["seeds"], new["seeds"])}


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Returns where two resolved configs differ, as `field.path was 1, is 2`; the grid does not count."""
    if path in _GRID:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        names = [*new, *(name for name in old if name not in new)]
        return [
            difference
            for name in names
            for difference in _differences(old.get(name), new.get(name), f"{path}.{name}".lstrip("."))
        ]
    return [] if old == new else [f"{path} was {json.dumps(old)}, is {json.dumps(new)}"]


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{place} is not JSON ({error.msg}); remove what is damaged there, or choose another --out"
        ) from None


def _flags(options: Mapping[str, bool]) -> str:
    """Returns options of the compiler as `XLA_FLAGS` has them."""
    return " ".join(f"--{name}={str(value).lower()}" for name, value in options.items())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
