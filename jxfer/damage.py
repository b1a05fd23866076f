"""Damaged checkpoints: what is wrong with them, and how a run that is about to continue does without them."""

import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jxfer import distributed

MANIFEST = "manifest.json"
"""Lists the files of a checkpoint."""

_OTHER_BYTES = "has other bytes than were written"


def checksums(directory: Path) -> dict[str, int]:
    """Returns checksums of the files of a checkpoint that this process has written; those of nobody are process 0's."""
    return {name: _checksum(directory / name) for name in files_of(directory) if _writer(name) == distributed.index()}


def measured(directory: Path, known: dict[str, int]) -> dict[str, list[int]]:
    """Returns size and checksum of every file of a checkpoint, by its name; reads what has no known checksum."""
    files = {name: directory / name for name in files_of(directory)}
    return {
        name: [file.stat().st_size, known[name] if name in known else _checksum(file)] for name, file in files.items()
    }


def files_of(directory: Path) -> list[str]:
    """Returns the names of all files of a checkpoint but the manifest."""
    found = sorted(str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file())
    return [name for name in found if name.removesuffix(".tmp") != MANIFEST]


def size_of(measured: Any) -> int:
    """Returns the size of a file by its manifest; those of earlier versions have nothing else."""
    return measured[0] if isinstance(measured, list) else measured


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Writes a manifest with a checksum of itself, whole or not at all."""
    temporary = directory / f"{MANIFEST}.tmp"
    temporary.write_text(json.dumps({"checksum": _sum_of(manifest), **manifest}))
    temporary.replace(directory / MANIFEST)


def read_manifest(directory: Path) -> dict[str, Any]:
    """Returns the manifest of a checkpoint.

    Raises:
      OSError: there is none.
      ValueError: it is not what was written.
    """
    manifest = json.loads((directory / MANIFEST).read_text())
    if not isinstance(manifest, dict) or "files" not in manifest:
        raise ValueError("no manifest")
    known = manifest.pop("checksum", None)  # those of earlier versions have none
    if known is not None and known != _sum_of(manifest):
        raise ValueError(f"the manifest {_OTHER_BYTES}")
    return manifest


def damage_of(directory: Path) -> str | None:
    """Returns what is wrong with a checkpoint, or the weights of a run; None where nothing is, or no manifest there.

    All its files are read.
    """
    try:
        files = read_manifest(directory)["files"]
    except OSError:
        return None  # never finished
    except ValueError:
        return f"'{MANIFEST}' {_OTHER_BYTES}"
    for name, known in files.items():
        file, size = directory / name, size_of(known)
        if not file.is_file():
            return f"'{name}' is missing"
        if (found := file.stat().st_size) != size:
            return f"'{name}' has {found:,} of {size:,} bytes"
        if isinstance(known, list) and len(known) == 2 and _checksum(file) != known[1]:
            return f"'{name}' {_OTHER_BYTES}"
    return None


def set_aside(directory: Path, note: Callable[[str], None]) -> None:
    """Lets the damaged checkpoints of a run count no more; the next save removes them.

    Args:
      directory: of the run.
      note: called with a line on each of them.
    """
    for manifest in _manifests(directory):
        if problem := damage_of(manifest.parent):
            note(f"checkpoint '{manifest.parent}' is damaged: {problem}; continuing without it")
            manifest.unlink()
    for manifest in _manifests(directory):
        if (best := _lacks_best(manifest)) is not None:
            note(f"checkpoint '{manifest.parent}' needs that of step {best}, which is not there; continuing without it")
            manifest.unlink()


def _manifests(directory: Path) -> list[Path]:
    """Returns the manifests of all steps of all phases of all variants."""
    return sorted(directory.glob(f"checkpoints/*/*/*/{MANIFEST}"))


def _lacks_best(manifest: Path) -> int | None:
    """Returns the step of the best state so far where it is a checkpoint of its own and not there."""
    best = read_manifest(manifest.parent)["metadata"]["extra"].get("best_step")
    phase = manifest.parents[1]
    places = [phase / str(best), phase.with_name(f"{phase.name}-best") / str(best)]
    return None if not best or any((place / manifest.name).exists() for place in places) else int(best)


def _writer(name: str) -> int:
    """Returns which process has written a file: Orbax gives each a folder, or a file, of its number."""
    own = re.search(r"process_(\d+)(?:/|$)", name)
    return int(own[1]) if own else 0


def _sum_of(manifest: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(manifest).encode())


def _checksum(file: Path) -> int:
    checksum = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum
