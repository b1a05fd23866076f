"""What a command lends to the runs below it: signals that stop them cleanly, progress, and a jax made ready."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import jax

from jxfer import distributed, peers
from jxfer.data.prepare import cache_dir
from jxfer.loop import Session
from jxfer.progress import progress
from jxfer.typing import InterruptedRun
from jxfer.xla_flags import set_xla_flags

AGAIN_SECS = 0.1
"""After which a signal comes again that could not end anything when it came."""


def prepare_jax() -> None:
    """Sets XLA's flags, keeps compiled programs between processes, and silences absl: what Orbax logs it raises too.

    Kept programs take most of the start-up away. To be called before jax starts a backend. `JAX_COMPILATION_CACHE_DIR`
    in the environment leaves the choice of what is kept, and where, to jax.
    """
    import absl.logging

    set_xla_flags()
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _print_unless_known
    absl.logging.set_verbosity(absl.logging.FATAL)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if distributed.count() > 1:
        jax.devices()  # which all processes must ask for at once: the first would soon give up waiting for the others


def _print_unless_known(unraisable: Any) -> None:
    """Prints what cannot be raised, but not that TensorStore has no one to tell of other writes once one has failed.

    A signal that came while Python collected garbage, where nothing can be raised, comes again.
    """
    if isinstance(unraisable.exc_value, _AtOnce):
        threading.Thread(target=_come_again, daemon=True).start()
    elif not (isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(unraisable)


def _come_again() -> None:
    time.sleep(AGAIN_SECS)
    if isinstance(getattr(signal.getsignal(signal.SIGTERM), "__self__", None), Signals):  # else the work has ended
        os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def open_session() -> Iterator[Session]:
    """Lends a session that shows progress on stderr and stops on SIGTERM and SIGINT; several processes stop as one."""
    with stop_signals() as signals:
        should_stop, at_once = peers.agreed(signals.arrived), signals.at_once
        if not distributed.is_main():
            yield Session(progress=lambda what, done, total: None, should_stop=should_stop, at_once=at_once)
            return
        with progress() as tracker:
            yield Session(progress=tracker, should_stop=should_stop, note=_note, at_once=at_once)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def stopped_at_once(when: str) -> Iterator[None]:
    """Turns SIGTERM and SIGINT into InterruptedRun wherever the code is, for work that has nothing to save."""
    with stop_signals() as signals, signals.at_once(when):
        yield


@contextlib.contextmanager
def stop_signals() -> Iterator["Signals"]:
    """Takes SIGTERM and SIGINT as a wish to stop while the block runs.

    Raises:
      InterruptedRun: one arrived in a block of `Signals.at_once`.
      KeyboardInterrupt: a second SIGINT.
    """
    signals = Signals()
    before = {number: signal.signal(number, signals.note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    except _AtOnce as stop:
        raise InterruptedRun(str(stop)) from None
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


class Signals:
    """Which signals have arrived, and whether the next one ends the work there and then."""

    def __init__(self) -> None:
        self._arrived: list[int] = []
        self._when: str | None = None

    def arrived(self) -> bool:
        """Tells whether one has."""
        return bool(self._arrived)

    @contextlib.contextmanager
    def at_once(self, when: str) -> Iterator[None]:
        """Lets a signal end the block wherever the code is, or before it begins: nothing of it must need saving."""
        self._when = when
        try:
            if self._arrived:
                raise _AtOnce(f"stopped while {when}")
            yield
        finally:
            self._when = None

    def note(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal."""
        del frame
        if number == signal.SIGINT and number in self._arrived:
            raise KeyboardInterrupt
        self._arrived.append(number)
        if self._when is not None:
            raise _AtOnce(f"stopped while {self._when}")


class _AtOnce(BaseException):
    """Becomes InterruptedRun outside; until then no `except Exception` may take it for an error of what it reads."""
