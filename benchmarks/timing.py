"""Interleaved timing, ratios with their spread, and tables that say where they were measured."""

import dataclasses
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np

from jxfer.xla_flags import set_xla_flags

set_xla_flags()  # what is measured is what the commands run


@dataclasses.dataclass(frozen=True)
class Ratio:
    """The median and the quartiles of the ratios within each round."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}–{self.high:.3f})"


def interleave(calls: Mapping[str, Callable[[], None]], *, rounds: int) -> dict[str, np.ndarray]:
    """Returns the seconds of each call in each round, [rounds]; each call must wait for its own results.

    Every round goes once through all calls, so that what else the machine does meets all of them alike, and begins
    one call later than the round before, so that none always follows the same one for the same caches. Everything is
    called once before, to compile.
    """
    for call in calls.values():
        call()
    names = list(calls)
    seconds = {name: np.zeros(rounds) for name in names}
    for index in range(rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            started = time.perf_counter()
            calls[name]()
            seconds[name][index] = time.perf_counter() - started
    return seconds


def ratio(seconds: np.ndarray, reference: np.ndarray) -> Ratio:
    """Returns how many times as long as the reference something took in the same rounds."""
    low, median, high = np.quantile(seconds / reference, (0.25, 0.5, 0.75))
    return Ratio(float(median), float(low), float(high))


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Returns a Markdown table with aligned columns."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    rule = " | ".join("-" * width for width in widths)
    return "\n".join(f"| {line} |" for line in (lines[0], rule, *lines[1:]))


def machine() -> str:
    """Returns one line: device, cores, load over the last minute, versions, and XLA's flags if any are set."""
    device = jax.devices()[0]
    kind = _processor() if device.platform == "cpu" else device.device_kind
    names = ("jax", "jaxlib", "flax", "optax", "numpy", "grain")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    flags = f", XLA_FLAGS={flags}" if (flags := os.environ.get("XLA_FLAGS", "").strip()) else ""
    load = f"load {os.getloadavg()[0]:.1f}"
    return f"{kind}, {os.cpu_count()} cores, {load}, Python {platform.python_version()}, {versions}{flags}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
