"""How several processes live and end together: signs of life, one stop for all, and whose failure ended the job.

A thread beside the main one tells the coordination service once a second that its process is alive and reads what the
others told. It is this thread that ends a process whose main thread waits for one that will never answer.
"""

import contextlib
import dataclasses
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from jxfer import distributed

BEAT_SECS = 1.0
"""Between two signs of life, and so between looks at what others told."""

LOST_SECS = 20.0
"""After so long without one, a process counts as lost."""

GRACE_SECS = 5.0
"""How long others have to fail in the same way by themselves, and process 0, whom all talk through, waits for them."""

_BEATS, _ENDS, _GONE = "jxfer/beats/", "jxfer/news/end/", "jxfer/gone/"
_NEWS, _STOP, _CALLS, _DONE = "jxfer/news/", "jxfer/news/stop", "jxfer/calls/", "jxfer/done"


@dataclasses.dataclass(frozen=True)
class End:
    """Why a process ended, as all are told."""

    process: int
    status: int
    message: str
    lost: bool = False
    """Told by process 0, of one that was silent."""


Explain = Callable[[BaseException], tuple[int, str] | None]
"""Returns exit status and line of an error that needs no traceback, None of any other."""


@contextlib.contextmanager
def together(options: Mapping[str, str], explain: Explain) -> Iterator[None]:
    """Lets the block be one job of all processes that are started so; where this is the only one, it does nothing.

    No process leaves the block before process 0 does. Where it raises in one, this process and all others end, there
    and then: with the line of `explain` and its status, or with a traceback and status 1. A line that all would
    print comes from process 0 alone.

    Raises:
      InputError: as `distributed.start`.
    """
    global _watch
    if not distributed.start(options):
        yield
        return
    _watch = _Watch()
    try:
        yield
        _watch.finish()
    except BaseException as error:
        _watch.fail(error, explain(error))
    _watch = None


def agreed(wants_stop: Callable[[], bool]) -> Callable[[], bool]:
    """Returns a function that answers true in all processes at the same call, soon after `wants_stop` did in any.

    All processes must call it equally often. It costs as much as taking a lock. Where there is one process, it is
    `wants_stop`.
    """
    return wants_stop if _watch is None else _watch.listen(wants_stop)


_watch: "_Watch | None" = None


class _Watch:
    def __init__(self) -> None:
        self._service: Any = distributed.client()
        self._index, self._count = distributed.index(), distributed.count()
        self._wants_stop: Callable[[], bool] = lambda: False
        self._lock = threading.Lock()
        self._calls = 0
        self._stop_at: int | None = None
        self._leaving, self._blaming = threading.Event(), threading.Event()
        self._beats: dict[int, tuple[str, float]] = {}
        self._thread = threading.Thread(target=self._run, name="jxfer-peers", daemon=True)
        self._thread.start()

    def listen(self, wants_stop: Callable[[], bool]) -> Callable[[], bool]:
        self._wants_stop = wants_stop
        return self._should_stop

    def finish(self) -> None:
        """Waits for process 0 to be done, and leaves jax's runtime with all others."""
        import jax

        if self._index == 0:
            self._service.key_value_set(_DONE, "")
        else:
            self._service.blocking_key_value_get(_DONE, distributed.FOREVER_MS)
        self._leaving.set()
        self._thread.join()
        jax.distributed.shutdown()

    def fail(self, error: BaseException, known: tuple[int, str] | None) -> NoReturn:
        """Ends this process for an error in it, or for what was the cause of it in another one."""
        if _may_be_of_others(error):
            self._blaming.set()
            self._thread.join(LOST_SECS + GRACE_SECS)  # which ends this process where another one failed or is lost
        self._leaving.set()
        status, line = known or (1, "".join(traceback.format_exception(error)).rstrip())
        message = str(error) if known else "".join(traceback.format_exception_only(error)).strip()
        with contextlib.suppress(Exception):  # the service is gone with process 0
            self._tell(End(self._index, status, message))
        if known is None or self._index == 0 or not self._said_by_main(message):
            print(line, file=sys.stderr)
        self._leave(status)

    def _should_stop(self) -> bool:
        with self._lock:  # which `_agree` holds while it settles on a call that none has come to yet
            self._calls += 1
            return self._stop_at is not None and self._calls >= self._stop_at

    def _run(self) -> None:
        number = 0
        while not self._leaving.wait(BEAT_SECS):
            number += 1
            try:
                self._service.key_value_set(f"{_BEATS}{self._index}", str(number), allow_overwrite=True)
                self._look()
            except Exception:
                if self._leaving.is_set():
                    return
                self._follow(End(0, 1, "its coordination service does not answer", lost=True))

    def _look(self) -> None:
        if self._wants_stop():
            self._service.key_value_set(_STOP, "", allow_overwrite=True)
        news = dict(self._service.key_value_dir_get(_NEWS))
        if self._stop_at is None and _STOP in news:
            self._agree()
        for text in (text for key, text in news.items() if key.startswith(_ENDS)):
            self._follow(End(**json.loads(text)))
        if self._index == 0:
            self._count_beats()

    def _agree(self) -> None:
        """Settles, with the others, on the first call of `_should_stop` that is ahead of all."""
        with self._lock:
            self._service.key_value_set(f"{_CALLS}{self._index}", str(self._calls), allow_overwrite=True)
            try:
                self._service.wait_at_barrier(_STOP, round(1000 * LOST_SECS))
            except Exception:  # one is lost, and `_count_beats` will say which
                return
            self._stop_at = 1 + max(int(calls) for _, calls in self._service.key_value_dir_get(_CALLS))

    def _count_beats(self) -> None:
        """Tells all of the first process that was silent for too long."""
        now = time.monotonic()
        beats = {int(key.removeprefix(_BEATS)): value for key, value in self._service.key_value_dir_get(_BEATS)}
        for process in range(1, self._count):
            value = beats.get(process, "")
            last, since = self._beats.get(process, ("", now))
            self._beats[process] = (value, now) if value != last else (value, since)
            if now - self._beats[process][1] > LOST_SECS:
                silence = f"no sign of life for {LOST_SECS:.0f} s: it was killed, or its machine or network is down"
                self._tell(End(process, 1, silence, lost=True))

    def _follow(self, end: End) -> None:
        """Ends this process because another one has ended, unless its main thread is about to do so by itself."""
        if not end.lost:
            deadline = time.monotonic() + GRACE_SECS
            while time.monotonic() < deadline and not self._blaming.is_set():
                if self._leaving.wait(BEAT_SECS / 10):
                    return
        if self._leaving.is_set():
            return
        what = "is gone" if end.lost else "failed"
        print(f"jxfer: process {end.process} of {self._count} {what}: {end.message}", file=sys.stderr)
        with contextlib.suppress(Exception):  # the service is gone with process 0
            self._tell(end)
        self._leave(end.status)

    def _tell(self, end: End) -> None:
        key = f"{_ENDS}{self._index}"
        self._service.key_value_set(key, json.dumps(dataclasses.asdict(end)), allow_overwrite=True)

    def _said_by_main(self, message: str) -> bool:
        """Tells whether process 0 ends with the same message, after some time for it to do so."""
        deadline = time.monotonic() + GRACE_SECS + 5 * BEAT_SECS
        while time.monotonic() < deadline:
            with contextlib.suppress(Exception):
                end = End(**json.loads(self._service.key_value_try_get(f"{_ENDS}0")))
                return end.process == 0 and end.message == message
            time.sleep(BEAT_SECS / 10)
        return False

    def _leave(self, status: int) -> NoReturn:
        """Ends the process without the farewell of jax's runtime, which would wait for processes that do not come."""
        sys.stdout.flush()
        sys.stderr.flush()
        with contextlib.suppress(Exception):
            self._service.key_value_set(f"{_GONE}{self._index}", "")
            deadline = time.monotonic() + 2 * GRACE_SECS + 5 * BEAT_SECS
            # Process 0 goes last: with it the service goes, and without that jax ends the others with a stack trace.
            while self._index == 0 and time.monotonic() < deadline:
                if len(self._service.key_value_dir_get(_GONE)) == self._count:
                    break
                time.sleep(BEAT_SECS / 10)
        os._exit(status)


def _may_be_of_others(error: BaseException | None) -> bool:
    """Tells whether an error may be of a collective operation that another process did not come to."""
    import jax

    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
