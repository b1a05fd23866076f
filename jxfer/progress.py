"""What a command shows while it works: two bars on a terminal, a line now and then anywhere else."""

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator

BAR_SECS = 0.25
"""Seconds between updates of the bars; drawing them takes about 2 ms."""

NOT_RUNS = ("pre-training", "planning")
"""How the work begins that is done once for all runs."""

LINE_SECS = 10.0
"""Seconds between lines, where there is no terminal."""


@dataclasses.dataclass(frozen=True)
class Status:
    """Where a command stands: the runs of the grid, and the part that works now."""

    runs_done: int = 0
    runs_total: int = 0
    what: str = "starting"
    done: int = 0
    total: int = 0
    secs_left: float | None = None

    def __str__(self) -> str:
        part = f"{self.what}, {self.done}/{self.total}" if self.total else self.what
        if not self.runs_total:
            return part
        runs = f"{self.runs_done}/{self.runs_total} runs"
        return runs if self.runs_done == self.runs_total else f"{runs}, {self.left}: {part}"

    @property
    def left(self) -> str:
        """The time left in words."""
        if self.secs_left is None:
            return "time left not known yet"
        minutes = round(self.secs_left / 60)
        if minutes < 2:
            return f"about {self.secs_left:.0f} s left"
        return f"about {minutes} min left" if minutes < 120 else f"about {minutes / 60:.0f} h left"


class Tracker:
    """Collects what the runs report, cheaply, and shows it every `every_secs` seconds.

    Calling it with `runs` moves the count of finished runs; anything else says what works now. The time left assumes
    that the runs to come take as long as those that were run here; kept runs and work done once for all do not count.
    """

    def __init__(self, show: Callable[[Status], None], *, every_secs: float, clock: Callable[[], float]) -> None:
        self._status = Status()
        self._show = show
        self._every_secs = every_secs
        self._clock = clock
        self._shown = -math.inf
        self._began = clock()
        self._working = False
        self._secs, self._finished = 0.0, 0

    def __call__(self, what: str, done: int, total: int) -> None:
        """Notes that `done` of `total` steps (or runs) of `what` are done."""
        now = self._clock()
        if what == "runs":
            self._count_runs(now, done, total)
        elif what.startswith(NOT_RUNS):
            self._began = now
        else:
            self._working = True
        if what != "runs":
            self._status = dataclasses.replace(self._status, what=what, done=done, total=total)
        if now - self._shown >= self._every_secs:
            self._shown = now
            self._show(self._status)

    def _count_runs(self, now: float, done: int, total: int) -> None:
        if self._working:
            self._secs += now - self._began
            self._finished += done - self._status.runs_done
        secs_left = self._secs / self._finished * (total - done) if self._finished else None
        self._status = dataclasses.replace(self._status, runs_done=done, runs_total=total, secs_left=secs_left)
        self._began, self._working = now, False


@contextlib.contextmanager
def progress() -> Iterator[Tracker]:
    """Lends a tracker that shows its status on stderr, as bars that vanish at the end where that is a terminal."""
    if not sys.stderr.isatty():
        yield Tracker(_print, every_secs=LINE_SECS, clock=time.monotonic)
        return
    with _bars() as show:
        yield Tracker(show, every_secs=BAR_SECS, clock=time.monotonic)


@contextlib.contextmanager
def _bars() -> Iterator[Callable[[Status], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = [
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}", markup=False),
    ]
    # No refresh thread: it would take time from the training even when nothing has changed.
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True) as bars:
        runs, part = (bars.add_task(name, total=None, left="") for name in ("runs", "starting"))

        def show(status: Status) -> None:
            bars.update(runs, completed=status.runs_done, total=status.runs_total or None, left=status.left)
            bars.update(part, description=status.what, completed=status.done, total=status.total or None)
            bars.refresh()

        yield show


def _print(status: Status) -> None:
    print(status, file=sys.stderr, flush=True)
