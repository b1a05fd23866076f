"""What is said when a batch does not come: what was waited for, for how long, and where the reading threads are."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures import Future
from concurrent.futures import thread as _pools
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from jxfer import distributed
from jxfer.typing import InputError

Made = TypeVar("Made")

SECS = "JXFER_STALL_SECS"
"""Environment variable: after so many seconds without a batch it is said on stderr; 0 never says so."""

DEFAULT_SECS = 60.0

_PACKAGE = Path(__file__).parents[1]

_LOOK_SECS = 0.1

_SHOWN = 4  # threads; all of a pool usually wait for the same disk

_reading: dict[int, tuple[str, float]] = {}
"""Thread -> what it reads, and since when."""


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Notes what this thread reads while it does."""
    thread = threading.get_ident()
    _reading[thread] = what, time.monotonic()
    try:
        yield
    finally:
        del _reading[thread]


def leave_reads() -> None:
    """Lets the process end although threads of pools still read: Python would wait for a disk that never answers."""
    joined: Any = _pools._threads_queues  # at exit; there is no public way out of it
    for worker in list(joined):
        if worker.ident in _reading:
            joined.pop(worker, None)


def limit_secs() -> float:
    """Returns after how many seconds a wait is said to be long.

    Raises:
      InputError: the environment says something else than a number of seconds.
    """
    text = os.environ.get(SECS, str(DEFAULT_SECS))
    try:
        secs = float(text)
    except ValueError:
        secs = -1.0
    if not 0 <= secs < float("inf"):
        raise InputError(f"{SECS} is `{text}`; it takes a number of seconds, 0 for never")
    return secs


class Wait:
    """A wait for something: `look` says where it stands once it is long, and again each time it has doubled."""

    def __init__(self, what: Callable[[], str]) -> None:
        """Begins; `what` is asked when something is said."""
        self._what, self._since = what, time.monotonic()
        self._next_secs = limit_secs() or float("inf")
        self._said = False

    def look(self) -> None:
        """Says on stderr what is waited for and where threads read, if it is time to."""
        secs = time.monotonic() - self._since
        if secs >= self._next_secs:
            self._next_secs, self._said = 2 * secs, True
            places = "; ".join(where_threads_read()) or "no thread reads"
            _say(f"no sign of {self._what()} for {secs:.3g} s, still waiting: {places}")

    def end(self) -> None:
        """Says that it is over, if it was said to be long."""
        if self._said:
            _say(f"{self._what()} came after {time.monotonic() - self._since:.3g} s; going on")


def result(future: Future[Made], what: Callable[[], str]) -> Made:
    """Returns what a thread of a pool makes, and says so where that does not come; `what` names it."""
    if not future.done():
        wait = Wait(what)
        while not futures.wait([future], timeout=_LOOK_SECS).done:
            wait.look()
        wait.end()
    return future.result()


def where_threads_read() -> list[str]:
    """Returns where each thread stands that is in the code of `jxfer.data`, those first that have read longest."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    found = []
    for thread, frame in sys._current_frames().items():
        places = [] if thread == threading.get_ident() else _places(frame)
        if any(file.is_relative_to("data") for file, _, _ in places):
            file, line, function = places[0]
            what, since = _reading.get(thread, ("", time.monotonic()))
            secs = time.monotonic() - since
            reads = f" has been reading {what} for {secs:.3g} s," if what else ""
            name = names.get(thread, thread)
            found.append((secs, f"thread `{name}`{reads} is in `{function}`, {_PACKAGE.name}/{file}, line {line}"))
    found.sort(key=lambda each: -each[0])
    more = [f"and {len(found) - _SHOWN} threads more"] if len(found) > _SHOWN else []
    return [text for _, text in found[:_SHOWN]] + more


def _places(frame: FrameType | None) -> list[tuple[Path, int, str]]:
    """Returns file inside the package, line and function of the calls of a thread that are jxfer's, innermost first."""
    places = []
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(_PACKAGE) and file != Path(__file__):
            places.append((file.relative_to(_PACKAGE), frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return places


def _say(text: str) -> None:
    process = f"process {distributed.index()}: " if distributed.count() > 1 else ""
    print(f"jxfer: {process}{text}", file=sys.stderr, flush=True)
