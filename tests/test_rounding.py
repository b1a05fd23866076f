"""Frozen parameters in fewer bits: bounds of the rounding, one function from training to prediction, small deltas."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
from flax import nnx
from networks import Net, make_batch

from jxfer import ablate, checkpoint, methods, rounding, source
from jxfer.config import Experiment, MeshConfig, ModelConfig, SearchConfig, TrainConfig
from jxfer.objectives import classification
from jxfer.partition import Partition, arrays_of, fingerprint
from jxfer.plan import plan_method
from jxfer.predict import classifier
from jxfer.rounding import Held, expand, hold, rounded
from jxfer.sharding import make_mesh, put_batch
from jxfer.state import hold_frozen, init_state, merge_state, place_state
from jxfer.step import make_eval_step, make_train_step
from jxfer.task import Task, load_data
from jxfer.typing import InputError

FEWER = ("bfloat16", "int8")
RULES = (("head/**", "head"), ("layers/11/**", "last"), ("**", "frozen"))
MODEL = "tiny_convnet"
TWO_RATES = SearchConfig(learning_rate=(1e-2, 2e-2))
"""Which a phase that trains a head takes as one population."""


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(3, 3, 8, 16)) * 10.0 ** rng.uniform(-6, 3, 16)  # channels of very different size
    kernel[..., 3] = 0
    kernel[..., 4] *= 1e-36  # would make steps that are no normal numbers
    table = rng.normal(size=(12, 8)) * 10.0 ** rng.uniform(-3, 3, (12, 1))
    small = {"conv/bias": rng.normal(size=16), "norm/scale": np.ones(16)}
    arrays = {"conv/kernel": kernel, "token/embedding": table, **small}
    return {path: value.astype(np.float32) for path, value in arrays.items()}


def test_int8_moves_no_value_by_more_than_half_the_step_of_its_channel():
    arrays = weights()
    held = hold(arrays, "int8")
    for path, others in (("conv/kernel", (0, 1, 2)), ("token/embedding", (1,))):
        exact = arrays[path].astype(np.float64)
        step = np.abs(exact).max(axis=others, keepdims=True) / 127  # symmetric absmax
        used = held[path].scale
        assert held[path].values.dtype == np.int8
        assert (used.shape, used.dtype) == (step.shape, np.float32)
        normal = step > 2.0**-100
        assert np.all((used >= step) | ~normal)
        assert np.all((used <= step * (1 + 2.0**-15)) | ~normal)  # of 16 significant bits
        error = np.abs(rounded(path, arrays[path], "int8").astype(np.float64) - exact)
        assert np.all(error <= used / 2)
        assert error.max() > 0.49 * used.max()  # the bound is met, so nothing finer is claimed
        assert np.abs(held[path].values).max() == 127
    assert held["conv/bias"] is arrays["conv/bias"]
    assert held["norm/scale"] is arrays["norm/scale"]


def test_bfloat16_is_rounded_to_nearest():
    arrays = weights()
    expected = np.asarray(jnp.asarray(arrays["conv/kernel"]).astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(rounded("conv/kernel", arrays["conv/kernel"], "bfloat16"), expected)


@pytest.mark.parametrize("dtype", FEWER)
def test_rounding_again_changes_no_bit_and_the_device_expands_to_the_same(dtype):
    arrays = weights()
    once = {path: rounded(path, value, dtype) for path, value in arrays.items()}
    again = {path: rounded(path, value, dtype) for path, value in once.items()}
    on_device = jax.jit(lambda held: expand(held))(hold(arrays, dtype))
    assert fingerprint(once) == fingerprint(again) == fingerprint(on_device) != fingerprint(arrays)


def test_float32_holds_everything_as_it_is():
    arrays = weights()
    assert all(value is arrays[path] for path, value in hold(arrays, "float32").items())


@pytest.mark.parametrize("dtype", FEWER)
def test_a_parameter_that_is_not_finite_is_named(dtype):
    with pytest.raises(InputError, match="frozen parameter `a/kernel` has values that are not finite"):
        hold({"a/kernel": np.full((2, 2), np.nan, np.float32)}, dtype)


def start(dtype: str, *, rounded_first: bool = False):
    """Returns partition, state and fixed part of a network whose head and last layer train."""
    model = Net(nnx.Rngs(0), width=16)
    partition = Partition.of(model, RULES)
    if rounded_first:
        arrays = rounding.round_frozen(arrays_of(model), partition, dtype)
        model = partition.assemble(nnx.graphdef(model), arrays)
        dtype = "float32"
    state, fixed = init_state(model, partition, optax.sgd(0.1))
    return partition, state, hold_frozen(fixed, dtype)


def train(state, fixed, *, put=lambda batch: batch):
    step, losses = make_train_step(classification()), []
    for seed in range(3):
        state, metrics = step(state, fixed, put(make_batch(seed=seed)))
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.mark.parametrize("dtype", FEWER)
def test_a_step_on_what_is_held_is_a_step_on_the_rounded_model(dtype):
    partition, state, fixed = start(dtype)
    kinds = {path: type(value) for path, value in fixed.params.items()}
    assert {path for path, kind in kinds.items() if kind is Held} == {"stem/kernel"} | {
        f"layers/{i}/kernel" for i in range(11)
    }
    before = fingerprint({**state.params, **state.variables, **fixed.params, **fixed.variables})
    state, losses = train(state, fixed)
    after = fingerprint({**state.params, **state.variables, **fixed.params, **fixed.variables})
    assert partition.audit(before, after, fixed.definition.train_graphdef).ok
    _, expected_state, expected_fixed = start(dtype, rounded_first=True)
    expected_state, expected_losses = train(expected_state, expected_fixed)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-6)
    merged, expected = merge_state(state, fixed), merge_state(expected_state, expected_fixed)
    frozen = {leaf.path for leaf in partition.leaves if not leaf.moves}
    assert fingerprint({p: merged[p] for p in frozen}) == fingerprint({p: expected[p] for p in frozen})
    (sums, outputs), (_, exact) = (
        make_eval_step(classification())(*each, make_batch(seed=9))
        for each in ((state, fixed), (expected_state, expected_fixed))
    )
    np.testing.assert_allclose(outputs, exact, rtol=1e-5, atol=1e-6)
    assert float(sums["count"]) == 16


def test_what_is_held_is_sharded_by_the_rules_of_frozen_parameters():
    config = MeshConfig(fsdp=4, frozen=(("stem/kernel", "None,None,None,fsdp"), ("**", "replicated")))
    mesh = make_mesh(config)
    _, state, fixed = start("int8")
    state, fixed = place_state(state, fixed, mesh, config)
    held = fixed.params["stem/kernel"]
    assert held.values.addressable_shards[0].data.shape == (3, 3, 1, 4)
    assert held.scale.addressable_shards[0].data.shape == (1, 1, 1, 4)
    _, losses = train(state, fixed, put=lambda batch: put_batch(jax.tree.map(np.asarray, batch), mesh))
    np.testing.assert_allclose(losses, train(*start("int8")[1:])[1], rtol=1e-5)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The runs of methods that freeze, in int8, kept as deltas: their rows, by method, and where they are."""
    root = tmp_path_factory.mktemp("int8")
    with pytest.MonkeyPatch.context() as monkeypatch:
        runs.add_models(monkeypatch)
        runs.use_devices(monkeypatch, 1)
        experiment = runs.with_train(runs.write_data(root / "data"), frozen_dtype="int8")
        experiment = dataclasses.replace(experiment, model=ModelConfig(MODEL), save="delta", search=TWO_RATES)
        tried = (methods.partial, methods.logistic_probe, runs.TWO_PHASES)
        ablate.ablate(runs.with_methods(experiment, *tried), root / "out", runs.QUIET, command="")
        yield experiment, root / "out", {row["method"]: row for row in runs.rows_on_disk(root / "out")}


@pytest.mark.parametrize("method", ["partial", "logistic_probe", "two_phases"])
def test_what_is_measured_stored_and_saved_is_what_predict_gives(finished, method):
    experiment, out, rows = finished
    row, directory = rows[method], out / "runs" / f"{method}-shots3-seed0"
    assert (row["status"], row["audit"]["frozen_unchanged"]) == ("ok", True)
    if method == "two_phases":
        assert row["population"][0]["parts"] == [2]
    kept = np.load(directory / "predictions.npz")
    run = source.load_run(directory)
    data = load_data(experiment.target)
    images = {name: image for split in data.splits.values() for name, image in _images(split)}
    for ids, logits in (("ids", "logits"), ("validation_ids", "validation_logits")):
        given = classifier(run)(np.stack([images[name] for name in kept[ids].tolist()]))
        np.testing.assert_allclose(given, kept[logits], rtol=1e-5, atol=1e-5)
    # Validation was measured in the phase, on features stored of what the step holds in int8.
    logits, labels = kept["validation_logits"].astype(np.float64), kept["validation_labels"]
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels]
    np.testing.assert_allclose(row["validation_metrics"]["loss"], losses.mean(), rtol=1e-5)


def _images(split):
    return zip(split.ids.tolist(), split.read(np.arange(len(split)))["image"], strict=True)


def test_a_delta_says_of_what_was_rounded_only_that_it_was(finished):
    _, out, _ = finished
    directory = out / "runs" / "partial-shots3-seed0"
    kept, metadata = checkpoint.load_arrays(directory / "checkpoints" / "final")
    assert set(kept) == {path for path in metadata["paths"] if path.startswith(("head/", "layer2/"))}
    base = source.load_source(out / "source")
    whole = source.load_run(directory).arrays
    frozen = [path for path in whole if path not in kept]
    assert metadata["base"]["rounded"] == {path: "int8" for path in frozen if path.endswith("kernel")}
    for path in frozen:
        np.testing.assert_array_equal(whole[path], rounded(path, base.arrays[path], "int8"), path)
        assert np.any(whole[path] != base.arrays[path]) == path.endswith("kernel")


def test_a_plan_says_what_holding_in_int8_saves():
    experiment = Experiment("test", model=ModelConfig("convnet"), train=TrainConfig(frozen_dtype="int8", batch_size=4))
    task = Task(tuple("abcdef"), tuple("dba"), (8, 8, 1))
    planned = plan_method(experiment, methods.linear_probe, task)
    (phase,) = planned.to_json()["phases"]
    frozen = [leaf for leaf in phase["leaves"] if leaf["label"] == "frozen" and leaf["kind"] == "parameter"]
    kernels = [leaf for leaf in frozen if len(leaf["shape"]) > 1]
    saved = sum(3 * leaf["count"] - 4 * leaf["shape"][-1] for leaf in kernels)
    assert phase["frozen_bytes_saved"] == saved > 0
    assert phase["frozen_bytes"] == 4 * sum(leaf["count"] for leaf in frozen) - saved
    assert f"frozen parameters in int8: {phase['frozen_bytes']:,} bytes, {saved:,} fewer than in float32" in str(
        planned
    )
    assert "frozen parameters" not in str(
        plan_method(dataclasses.replace(experiment, train=TrainConfig()), methods.linear_probe, task)
    )
