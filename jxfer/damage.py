"""Damaged checkpoints: what is wrong with them, and how a run that is about to continue does without them."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jxfer import distributed

MANIFEST = "manifest.json"
"""Lists the files of a checkpoint."""


def measured(file: Path) -> list[int]:
    """Returns what a manifest has of a file: its size and, where one process wrote all of it, a checksum."""
    size = file.stat().st_size
    return [size] if distributed.count() > 1 else [size, _checksum(file)]  # no reading of what others wrote


def size_of(measured: Any) -> int:
    """Returns the size of a file by its manifest; those of earlier versions have nothing else."""
    return measured[0] if isinstance(measured, list) else measured


def damage_of(directory: Path) -> str | None:
    """Returns what is wrong with a checkpoint, or the weights of a run; None where nothing is, or no manifest there.

    All its files are read.
    """
    try:
        files = json.loads((directory / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return None  # never finished
    for name, known in files.items():
        file, size = directory / name, size_of(known)
        if not file.is_file():
            return f"'{name}' is missing"
        if (found := file.stat().st_size) != size:
            return f"'{name}' has {found:,} of {size:,} bytes"
        if isinstance(known, list) and len(known) == 2 and _checksum(file) != known[1]:
            return f"'{name}' has other bytes than were written"
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
    best = json.loads(manifest.read_text())["metadata"]["extra"].get("best_step")
    phase = manifest.parents[1]
    places = [phase / str(best), phase.with_name(f"{phase.name}-best") / str(best)]
    return None if not best or any((place / manifest.name).exists() for place in places) else int(best)


def _checksum(file: Path) -> int:
    checksum = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum
