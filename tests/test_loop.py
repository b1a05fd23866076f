"""The loop: exact means one window late, hooks at their steps, clean stops, and no transfers inside a step."""

import dataclasses
import math
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jxfer import loop
from jxfer.loop import Hook, Window, train
from jxfer.partition import Partition
from jxfer.state import Fixed, TrainState, init_state
from jxfer.typing import InputError, InterruptedRun, NonFiniteError


@jax.jit
def fake_step(state: TrainState, fixed: Fixed, batch):
    """Counts, and hands the batch on as the metrics."""
    return dataclasses.replace(state, step=state.step + 1), batch


def start(step: int = 0) -> tuple[TrainState, Fixed]:
    model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    state, fixed = init_state(model, Partition.of(model, [("**", "all")]), optax.sgd(0.1))
    return dataclasses.replace(state, step=jnp.int32(step)), fixed


STATE, FIXED = start()


def metrics_of(step: int, **changed: float) -> dict[str, jax.Array]:
    """Returns sums that differ from step to step, for `step` examples."""
    sums = {"loss": step**2, "accuracy": step / 2, "count": step, "grad_norm": 1 / step}
    return {name: jnp.float32(value) for name, value in (sums | changed).items()}


def batches(num: int, *, first: int = 1, **changed: float):
    yield from [metrics_of(step) | ({} if step != 5 else metrics_of(step, **changed)) for step in range(first, num + 1)]


def run(num_steps: int, *, log_every: int = 3, state: TrainState = STATE, **kwargs) -> list[Window]:
    windows: list[Window] = []
    kwargs.setdefault("batches", batches(num_steps, first=int(state.step) + 1))
    given_batches = kwargs.pop("batches")
    train(
        fake_step,
        state,
        FIXED,
        given_batches,
        num_steps=num_steps,
        log_every=log_every,
        on_window=kwargs.pop("on_window", windows.append),
        **kwargs,
    )
    return windows


def test_windows_come_one_late_and_all_of_them_in_order():
    events: list = []
    run(
        8,
        on_window=lambda window: events.append(("window", window.step)),
        hooks=(Hook(1, lambda step, state: events.append(step)),),
    )
    # The window up to step 3 is fetched when the next is full, so that the device is never waited for.
    assert events == [1, 2, 3, 4, 5, ("window", 3), 6, 7, 8, ("window", 6), ("window", 8)]


@settings(deadline=None, max_examples=25)
@given(num_steps=st.integers(1, 12), log_every=st.integers(1, 6), first=st.integers(0, 4))
def test_windows_cover_every_step_once_with_exact_means(num_steps, log_every, first):
    state = dataclasses.replace(STATE, step=jnp.int32(first))
    windows = run(num_steps, log_every=log_every, state=state)
    ends = [step for step in range(first + 1, num_steps + 1) if step % log_every == 0 or step == num_steps]
    assert [window.step for window in windows] == ends
    for window, begin in zip(windows, [first, *ends], strict=False):
        rows = [jax.device_get(metrics_of(step)) for step in range(begin + 1, window.step + 1)]
        count = sum(float(row["count"]) for row in rows)
        assert window.metrics == {
            "loss": math.fsum(float(row["loss"]) for row in rows) / count,
            "accuracy": math.fsum(float(row["accuracy"]) for row in rows) / count,
            "grad_norm": math.fsum(float(row["grad_norm"]) for row in rows) / len(rows),
        }
        assert window.examples_per_sec > 0


def test_metrics_are_fetched_in_bulk(monkeypatch):
    fetched, device_get = [], jax.device_get
    monkeypatch.setattr(loop.jax, "device_get", lambda tree: fetched.append(len(tree)) or device_get(tree))
    run(10, log_every=4)
    assert fetched == [4, 4, 2]


@pytest.mark.parametrize(
    ("changed", "name"),
    [({"loss": math.nan}, "loss is nan"), ({"grad_norm": math.inf}, "grad_norm is inf"), ({"loss": -math.inf}, "loss")],
)
@pytest.mark.parametrize("log_every", [1, 3, 100])
def test_a_metric_that_is_not_finite_names_the_first_step_and_itself(changed, name, log_every):
    with pytest.raises(NonFiniteError, match=f"^{name}.* at step 5;"):
        run(9, log_every=log_every, batches=batches(9, **changed))


def test_the_loss_is_named_before_the_gradient_norm_that_follows_from_it():
    with pytest.raises(NonFiniteError, match=r"^loss is nan at step 5"):
        run(9, batches=batches(9, grad_norm=math.nan, loss=math.nan))


def test_a_hook_that_finds_the_damage_later_does_not_hide_the_first_step():
    def evaluate(step, state):
        raise NonFiniteError(f"loss is nan at step {step}")

    with pytest.raises(NonFiniteError, match=r"^loss is nan at step 5;"):
        run(9, log_every=100, batches=batches(9, loss=math.nan), hooks=(Hook(8, evaluate),))
    with pytest.raises(NonFiniteError, match=r"^loss is nan at step 8$"):
        run(9, log_every=100, hooks=(Hook(8, evaluate),))


def test_hooks_run_at_their_steps_and_once_after_the_last():
    calls: dict[str, list] = {"every 3": [], "every 4": [], "rarely": []}
    hooks = [
        Hook(every, lambda step, state, name=name: calls[name].append((step, int(state.step))))
        for every, name in ((3, "every 3"), (4, "every 4"), (100, "rarely"))
    ]
    run(8, hooks=hooks)
    steps = {name: [step for step, _ in seen] for name, seen in calls.items()}
    assert steps == {"every 3": [3, 6, 8], "every 4": [4, 8], "rarely": [8]}
    assert all(step == of_state for seen in calls.values() for step, of_state in seen), "the state after that step"


def test_a_wish_to_stop_ends_the_loop_after_on_stop_has_all_it_needs():
    seen: list = []
    steps_done: list = []
    with pytest.raises(InterruptedRun, match="step 4 of 9"):
        run(
            9,
            on_window=lambda window: seen.append(window.step),
            hooks=(Hook(1, lambda step, state: steps_done.append(step)),),
            should_stop=lambda: steps_done[-1] >= 4,
            on_stop=lambda step, state: seen.append(("stop", step, int(state.step))),
        )
    assert seen == [3, 4, ("stop", 4, 4)]
    assert steps_done == [1, 2, 3, 4]


def test_a_wish_to_stop_after_the_last_step_changes_nothing():
    steps_done: list = []
    windows = run(
        6,
        hooks=(Hook(1, lambda step, state: steps_done.append(step)),),
        should_stop=lambda: steps_done[-1] == 6,
        on_stop=lambda step, state: pytest.fail("nothing is left to stop"),
    )
    assert [window.step for window in windows] == [3, 6]


def test_a_resumed_loop_takes_the_steps_that_are_left_and_their_batches():
    state = dataclasses.replace(STATE, step=jnp.int32(4))
    stream, steps = batches(100, first=5), []
    windows = run(7, state=state, batches=stream, hooks=(Hook(1, lambda step, state: steps.append(step)),))
    assert steps == [5, 6, 7]
    assert int(next(stream)["count"]) == 8, "batches 5, 6, 7 and no other were taken"
    assert [window.step for window in windows] == [6, 7]


def test_a_finished_state_takes_no_step():
    state = dataclasses.replace(STATE, step=jnp.int32(7))
    assert run(7, state=state, batches=iter(())) == []


def test_a_step_may_not_transfer():
    on_host = iter([{name: np.asarray(value) for name, value in metrics_of(1).items()}])
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        run(1, batches=on_host)


def slowly(batches, secs: float):
    for batch in batches:
        time.sleep(secs)
        yield batch


@jax.jit
def heavy_step(state: TrainState, fixed: Fixed, batch):
    """Takes the device some tens of milliseconds."""
    work = jax.lax.fori_loop(0, 40, lambda _, x: jnp.tanh(x @ x), jnp.full((400, 400), batch["loss"]))
    return dataclasses.replace(state, step=state.step + 1), batch | {"loss": batch["loss"] + 0 * work[0, 0]}


def timed(step, num_steps: int, **kwargs) -> list[Window]:
    windows: list[Window] = []
    step(STATE, FIXED, metrics_of(1))  # compiled before
    train(step, STATE, FIXED, num_steps=num_steps, on_window=windows.append, **kwargs)
    return windows


def test_input_that_is_slower_than_the_step_is_waited_for():
    windows = timed(fake_step, 9, batches=slowly(batches(9), 0.05), log_every=3)
    assert all(0.6 < window.input_wait <= 1 for window in windows), [window.input_wait for window in windows]
    assert 0.1 < windows[1].examples_per_sec / ((4 + 5 + 6) / 0.15) < 1.2
    assert windows[1].steps_per_sec == pytest.approx(windows[1].examples_per_sec * 3 / 15)


def test_input_that_is_there_before_the_device_needs_it_is_not_waited_for():
    (alone,) = timed(heavy_step, 8, batches=batches(8), log_every=8)
    # The host, far ahead of the device, waits for every batch.
    windows = timed(heavy_step, 12, batches=slowly(batches(12), 0.5 / alone.steps_per_sec), log_every=4)
    assert all(window.input_wait < 0.3 for window in windows[1:]), [window.input_wait for window in windows]


def test_a_window_lasts_until_the_device_is_done_with_it():
    windows = timed(heavy_step, 11, batches=batches(11), log_every=3)
    speeds = [window.steps_per_sec for window in windows]
    assert max(speeds) < 20 * min(speeds), "no window is over when its steps are only dispatched"


def test_the_time_of_looks_at_the_state_does_not_count():
    look = Hook(4, lambda step, state: time.sleep(0.7))
    windows = timed(fake_step, 12, batches=batches(12), log_every=3, hooks=(look,))
    assert sum(3 / window.steps_per_sec for window in windows) < 0.7, "of the 2.1 s that the looks took, nothing"


def failing_batches():
    yield metrics_of(1)
    raise InputError("record 7 is damaged")


def stop_at_once(step, state):
    raise NonFiniteError("stop")


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({}, None),
        ({"batches": failing_batches()}, InputError),
        ({"hooks": (Hook(1, stop_at_once),)}, NonFiniteError),
        ({"should_stop": lambda: True}, InterruptedRun),
    ],
    ids=["end", "input", "hook", "signal"],
)
def test_however_the_loop_ends_no_thread_is_left(kwargs, error):
    if error is None:
        run(6, **kwargs)
    else:
        with pytest.raises(error):
            run(6, **kwargs)
    assert not [thread for thread in threading.enumerate() if thread.name == "jxfer-ahead"]
