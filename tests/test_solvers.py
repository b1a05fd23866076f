"""Solvers against scikit-learn on the same features, closed forms, and the laws they obey."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import decomposition
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

import jxfer
from jxfer.config import to_dict
from jxfer.solvers import logistic
from jxfer.solvers.basis import BLOCK, principal, principal_with_targets
from jxfer.solvers.logistic import LogisticPath
from jxfer.solvers.maps import PCA, SVD, Centre, Standardise, Whiten
from jxfer.solvers.means import NearestMean
from jxfer.solvers.neighbours import NearestNeighbours
from jxfer.solvers.ridge import RidgePath
from jxfer.solvers.selection import SelectedLogistic
from jxfer.typing import InputError

STRENGTHS = (1e-3, 1e-2, 1.0)
MAPS = [Centre(), Standardise(), PCA(4), SVD(4), Whiten(), Whiten(4)]
SOLVERS = [
    LogisticPath(STRENGTHS),
    RidgePath(STRENGTHS),
    NearestMean(),
    NearestNeighbours((1, 4)),
    SelectedLogistic(fractions=(0.5, 1.0), strengths=(1e-2,)),
]


def make_features(num_examples: int = 120, num_features: int = 6, num_classes: int = 3, *, seed: int = 0):
    """Returns correlated features away from the origin, classes that overlap, and a few more examples to predict."""
    rng = np.random.default_rng(seed)
    total = num_examples + 40
    labels = (np.arange(total) % num_classes).astype(np.int32)
    centres = rng.normal(size=(num_classes, num_features))
    mix = rng.normal(size=(num_features, num_features)) * np.logspace(0, -1.5, num_features)
    features = ((centres[labels] + 1.5 * rng.normal(size=(total, num_features))) @ mix + 2).astype(np.float32)
    return jnp.asarray(features[:num_examples]), labels[:num_examples], jnp.asarray(features[num_examples:])


def objective(kernel, bias, features, labels, strength: float) -> float:
    """The logistic objective in float64."""
    kernel = np.asarray(kernel, np.float64)
    logits = np.asarray(features, np.float64) @ kernel + np.asarray(bias, np.float64)
    entropy = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
    return (entropy - logits[np.arange(len(labels)), labels]).mean() + strength / 2 * (kernel**2).sum()


def reference(features, labels, strength: float) -> LogisticRegression:
    factor = 2 if labels.max() == 1 else 1  # of two classes scikit-learn's model has one logit instead of two
    model = LogisticRegression(C=factor / (len(labels) * strength), tol=1e-9, max_iter=10_000)
    return model.fit(np.asarray(features, np.float64), labels)


@pytest.mark.parametrize(
    "shape", [(120, 6, 3), (40, 60, 3), (60, 5, 2)], ids=["tall", "more features than examples", "two classes"]
)
def test_logistic_regression_has_the_loss_and_the_predictions_of_scikit_learn(shape):
    features, labels, test = make_features(*shape)
    heads = LogisticPath(STRENGTHS, tolerance=1e-4).fit(features, labels, shape[2])
    assert heads.converged == (True, True, True)
    for index, strength in enumerate(STRENGTHS):
        expected = reference(features, labels, strength)
        kernel, bias = expected.coef_.T, expected.intercept_
        if shape[2] == 2:
            kernel, bias = np.hstack([-kernel / 2, kernel / 2]), np.array([-bias[0] / 2, bias[0] / 2])
        loss = objective(kernel, bias, features, labels, strength)
        arrays = heads.arrays(index)
        assert objective(arrays["kernel"], arrays["bias"], features, labels, strength) == pytest.approx(loss, abs=1e-4)
        agree = np.argmax(heads.logits(test, index), 1) == expected.predict(test)
        assert agree.mean() >= 1 - 1 / len(test), "a test example may lie on the border"


def test_logistic_regression_has_the_coefficients_of_scikit_learn():
    features, labels, _ = make_features()
    # A strongly convex problem, whose solution the gradient pins down.
    heads = LogisticPath((0.1,), tolerance=3e-5).fit(features, labels, 3)
    expected = reference(features, labels, 0.1)
    np.testing.assert_allclose(heads.kernels[0], expected.coef_.T, atol=1e-4)
    bias = expected.intercept_ - expected.intercept_.mean()
    np.testing.assert_allclose(heads.biases[0] - jnp.mean(heads.biases[0]), bias, atol=5e-4)  # no penalty holds it


def test_a_linear_head_by_adam_comes_to_the_loss_and_the_predictions_of_scikit_learn():
    features, labels, test = make_features()
    strength, num_steps = 0.01, 1000
    head = nnx.Linear(6, 3, rngs=nnx.Rngs(0))
    partition = jxfer.Partition.of(head, [("**", "head")])
    tx = partition.optimizer({"head": optax.adam(optax.cosine_decay_schedule(0.3, num_steps))})
    state, fixed = jxfer.init_state(head, partition, tx)
    train_step = jxfer.make_train_step(
        jxfer.objectives.classification(),
        apply=lambda model, batch: model(batch["features"]),
        penalties=(lambda params, _: strength / 2 * jnp.sum(jnp.square(params["kernel"])),),
    )
    for _ in range(num_steps):
        state, _ = train_step(state, fixed, {"features": features, "label": labels})
    expected = reference(features, labels, strength)
    loss = objective(expected.coef_.T, expected.intercept_, features, labels, strength)
    found = state.params
    assert objective(found["kernel"], found["bias"], features, labels, strength) == pytest.approx(loss, abs=1e-4)
    agree = np.argmax(test @ found["kernel"] + found["bias"], 1) == expected.predict(test)
    assert agree.mean() >= 1 - 1 / len(test), "a test example may lie on the border"


def test_a_path_that_is_split_is_the_path():
    features, labels, _ = make_features()
    strengths = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
    whole, split = LogisticPath(strengths), LogisticPath(strengths, memory_bytes=20_000)
    assert (whole.num_together(120, 6, 3), split.num_together(120, 6, 3)) == (5, 2)
    one, other = (solver.fit(features, labels, 3) for solver in (whole, split))
    assert (one.names, one.converged) == (other.names, other.converged)
    np.testing.assert_allclose(one.kernels, other.kernels, rtol=1e-2, atol=1e-3)  # each stops at the tolerance


def test_a_path_in_any_order_and_with_copies_has_the_heads_of_each_strength_alone():
    features, labels, test = make_features()
    strengths = (1.0, 1e-3, 1e-1, *np.geomspace(1e-4, 10, 30).tolist(), 1e-3)
    heads = LogisticPath(strengths, tolerance=1e-4).fit(features, labels, 3)
    assert heads.names == tuple(f"strength={strength:g}" for strength in strengths)
    assert all(heads.converged)
    np.testing.assert_array_equal(heads.kernels[1], heads.kernels[-1])
    for index in (0, 1, 2, 8, 20):
        alone = LogisticPath(strengths[index : index + 1], tolerance=1e-4).fit(features, labels, 3)
        np.testing.assert_allclose(heads.logits(test, index), alone.logits(test, 0), rtol=1e-2, atol=1e-2)


def test_what_lies_between_solved_strengths_costs_few_iterations():
    features, labels, _ = make_features(400, 30, 4)
    strengths = tuple(np.geomspace(1e-4, 1, 48).tolist())
    path, alone = (LogisticPath(some).fit(features, labels, 4) for some in (strengths, strengths[:1]))
    assert all(path.converged)
    assert path.flops < 24 * alone.flops


def test_a_search_in_stretches_of_few_iterations_is_the_search_bit_for_bit(monkeypatch):
    features, labels, _ = make_features()
    whole = LogisticPath(STRENGTHS).fit(features, labels, 3)
    monkeypatch.setattr(logistic, "STRETCH_FLOPS", 3 * LogisticPath(STRENGTHS).cost(120, 6, 3)[0])
    asked: list[None] = []
    stretched = LogisticPath(STRENGTHS).fit(features, labels, 3, proceed=lambda: asked.append(None))
    assert len(asked) == -(-LogisticPath.max_iterations // 3), "so often, however soon it was solved"
    np.testing.assert_array_equal(stretched.kernels, whole.kernels)
    assert (stretched.gradient_norms, stretched.flops) == (whole.gradient_norms, whole.flops)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_a_solver_asks_whether_to_go_on_equally_often_whatever_it_finds(solver):
    counts = []
    for seed in range(2):
        features, labels, test = make_features(seed=seed)
        asked: list[None] = []
        solver.fit(features, labels, 3, proceed=lambda asked=asked: asked.append(None)).logits(test, 0)
        counts.append(len(asked))
    assert counts[0] == counts[1] == (3 if isinstance(solver, SelectedLogistic) else 1)


def test_what_has_not_converged_says_so():
    features, labels, _ = make_features()
    heads = LogisticPath((1e-6, 100.0), max_iterations=2).fit(features, labels, 3)
    assert heads.converged == (False, True)
    assert heads.gradient_norms[0] > 1e-3


def test_features_of_very_different_scales_are_no_place_to_be_stuck():
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 3, 1000).astype(np.int32)
    centres = rng.normal(size=(3, 30))
    noise = 2 * rng.normal(size=(1000, 30))
    features = ((1.5 * centres[labels] + noise) * np.logspace(-3, 3, 30)).astype(np.float32)
    arrays = LogisticPath((1e-6,)).fit(features, labels, 3).arrays(0)
    assert objective(arrays["kernel"], arrays["bias"], features, labels, 1e-6) < 0.02, "at zero it is log 3"


def test_a_search_that_steps_too_far_comes_back_to_where_it_is_lower():
    rng = np.random.default_rng(4)
    labels = rng.integers(0, 40, 3000).astype(np.int32)
    centres = rng.normal(size=(40, 64))
    features = (2 * centres[labels] + 2 * rng.normal(size=(3000, 64))).astype(np.float32)
    solver = LogisticPath((1e-3,))
    heads = solver.fit(features, labels, 40)
    assert heads.converged == (True,)
    assert heads.flops < 60 * solver.cost(3000, 64, 40)[0], "it takes 400 evaluations to creep down the gradient"


def test_one_iteration_more_costs_what_an_iteration_costs():
    features, labels, _ = make_features()
    two, three = (LogisticPath((1e-6,), max_iterations=count).fit(features, labels, 3).flops for count in (2, 3))
    iteration, _ = LogisticPath((1e-6,)).cost(120, 6, 3)
    assert three - two == pytest.approx(iteration)
    assert iteration > 2 * 2 * 120 * 7 * 3, "two matrix products of N × Q × K multiplications and additions"


@pytest.mark.parametrize("shape", [(120, 6, 3), (30, 50, 4)], ids=["tall", "wide"])
def test_ridge_has_the_coefficients_of_scikit_learn(shape):
    features, labels, _ = make_features(*shape)
    strengths = (1e-2, 1.0)
    heads = RidgePath(strengths).fit(features, labels, shape[2])
    for index, strength in enumerate(strengths):
        targets = np.eye(shape[2])[labels]
        expected = Ridge(alpha=strength * len(labels), solver="svd").fit(np.asarray(features, np.float64), targets)
        np.testing.assert_allclose(heads.kernels[index], expected.coef_.T, atol=1e-4)
        np.testing.assert_allclose(heads.biases[index], expected.intercept_, atol=2e-4)  # sums D kernels' errors


def test_ten_times_the_blocks_of_examples_take_ten_times_the_operations():
    few, many = (RidgePath(STRENGTHS).cost(count * BLOCK, 64, 3)[0] for count in (10, 100))
    assert many / few == pytest.approx(10, rel=0.05)
    assert many > 2 * 100 * BLOCK * 64 * 64, "the covariance alone"


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_ridge_does_not_mind_a_rotation(seed):
    features, labels, test = make_features()
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(6, 6)))[0].astype(np.float32)
    heads, turned = (RidgePath((1e-2,)).fit(x, labels, 3) for x in (features, features @ rotation))
    np.testing.assert_allclose(turned.logits(test @ rotation, 0), heads.logits(test, 0), atol=2e-4)


def test_the_nearest_mean_is_scikit_learns():
    features, labels, test = make_features()
    heads = NearestMean().fit(features, labels, 3)
    assert np.array_equal(np.argmax(heads.logits(test, 0), 1), NearestCentroid().fit(features, labels).predict(test))
    means = np.stack([features[labels == k].mean(0) for k in range(3)])
    np.testing.assert_allclose(heads.kernels[0], means.T, rtol=1e-5)
    np.testing.assert_allclose(heads.biases[0], -(means**2).sum(1) / 2, rtol=1e-5)


def test_a_class_without_examples_has_no_mean():
    features, labels, _ = make_features()
    with pytest.raises(InputError, match="class 3 has no training example"):
        NearestMean().fit(features, labels, 4)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("sharpness", [0.0, 2.0])
def test_neighbours_vote_as_in_scikit_learn(metric, sharpness):
    features, labels, test = make_features()
    counts = (1, 4, 15)
    heads = NearestNeighbours((*counts, 500), metric, sharpness).fit(features, labels, 3)
    assert heads.names == ("k=1", "k=4", "k=15"), "there are not 500"

    def weights(distance):
        return np.exp(-sharpness * (distance if metric == "cosine" else distance**2 / 2))  # 1 - cosine is d² / 2

    for index, count in enumerate(counts):
        expected = KNeighborsClassifier(count, metric=metric, weights=weights).fit(features, labels)
        shares = (np.exp(heads.logits(test, index)) * (count + 1) - 1 / 3) / count
        np.testing.assert_allclose(shares, expected.predict_proba(test), atol=1e-5)


def test_more_neighbours_than_examples_is_an_error():
    features, labels, _ = make_features(3)
    with pytest.raises(InputError, match=r"counts is \(5, 9\), but there are 3 training examples"):
        NearestNeighbours((5, 9)).fit(features, labels, 3)


@pytest.mark.parametrize("linear_map", MAPS, ids=repr)
@pytest.mark.parametrize("solver", [RidgePath, LogisticPath, NearestMean])
def test_folded_heads_say_of_features_what_the_heads_say_of_mapped_features(solver, linear_map):
    features, labels, test = make_features()
    fitted = linear_map.fit(features)
    arguments = {} if solver is NearestMean else {"strengths": (1e-2, 1.0)}
    folded = solver(map=linear_map, **arguments).fit(features, labels, 3)
    apart = solver(**arguments).fit(fitted(features), labels, 3)
    for index in range(len(folded.names)):
        np.testing.assert_allclose(
            folded.logits(test, index), apart.logits(fitted(test), index), rtol=1e-4, atol=1e-3
        )  # sums of D products of numbers up to 30


def test_pca_is_scikit_learns_up_to_signs():
    features, _, test = make_features()
    expected = decomposition.PCA(4, svd_solver="full").fit(features).transform(test)
    np.testing.assert_allclose(np.abs(PCA(4).fit(features)(test)), np.abs(expected), atol=1e-3)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([(9, 4), (4, 9), (5, 5), (1, 3)]), st.integers(0, 2**32 - 1))
def test_the_eigenbasis_is_orthogonal_and_spans_the_features(shape, seed):
    features = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    targets = np.random.default_rng(seed).normal(size=(len(features), 2)).astype(np.float32)
    basis, covariances = jax.jit(principal_with_targets)(features, targets)
    scores = (features - basis.mean) @ basis.axes
    np.testing.assert_allclose(basis.axes.T @ basis.axes, np.eye(min(features.shape)), atol=1e-5)
    np.testing.assert_allclose(scores @ basis.axes.T + basis.mean, features, atol=1e-5)
    np.testing.assert_allclose(np.mean(np.square(scores), axis=0), basis.variances, atol=1e-5)
    np.testing.assert_allclose((targets - targets.mean(0)).T @ scores / len(scores), covariances, atol=1e-5)


def test_covariances_summed_up_in_blocks_are_those_of_all_examples():
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(2 * BLOCK + 7, 3)) * (1.0, 2.0, 3.0) + 50).astype(np.float32)
    basis = principal(jnp.asarray(features))
    expected = np.linalg.eigvalsh(np.cov(features.astype(np.float64).T, bias=True))
    np.testing.assert_allclose(basis.variances, expected, rtol=1e-4)


def test_whitened_features_have_unit_covariance():
    features, _, _ = make_features()
    white = Whiten(epsilon=0.0).fit(features)(features)
    np.testing.assert_allclose(np.cov(white.T, bias=True), np.eye(6), atol=1e-3)


def test_more_components_than_axes_is_an_error():
    with pytest.raises(InputError, match="num_components is 9, but the features span only 6; take fewer"):
        PCA(9).fit(make_features()[0])


def test_selection_keeps_the_features_that_carry_the_labels():
    features, labels, _ = make_features()
    noise = np.random.default_rng(1).normal(size=(len(features), 18)).astype(np.float32)
    heads = SelectedLogistic(fractions=(0.25,), strengths=(1e-2,)).fit(np.hstack([noise, features]), labels, 3)
    used = np.flatnonzero(np.any(np.asarray(heads.kernels[0]) != 0, axis=1))
    assert len(used) == 6
    assert np.mean(used >= 18) > 0.8


def test_all_features_selected_is_logistic_regression_on_standardised_features():
    features, labels, test = make_features()
    selected = SelectedLogistic(fractions=(1.0,), strengths=(1e-2,)).fit(features, labels, 3)
    plain = LogisticPath((1e-2,), map=Standardise()).fit(features, labels, 3)
    np.testing.assert_allclose(selected.logits(test, 0), plain.logits(test, 0), atol=5e-3)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_solvers_are_data_and_their_heads_are_named_and_costed(solver):
    assert json.loads(json.dumps(to_dict(solver)))["type"] == type(solver).__name__
    features, labels, test = make_features()
    heads = solver.fit(features, labels, 3)
    assert len(set(heads.names)) == len(heads.names) == len(heads.converged) == len(heads.gradient_norms)
    for index in range(len(heads.names)):
        assert heads.logits(test, index).shape == (40, 3)
    flops, size = solver.cost(120, 6, 3)
    assert flops > 0
    assert size > 0


@pytest.mark.parametrize("solver", [LogisticPath, RidgePath])
@pytest.mark.parametrize("strengths", [(), (0.1, 0.0)])
def test_a_path_without_positive_strengths_is_refused(solver, strengths):
    features, labels, _ = make_features()
    with pytest.raises(InputError, match="give positive numbers"):
        solver(strengths).fit(features, labels, 3)
