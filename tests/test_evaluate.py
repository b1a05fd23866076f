"""Evaluation counts each example once, in order, in inference mode, whatever the batch size and the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from networks import Net
from sklearn.metrics import accuracy_score

from jxfer.config import Experiment, MeshConfig
from jxfer.data import ArraySplit
from jxfer.evaluate import evaluate
from jxfer.objectives import classification
from jxfer.partition import Partition, fingerprint
from jxfer.phase import evaluate_model
from jxfer.sharding import make_mesh
from jxfer.state import init_state, merge_state, place_state
from jxfer.step import make_eval_step

SIZE = 29
MODEL = Net(nnx.Rngs(0))
MODEL.bn.mean.set_value(MODEL.bn.mean.get_value() + 0.3)
EVAL_STEP = make_eval_step(classification())


def make_split() -> ArraySplit:
    rng = np.random.default_rng(0)
    image = rng.normal(size=(SIZE, 8, 8, 1)).astype(np.float32)
    ids = np.array([f"test/{index}" for index in range(SIZE)])
    return ArraySplit(ids, rng.integers(0, 5, SIZE).astype(np.int32), {"image": image})


def expected_logits() -> np.ndarray:
    model = nnx.clone(MODEL)
    model.eval()
    return np.asarray(model(jnp.asarray(make_split().arrays["image"])))


def run(batch_size: int, *, num_devices: int = 1):
    state, fixed = init_state(MODEL, Partition.of(MODEL, [("**", "all")]), optax.sgd(0.1))
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:num_devices])
    state, fixed = place_state(state, fixed, mesh, MeshConfig())
    before = fingerprint(merge_state(state, fixed))
    found = evaluate(EVAL_STEP, state, fixed, make_split(), batch_size=batch_size, mesh=mesh)
    assert fingerprint(merge_state(state, fixed)) == before, "evaluation changes nothing"
    return found


@pytest.mark.parametrize(("batch_size", "num_devices"), [(29, 1), (8, 1), (64, 1), (16, 8)])
def test_each_example_counts_once_whatever_the_batch_size_and_the_mesh(batch_size, num_devices):
    metrics, outputs = run(batch_size, num_devices=num_devices)
    logits, labels = expected_logits(), make_split().labels
    assert outputs.shape == (SIZE, 5)
    assert outputs.dtype == np.float32
    np.testing.assert_allclose(outputs, logits, rtol=1e-4, atol=1e-6)  # float32, other batch sizes, other blocking
    losses = optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits), jnp.asarray(labels))
    assert metrics == {
        "loss": pytest.approx(float(np.mean(np.asarray(losses, np.float64))), rel=1e-5),
        "accuracy": accuracy_score(labels, logits.argmax(-1)),
    }


def test_evaluating_a_model_with_other_weights_compiles_nothing(caplog):
    def evaluate_new(seed):
        return evaluate_model(Experiment("e"), 5, Net(nnx.Rngs(seed)), make_split())

    first, _ = evaluate_new(0)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        second, _ = evaluate_new(1)
    assert not [record for record in caplog.records if "Compiling jit(evaluation)" in record.getMessage()]
    assert second != first
