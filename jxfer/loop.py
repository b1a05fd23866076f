"""The loop: step, then hooks. The host never waits for the device between steps; metrics come back late and in bulk."""

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jxfer import distributed
from jxfer.data.ahead import Ahead, GaveUp
from jxfer.state import Fixed
from jxfer.step import TrainStep
from jxfer.typing import Batch, InterruptedRun, Metrics, NonFiniteError

Check = Callable[[int, Mapping[str, Any]], None]
"""Raises NonFiniteError where the metrics of a step are not what training can go on from."""


@dataclasses.dataclass(frozen=True)
class Session:
    """What a command lends to the runs below it."""

    progress: Callable[[str, int, int], None]
    """Called with what runs, how much is done and how much there is."""
    should_stop: Callable[[], bool]
    """True once SIGTERM or SIGINT has arrived."""
    note: Callable[[str], None] = lambda text: None
    """Called with what the user should read once."""
    guard: Callable[[], None] = lambda: None
    """Called before a run writes what counts; raises where another process has taken the run over."""
    trace_steps: int | None = None
    """Of how many steps of each phase a trace is written; None writes none."""
    at_once: Callable[[str], contextlib.AbstractContextManager[None]] = lambda when: contextlib.nullcontext()
    """Lends a block in which SIGTERM or SIGINT raises wherever the code is; for work of which nothing need be saved."""

    def proceed(self, doing: str) -> None:
        """Raises InterruptedRun once the session should stop; for work of which nothing remains to be saved."""
        if self.should_stop():
            raise InterruptedRun(f"stopped while {doing}")


@dataclasses.dataclass(frozen=True)
class Hook:
    """Calls `call(step, state)` after every `every` steps and after the last one. It must not keep the state."""

    every: int
    call: Callable[[int, Any], None]
    checked: bool = False
    """Whether the metrics of all steps up to this one are checked before, for which the host waits."""


@dataclasses.dataclass(frozen=True)
class Window:
    """The mean training metrics of the steps up to `step` since the last window."""

    step: int
    metrics: dict[str, Any]
    """Name -> float, or [V] of a population; over the steps that were not skipped, and none where all were."""
    examples_per_sec: float
    """The time that hooks other than those of every step take does not count."""
    steps_per_sec: float
    """In the same time."""
    input_wait: float
    """Share of that time in which the device had nothing to do, because the next batch was not there yet."""
    num_skipped: int | None = None
    """Steps whose update was left out; None where none ever is."""

    def speed(self, step_flops: float, *, peak: float | None) -> dict[str, float]:
        """Returns what a row of the log says of how fast the window was; `mfu` where the peak in FLOP/s is known."""
        said = {"examples_per_sec": self.examples_per_sec, "input_wait": self.input_wait}
        return said if peak is None else said | {"mfu": step_flops * self.steps_per_sec / peak}


def train(
    train_step: TrainStep,
    state: Any,
    fixed: Fixed,
    batches: Iterator[Batch],
    *,
    num_steps: int,
    log_every: int,
    on_window: Callable[[Window], None],
    hooks: Sequence[Hook] = (),
    on_stop: Callable[[int, Any], None] = lambda step, state: None,
    should_stop: Callable[[], bool] = lambda: False,
    check: Check | None = None,
    what: Callable[[int], str] = lambda step: f"the batch of step {step}",
) -> Any:
    """Steps from `state.step` to `num_steps` and returns the final state; the one given is donated.

    Args:
      train_step: from `make_train_step`.
      state: what moves, at any step: a `TrainState` or a `Population`.
      fixed: what does not.
      batches: already on the devices, the first one being that of the next step; taken ahead of the steps in a thread.
      num_steps: optimizer updates of the phase, those before `state.step` included.
      log_every: steps per window of metrics; a window is fetched when the next one is full.
      on_window: receives each window.
      hooks: called in order; one that raises InterruptedRun before it has done anything ends the loop as `should_stop`.
      on_stop: called with step and state before the loop gives up.
      should_stop: asked after every step, and where a batch does not come for long.
      check: called with the step and the fetched metrics of every step; None is `check_finite`.
      what: names the batch of a step where one does not come.

    Raises:
      NonFiniteError: a metric became NaN or infinite; the message names the first step and the metric.
      InterruptedRun: `should_stop` answered true, or a hook raised it, and `on_stop` has returned.
    """
    windows, start = _Windows(on_window, check or check_finite), int(state.step)
    # Several processes must stop after the same step; one may stop while it waits.
    give_up = should_stop if distributed.count() == 1 else lambda: False
    due = itertools.islice(batches, max(num_steps - start, 0))
    with Ahead(due, what=lambda taken: what(start + taken + 1)) as ahead:
        for step in range(start + 1, num_steps + 1):
            try:
                batch, waited_secs = ahead.take(windows.busy, give_up=give_up)
            except GaveUp:
                windows.flush()
                on_stop(step - 1, state)
                raise InterruptedRun(f"stopped while waiting for {what(step)}") from None
            with jax.profiler.StepTraceAnnotation("train", step_num=step), jax.transfer_guard("disallow"):
                state, metrics = train_step(state, fixed, batch)
            windows.add(step, metrics, waited_secs, full=step % log_every == 0)
            try:
                _call_hooks(hooks, step, state, windows, last=step == num_steps)
            except NonFiniteError:
                windows.flush()  # raises for the first such step, where what the hook found began
                raise
            except InterruptedRun:
                windows.flush()
                on_stop(step, state)
                raise
            if should_stop() and step < num_steps:
                windows.flush()
                on_stop(step, state)
                raise InterruptedRun(f"stopped after step {step} of {num_steps}")
    windows.flush()
    return state


def _call_hooks(hooks: Sequence[Hook], step: int, state: Any, windows: "_Windows", *, last: bool) -> None:
    due = [hook for hook in hooks if last or step % hook.every == 0]
    with windows.paused() if any(hook.every > 1 for hook in due) else contextlib.nullcontext():
        for hook in due:
            if hook.checked:
                windows.check()
            hook.call(step, state)


class _Windows:
    """Collects device metrics and hands out means one window late, when fetching them no longer waits.

    The host runs ahead of the device. A window ends when the device is done with its last step, as far as the host
    notices: it looks after each of its own steps, and wherever it waits.
    """

    def __init__(self, on_window: Callable[[Window], None], check: "Check"):
        self._on_window, self._check = on_window, check
        self._filling: list[tuple[int, Metrics]] = []
        self._full: list[tuple[int, Metrics]] = []
        self._waited_secs, self._full_waited_secs = 0.0, 0.0
        self._start = time.perf_counter()  # of the full window until its end is known, then of the one that fills
        self._full_secs = 0.0  # until its end is known

    def busy(self) -> bool:
        """Whether the device still works on the last step."""
        steps = self._filling or self._full
        if steps and not _done(steps):
            return True
        self._note_end()
        return False

    def add(self, step: int, metrics: Metrics, waited_secs: float, *, full: bool) -> None:
        if _done(self._full):
            self._note_end()
        self._filling.append((step, metrics))
        self._waited_secs += waited_secs
        if full:
            self._close()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the time in the block, in which hooks read the state: it begins when all steps so far are done."""
        jax.block_until_ready(self._full[-1:])
        self._note_end()
        jax.block_until_ready(self._filling[-1:])
        began = time.perf_counter()
        yield
        self._start += time.perf_counter() - began

    def check(self) -> None:
        """Checks the steps so far, without ending the window."""
        for step, metrics in distributed.fetch([*self._full, *self._filling]):
            self._check(step, metrics)

    def flush(self) -> None:
        self._hand_out()
        jax.block_until_ready(self._filling)  # the time of the last window ends with its last step
        self._close()
        self._hand_out()

    def _close(self) -> None:
        self._hand_out()
        self._full, self._filling = self._filling, []
        self._full_waited_secs, self._waited_secs = self._waited_secs, 0.0

    def _note_end(self) -> None:
        if self._full and not self._full_secs:
            now = time.perf_counter()
            self._full_secs, self._start = now - self._start, now

    def _hand_out(self) -> None:
        if not self._full:
            return
        rows = distributed.fetch(self._full)
        self._note_end()
        secs, self._full, self._full_secs = self._full_secs, [], 0.0
        for step, metrics in rows:
            self._check(step, metrics)
        skips = "skipped" in rows[0][1]
        kept = [metrics for _, metrics in rows if not (skips and metrics["skipped"])]
        counts, means = _means(kept) if kept else (0.0, {})
        num_skipped = len(rows) - len(kept) if skips else None
        waited = min(self._full_waited_secs / secs, 1.0)
        examples_per_sec, steps_per_sec = float(np.max(counts)) / secs, len(rows) / secs
        self._on_window(Window(rows[-1][0], means, examples_per_sec, steps_per_sec, waited, num_skipped))


def _means(rows: Sequence[Mapping[str, Any]]) -> tuple[Any, dict[str, Any]]:
    """Returns the number of examples of some steps, and the means of their metrics."""
    counts = np.sum([metrics["count"] for metrics in rows], axis=0, dtype=np.float64)
    sums = {name: np.sum([m[name] for m in rows], axis=0, dtype=np.float64) for name in rows[0] if name != "skipped"}
    means = {name: value / counts for name, value in sums.items() if name not in ("count", "grad_norm")}
    means["grad_norm"] = sums["grad_norm"] / len(rows)
    return counts, {name: float(value) if np.ndim(value) == 0 else value for name, value in means.items()}


def _done(steps: Sequence[tuple[int, Metrics]]) -> bool:
    """Whether the device has finished the last of the steps."""
    arrays: Iterable[Any] = steps[-1][1].values() if steps else ()
    return bool(steps) and all(array.is_ready() for array in arrays)


def check_finite(step: int, metrics: Mapping[str, Any]) -> None:
    """Raises NonFiniteError if a fetched metric is NaN or infinite."""
    for name in sorted(metrics, reverse=True):  # the loss before the gradient norm, which follows from it
        if not math.isfinite(value := float(metrics[name])):
            raise NonFiniteError(f"{name} is {value} at step {step}; try a lower learning rate or clip_norm", step=step)
