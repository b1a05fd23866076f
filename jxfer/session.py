"""What a command lends to the runs below it: signals that stop them cleanly, progress, and a jax made ready."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax

from jxfer import distributed, peers
from jxfer.data.prepare import cache_dir
from jxfer.loop import Session
from jxfer.progress import progress
from jxfer.typing import InterruptedRun
from jxfer.xla_flags import set_xla_flags


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
    """Prints what cannot be raised, but not that TensorStore has no one to tell of other writes once one has failed."""
    if not (isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(unraisable)


@contextlib.contextmanager
def open_session() -> Iterator[Session]:
    """Lends a session that shows progress on stderr and stops on SIGTERM and SIGINT; several processes stop as one."""
    with stop_signals() as wants_stop:
        should_stop = peers.agreed(wants_stop)
        if not distributed.is_main():
            yield Session(progress=lambda what, done, total: None, should_stop=should_stop)
            return
        with progress() as tracker:
            yield Session(progress=tracker, should_stop=should_stop, note=_note)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def stopped_at_once(when: str) -> Iterator[None]:
    """Turns SIGTERM and SIGINT into InterruptedRun wherever the code is, for work that has nothing to save."""

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise InterruptedRun(f"stopped while {when}")

    with _handled(stop):
        yield


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Turns SIGTERM and SIGINT into a flag; a second SIGINT raises KeyboardInterrupt."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)

    with _handled(note):
        yield lambda: bool(received)


@contextlib.contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
