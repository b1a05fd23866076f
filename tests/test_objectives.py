"""Losses and metrics against scikit-learn and NumPy, and means that are exact however the examples are batched."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax
from sklearn.metrics import accuracy_score, log_loss

from jxfer.objectives import Objective, classification, means

K = 4


def make_outputs(num_rows: int = 9, seed: int = 0) -> tuple[jnp.ndarray, dict[str, jnp.ndarray]]:
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(rng.normal(scale=3, size=(num_rows, K)), jnp.float32)
    label = jnp.asarray(rng.integers(0, K, num_rows), jnp.int32)
    return logits, {"label": label, "mask": jnp.ones(num_rows, jnp.float32)}


def row(**sums: float) -> dict[str, np.ndarray]:
    """Returns the sums of a batch as they come from the device."""
    return {name: np.asarray(value, np.float32) for name, value in sums.items()}


def mean_metrics(logits, batch) -> dict[str, float]:
    return means([jax.device_get(classification().metrics(logits, batch))])


def probabilities(logits) -> np.ndarray:
    return np.exp(log_softmax(np.asarray(logits, np.float64), axis=-1))


def test_the_loss_is_the_log_loss_of_scikit_learn():
    logits, batch = make_outputs()
    expected = log_loss(batch["label"], probabilities(logits), labels=range(K))
    np.testing.assert_allclose(classification().losses(logits, batch).mean(), expected, rtol=1e-5)
    found = mean_metrics(logits, batch)
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-5)
    assert found["accuracy"] == pytest.approx(accuracy_score(batch["label"], np.argmax(logits, -1)))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_label_smoothing_mixes_with_the_uniform_distribution(smoothing):
    logits, batch = make_outputs()
    targets = (1 - smoothing) * np.eye(K)[batch["label"]] + smoothing / K
    expected = -(targets * log_softmax(np.asarray(logits, np.float64), axis=-1)).sum(-1)
    np.testing.assert_allclose(classification(smoothing).losses(logits, batch), expected, rtol=1e-5)


def test_metrics_are_against_the_true_labels_whatever_the_loss_is_against():
    logits, batch = make_outputs()
    mixed = {**batch, "label_probs": jnp.full((len(logits), K), 1 / K)}
    plain = classification().metrics(logits, batch)
    for metrics in (classification(0.3).metrics(logits, batch), classification().metrics(logits, mixed)):
        assert {name: float(value) for name, value in metrics.items()} == {
            name: float(value) for name, value in plain.items()
        }


def test_mixed_labels_take_the_place_of_the_label():
    logits, batch = make_outputs()
    rng = np.random.default_rng(1)
    probs = rng.dirichlet(np.ones(K), len(logits)).astype(np.float32)
    losses = classification().losses(logits, {**batch, "label_probs": jnp.asarray(probs)})
    expected = -(probs * log_softmax(np.asarray(logits, np.float64), axis=-1)).sum(-1)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    one_hot = {**batch, "label_probs": jnp.eye(K)[batch["label"]]}
    np.testing.assert_array_equal(classification().losses(logits, one_hot), classification().losses(logits, batch))


def test_the_loss_among_the_metrics_is_that_of_optax_to_the_bit():
    logits, batch = make_outputs(1000)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    np.testing.assert_array_equal(classification().metrics(logits, batch)["loss"], jnp.sum(expected))


def test_a_step_takes_the_exponentials_of_loss_and_metrics_once():
    def loss(logits, batch):
        return classification().losses(logits, batch).sum(), classification().metrics(logits, batch)

    program = jax.jit(jax.grad(loss, has_aux=True)).lower(*make_outputs()).compile().as_text()
    assert program.count(" exponential(") == 1


def test_masked_rows_count_nowhere():
    logits, batch = make_outputs()
    masked = {**batch, "mask": batch["mask"].at[5:].set(0)}
    few = {name: value[:5] for name, value in batch.items()}
    sums, expected = classification().metrics(logits, masked), classification().metrics(logits[:5], few)
    assert float(sums["count"]) == 5
    for name in expected:
        np.testing.assert_allclose(sums[name], expected[name], rtol=1e-6, err_msg=name)


def test_perfect_worst_and_ignorant_outputs():
    _, batch = make_outputs()
    right = 50 * jnp.eye(K)[batch["label"]]
    for logits, loss, accuracy in (
        (right, 0.0, 1.0),
        (-right, 50 + np.log(3), 0.0),
        (jnp.zeros((9, K)), np.log(K), None),
    ):
        found = mean_metrics(logits, batch)
        assert found["loss"] == pytest.approx(loss, abs=1e-5)
        assert accuracy is None or found["accuracy"] == accuracy


def test_logits_of_any_size_give_finite_losses():
    _, batch = make_outputs()
    assert np.all(np.isfinite(classification(0.1).losses(1e30 * (1 - jnp.eye(K))[batch["label"]], batch)))


def test_losses_of_bfloat16_logits_are_computed_in_float32():
    logits, batch = make_outputs()
    coarse = logits.astype(jnp.bfloat16)
    losses = classification().losses(coarse, batch)
    assert losses.dtype == jnp.float32
    np.testing.assert_array_equal(losses, classification().losses(coarse.astype(jnp.float32), batch))


@settings(deadline=None, max_examples=30)
@given(values=st.lists(st.integers(0, 2**20), min_size=1, max_size=40), size=st.integers(1, 7))
def test_means_are_exact_however_the_examples_are_batched(values, size):
    # Sums of at most seven such integers are exact in float32, so the batching must not show at all.
    batches = [values[start : start + size] for start in range(0, len(values), size)]
    rows = [row(loss=sum(batch), count=len(batch)) for batch in batches]
    assert means(rows) == {"loss": sum(values) / len(values)}


def test_batches_weigh_by_their_examples():
    assert means([row(loss=6, count=3), row(loss=10, count=1)]) == {"loss": 4.0}


def test_many_small_losses_are_not_lost_beside_a_large_one():
    assert means([row(loss=2**30, count=1), *[row(loss=1, count=1)] * 1023]) == {"loss": 2**20 + 1023 / 1024}


def test_equal_objectives_are_equal_and_meet_the_protocol():
    assert classification(0.1) == classification(0.1)
    assert hash(classification(0.1)) == hash(classification(0.1))
    assert classification(0.1) != classification()
    assert isinstance(classification(), Objective)


def test_the_loss_agrees_with_integer_labels_of_optax():
    logits, batch = make_outputs()
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    np.testing.assert_allclose(classification().losses(logits, batch), expected, rtol=1e-5)
