"""Tests of what follows a loss or gradient that is not finite: a stop, a skipped step, or the last checkpoint."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
from flax import nnx
from networks import Net, make_batch
from PIL import Image

from jxfer import checkpoint, data, methods, phase, plan
from jxfer.config import Experiment, MeshConfig, SearchConfig
from jxfer.context import order_seed
from jxfer.data.pipeline import batch_indices
from jxfer.loop import Session
from jxfer.objectives import classification
from jxfer.partition import Partition
from jxfer.run import run
from jxfer.search import Job
from jxfer.sharding import make_mesh, put_batch
from jxfer.state import STACKED, init_state, place_state
from jxfer.step import make_train_step
from jxfer.task import Task, load_data
from jxfer.typing import InputError, InterruptedRun

ALL = [("**", "all")]
STEPS, BATCH = 12, 4


# The step


def poisoned(model, batch):
    """The model's outputs, which a `poison` of 0 leaves as they are, while their gradients become NaN."""
    outputs = model(batch["image"])
    # At 0 the root has no slope; all classes move alike, so that the loss does not notice.
    return outputs + jnp.sqrt(jnp.abs(jnp.sum(outputs)) * batch["poison"][:, None])


def with_poison(value, seed=0):
    return {**make_batch(seed=seed), "poison": jnp.full(16, value, jnp.float32)}


BAD = {
    "loss": {**with_poison(1.0), "image": make_batch()["image"].at[3].set(jnp.nan)},
    "gradients": with_poison(0.0),
    "an overflow": {**with_poison(1.0), "image": make_batch()["image"].at[3].set(jnp.inf)},
}


def start(model, **kwargs):
    partition = Partition.of(model, ALL)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(1e-2, 0.0, 9)))
    return init_state(model, partition, tx, ema=True, skips=True, **kwargs)


def skipping_step(num_microbatches=1):
    return make_train_step(
        classification(), apply=poisoned, ema_decay=0.9, num_microbatches=num_microbatches, skip_non_finite=True
    )


def bits(state):
    return [
        np.asarray(
            jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        ).tobytes()
        for name in STACKED
        for leaf in jax.tree.leaves(getattr(state, name))
    ]


def test_gradients_can_be_nan_while_the_loss_is_finite():
    state, fixed = start(Net(nnx.Rngs(0)))
    _, metrics = make_train_step(classification(), apply=poisoned, ema_decay=0.9)(state, fixed, BAD["gradients"])
    assert np.isfinite(metrics["loss"])
    assert np.isnan(metrics["grad_norm"])


@pytest.mark.parametrize("num_microbatches", [1, 4])
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_skipped_step_leaves_everything_as_it_was_bit_for_bit(bad, num_microbatches):
    train_step = skipping_step(num_microbatches)
    state, fixed = start(Net(nnx.Rngs(0)))
    state, _ = train_step(state, fixed, with_poison(1.0))
    before = bits(state)
    state, metrics = train_step(state, fixed, bad)
    assert bits(state) == before
    assert int(state.step) == 2
    assert {name: float(value) for name, value in metrics.items()} == {
        **dict.fromkeys(metrics, 0.0),
        "skipped": 1.0,
    }
    state, metrics = train_step(state, fixed, with_poison(1.0, seed=1))
    assert bits(state) != before
    assert float(metrics["skipped"]) == 0
    assert float(metrics["count"]) == 16
    assert {name: int(value) for name, value in state.skipped.items()} == {"in_a_row": 0, "total": 1}


def test_steps_with_skips_between_end_where_the_good_steps_alone_do():
    train_step = skipping_step()
    ends = []
    for stream in ("gbgbbgg", "gggg"):
        state, fixed = start(Net(nnx.Rngs(0)))
        seeds = iter(range(4))
        for kind in stream:
            state, _ = train_step(state, fixed, with_poison(1.0, next(seeds)) if kind == "g" else BAD["loss"])
        ends.append(state)
    assert bits(ends[0]) == bits(ends[1])
    assert int(ends[0].skipped["total"]) == 3


def test_skipping_gives_what_softmax_regression_written_by_hand_gives():
    rng = np.random.default_rng(0)
    model = nnx.Linear(6, 3, rngs=nnx.Rngs(0))
    kernel, bias = np.float64(model.kernel[...]), np.zeros(3)
    partition = Partition.of(model, ALL)
    state, fixed = init_state(model, partition, optax.sgd(0.5, momentum=0.9), skips=True)
    train_step = make_train_step(classification(), skip_non_finite=True)
    velocity = [np.zeros_like(kernel), np.zeros_like(bias)]
    for index in range(6):
        x, y = rng.normal(size=(10, 6)), rng.integers(0, 3, 10)
        x[0, 0] = np.inf if index in (1, 4) else x[0, 0]
        state, _ = train_step(state, fixed, {"image": jnp.float32(x), "label": jnp.int32(y)})
        if index in (1, 4):
            continue
        logits = x @ kernel + bias
        errors = np.exp(logits) / np.exp(logits).sum(1, keepdims=True) - np.eye(3)[y]
        velocity = [0.9 * v + grad for v, grad in zip(velocity, (x.T @ errors / 10, errors.mean(0)), strict=True)]
        kernel, bias = kernel - 0.5 * velocity[0], bias - 0.5 * velocity[1]
    np.testing.assert_allclose(state.params["kernel"], kernel, rtol=1e-5)
    np.testing.assert_allclose(state.params["bias"], bias, rtol=1e-5, atol=1e-7)


def test_eight_devices_skip_together(caplog):
    config = MeshConfig(fsdp=4, frozen=(("**", "fsdp"),))
    mesh = make_mesh(config)
    state, fixed = place_state(*start(Net(nnx.Rngs(0), width=64)), mesh, config)
    train_step = skipping_step()
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for index in range(4):
            batch = BAD["loss"] if index == 2 else with_poison(1.0, index)  # one bad row, which one device holds
            before = bits(state)
            state, metrics = train_step(state, fixed, put_batch(jax.device_get(batch), mesh))
            assert (bits(state) == before) == (index == 2)
            assert float(metrics["skipped"]) == (index == 2)
    assert len([record for record in caplog.messages if record.startswith("Compiling jit(train_step)")]) == 1


def test_a_state_that_does_not_count_skips_is_refused():
    model = Net(nnx.Rngs(0))
    state, fixed = init_state(model, Partition.of(model, ALL), optax.sgd(0.1))
    with pytest.raises(InputError, match=r"needs a state of init_state\(skips=True\)"):
        make_train_step(classification(), skip_non_finite=True)(state, fixed, make_batch())


# Runs


def nan_on_white(model, batch):
    """The model's outputs, NaN for an image that is all white."""
    white = jnp.min(batch["image"], axis=(1, 2, 3)) > 0.99
    return jnp.where(white[:, None], jnp.nan, model(batch["image"]))


@pytest.fixture
def experiment(tmp_path, monkeypatch) -> Experiment:
    """A target of which one training image makes the model return NaN."""
    runs.add_models(monkeypatch)
    runs.use_devices(monkeypatch, 1)
    monkeypatch.setattr(plan, "from_input", nan_on_white)
    experiment = runs.with_train(runs.write_data(tmp_path / "data"), num_steps=STEPS, batch_size=BATCH, ema_decay=0.8)
    return dataclasses.replace(experiment, shots=(None,), features="off")


def poison_one(experiment: Experiment, position: int) -> int:
    """Whitens the training example at a position of seed 0, and returns how many training examples there are."""
    train = data.draw(load_data(experiment.target), experiment.target, None, 0).train
    file = Path(experiment.target.name.removeprefix("folder:")) / str(train.ids[position])
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(file)
    load_data.cache_clear()
    return len(train)


def batches_of(num: int, order: int) -> list[set[int]]:
    seed = order_seed(0, 0, order)
    return [
        {int(i) for i in batch_indices(num_examples=num, batch_size=BATCH, seed=seed, batch=batch)}
        for batch in range(STEPS)
    ]


def finish(experiment, directory, *, stops=(), notes=None):
    job = Job(experiment, methods.scratch, None, 0)
    for num_steps in stops:
        with pytest.raises(InterruptedRun):
            run(job, directory, runs.stop_after(num_steps), source=None)
    session = Session(lambda what, done, total: None, lambda: False, note=(notes if notes is not None else []).append)
    row = run(job, directory, session, source=None)
    log = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return row, log


def final(directory):
    return {
        path: value.tobytes() for path, value in checkpoint.load_arrays(directory / "checkpoints" / "final")[0].items()
    }


@pytest.mark.parametrize(("devices", "num_microbatches"), [(1, 1), pytest.param(4, 1, marks=pytest.mark.slow), (2, 2)])
def test_a_run_skips_counts_and_resumes_to_the_same_bits(experiment, tmp_path, monkeypatch, devices, num_microbatches):
    runs.use_devices(monkeypatch, devices)
    experiment = runs.with_train(experiment, num_microbatches=num_microbatches)
    num = poison_one(experiment, 5)
    experiment = runs.with_train(experiment, non_finite="skip", checkpoint_every=3)
    bad = sum(5 in batch for batch in batches_of(num, 0))
    assert 1 <= bad < STEPS / 2
    row, log = finish(experiment, tmp_path / "whole")
    assert row["status"] == "ok"
    assert (row["skipped_steps"], row["rollbacks"]) == (bad, 0)
    windows = [each for each in log if each["split"] == "train"]
    assert sum(each["skipped_steps"] for each in windows) == bad
    assert all(np.isfinite(value) for each in windows for value in each.values() if isinstance(value, float))
    again, _ = finish(experiment, tmp_path / "stopped", stops=(4, 3))
    assert again["skipped_steps"] == bad
    assert final(tmp_path / "stopped") == final(tmp_path / "whole")


def test_the_default_still_stops(experiment, tmp_path):
    poison_one(experiment, 5)
    row, _ = finish(experiment, tmp_path / "run")
    assert row["status"] == "failed"
    assert row["error"].startswith("loss is nan at step")


def test_too_many_skips_in_a_row_end_the_run(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "from_input", lambda model, batch: model(batch["image"]) * jnp.nan)
    experiment = runs.with_train(experiment, non_finite="skip", num_steps=30, eval_every=30)
    row, _ = finish(experiment, tmp_path / "run")
    assert row["status"] == "failed"
    assert row["error"].startswith(
        "loss or gradients were not finite in 10 steps in a row, up to step 10, and all were"
    )
    short = runs.with_train(experiment, num_steps=4, eval_every=4)
    assert "in 4 steps in a row, up to step 4" in finish(short, tmp_path / "short")[0]["error"]


def rolling(experiment: Experiment, every: int | None) -> tuple[Experiment, int]:
    """Poisons an example that order 0 meets at step 6 or later for the first time, and order 1 never from there on."""
    train = data.draw(load_data(experiment.target), experiment.target, None, 0).train
    first, then = batches_of(len(train), 0), batches_of(len(train), 1)
    steps = 9
    met = {
        position: next(step for step, batch in enumerate(first[:steps], start=1) if position in batch)
        for position in range(len(train))
        if any(position in batch for batch in first[:steps])
    }
    back = {position: (step - 1) // every * every if every else 0 for position, step in met.items()}
    position = next(p for p in met if met[p] >= 5 and not any(p in batch for batch in then[back[p] : steps]))
    poison_one(experiment, position)
    settings = {"num_steps": steps, "eval_every": 3, "log_every": 100}
    return runs.with_train(experiment, non_finite="rollback", checkpoint_every=every, **settings), back[position]


@pytest.mark.parametrize(("every", "devices"), [pytest.param(2, 1, marks=pytest.mark.slow), (None, 1), (2, 4)])
def test_a_run_goes_back_reorders_its_data_and_ends_the_same_however_often_it_is_stopped(
    experiment, tmp_path, monkeypatch, every, devices
):
    runs.use_devices(monkeypatch, devices)
    experiment = dataclasses.replace(experiment, target=dataclasses.replace(experiment.target, validation_fraction=0.1))
    experiment, back = rolling(experiment, every)
    notes: list[str] = []
    row, log = finish(experiment, tmp_path / "whole", notes=notes)
    assert row["error"] is None
    assert (row["rollbacks"], row["steps"]) == (1, 9)
    assert row["train_flops"] > 9 * row["step_flops"], "what was given up was computed too"
    (rolled,) = [each for each in log if "rollbacks" in each]
    assert rolled["step"] == back + 1
    assert rolled["why"].startswith("loss is nan at step")
    (note,) = notes
    assert f"back to {f'step {back}' if back else 'the phase'}" in note
    assert note.endswith("another order (1 of 3 rollbacks)")
    finish(experiment, tmp_path / "again")
    assert final(tmp_path / "again") == final(tmp_path / "whole")
    stopped, log = finish(experiment, tmp_path / "stopped", stops=(4, 1, 3))
    assert runs.timeless(stopped) == runs.timeless(row)
    assert final(tmp_path / "stopped") == final(tmp_path / "whole")
    assert len([each for each in log if "rollbacks" in each]) == 1


class Killed(BaseException):
    """Ends a run where it stands, with nothing saved for it."""


def test_killed_after_any_step_a_run_that_rolls_back_ends_the_same(experiment, tmp_path):
    experiment = dataclasses.replace(experiment, target=dataclasses.replace(experiment.target, validation_fraction=0.1))
    experiment, _ = rolling(experiment, 2)
    row, log = finish(experiment, tmp_path / "whole")
    job = Job(experiment, methods.scratch, None, 0)
    for num_steps in (1, 3, 1, 2, 3, 3):
        left = iter(range(num_steps - 1))

        def progress(what, done, total, left=left):
            if next(left, None) is None:
                raise Killed

        with pytest.raises(Killed):
            run(job, tmp_path / "killed", Session(progress, lambda: False), source=None)
    again, log_again = finish(experiment, tmp_path / "killed")
    assert runs.timeless(again) == runs.timeless(row)
    assert final(tmp_path / "killed") == final(tmp_path / "whole")
    assert [each for each in log_again if "rollbacks" in each] == [each for each in log if "rollbacks" in each]


def test_a_run_that_no_order_helps_ends_after_the_tries_that_it_has(experiment, tmp_path):
    poison_one(experiment, 5)
    notes: list[str] = []
    experiment = runs.with_train(experiment, non_finite="rollback", num_steps=STEPS, eval_every=STEPS)
    row, log = finish(experiment, tmp_path / "run", notes=notes)
    assert row["status"] == "failed"
    assert row["error"].endswith("(after 3 rollbacks, each to another order of the data)")
    assert len(notes) == phase.MAX_ROLLBACKS == len([each for each in log if "rollbacks" in each])


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_variants_train_apart_where_each_goes_its_own_way(experiment, policy):
    search = SearchConfig(learning_rate=(1e-3, 1e-2))
    experiment = runs.with_train(dataclasses.replace(experiment, search=search, features="auto"), non_finite=policy)
    task = Task(runs.SOURCE_CLASSES, runs.TARGET_CLASSES, (8, 8, 1))
    (population,) = plan.plan_method(experiment, methods.linear_probe, task).populations
    assert population.parts == (1, 1)
    assert f"train.non_finite={policy}" in population.why


def test_each_variant_skips_the_steps_that_it_skips_alone_where_they_would_fail_together(experiment, tmp_path):
    source = runs.write_source(tmp_path / "source", "tiny_convnet")
    bad = sum(5 in batch for batch in batches_of(poison_one(experiment, 5), 0))

    def probe(policy, name, *rates):
        settings = runs.with_train(dataclasses.replace(experiment, search=SearchConfig(rates)), non_finite=policy)
        row = run(Job(settings, methods.linear_probe, None, 0), tmp_path / name, runs.QUIET, source=source)
        return row, [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    searching = dataclasses.replace(experiment, search=SearchConfig((1e-3, 1e-2)))
    task = Task(runs.SOURCE_CLASSES, runs.TARGET_CLASSES, (8, 8, 1))
    assert plan.plan_method(searching, methods.linear_probe, task).populations[0].parts == (2,)
    row, _ = probe("stop", "stops", 1e-3, 1e-2)
    assert row["status"] == "failed", "together they meet the same image"
    row, log = probe("skip", "skips", 1e-3, 1e-2)
    assert (row["status"], row["skipped_steps"], row["population"][0]["parts"]) == ("ok", bad, [1, 1])
    for rate, variant in zip((1e-3, 1e-2), row["variants"], strict=True):
        alone, _ = probe("skip", f"alone-{rate}", rate)
        assert variant["validation_metrics"] == alone["validation_metrics"]
        windows = [each for each in log if (each["split"], each["variant"]) == ("train", variant["variant"])]
        assert sum(each["skipped_steps"] for each in windows) == bad
