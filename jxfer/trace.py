"""A trace of a few steady steps of each phase, as jax's profiler writes it for TensorBoard and Perfetto."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jxfer import distributed
from jxfer.loop import Hook, Session

STEPS_BEFORE = 5
"""Steps that are left out at first: they fill caches and find no batch waiting."""


@contextlib.contextmanager
def traced(session: Session, directory: Path, *, start: int, num_steps: int) -> Iterator[tuple[Hook, ...]]:
    """Lends the hooks that trace some steps of the loop inside the block, where the session asks for it.

    Of several variants the first is traced, and of several processes process 0.

    Args:
      session: says how many steps, and is told where the trace lies.
      directory: of this phase's trace; one that is there already stays as it is.
      start: steps done before the loop.
      num_steps: after which it ends.
    """
    left = num_steps - start
    if session.trace_steps is None or left < 1 or not distributed.is_main() or directory.exists():
        yield ()
        return
    count = min(session.trace_steps, left)
    tracer = _Tracer(directory, before=start + min(STEPS_BEFORE, left - count), count=count)
    tracer(start, ())
    try:
        yield (Hook(1, tracer),)
    finally:
        tracer.stop()
        session.note(_how_to_open(directory, count))


class _Tracer:
    """Called after each step: starts tracing after step `before`, and stops `count` steps later."""

    def __init__(self, directory: Path, *, before: int, count: int) -> None:
        self._directory, self._before, self._last = directory, before, before + count
        self._on = False

    def __call__(self, step: int, state: Any) -> None:
        if step == self._before:
            jax.block_until_ready(state)  # what was dispatched before is not of the traced steps
            jax.profiler.start_trace(self._directory, create_perfetto_trace=True)
            self._on = True
        elif step == self._last:
            jax.block_until_ready(state)
            self.stop()

    def stop(self) -> None:
        """Writes the trace, unless it is written; a loop that ends early leaves what there is."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()


def _how_to_open(directory: Path, count: int) -> str:
    files = [*directory.rglob("perfetto_trace.json.gz")]
    if not files:
        return f"no step was traced: training ended before step {count}"
    return (
        f"trace of {count} steps: tensorboard --logdir {directory} (pip install tensorboard xprof), "
        f"or open {files[0]} at https://ui.perfetto.dev"
    )
