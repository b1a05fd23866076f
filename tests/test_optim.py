"""Optimizers against their references step by step, schedules by closed form, and settings that share a program."""

import dataclasses
import math

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jxfer import optim
from jxfer.config import Group, TrainConfig
from jxfer.partition import Partition, arrays_of

NUM_STEPS = 6
TRAIN = TrainConfig(learning_rate=0.05, weight_decay=0.3, schedule="cosine")


class TwoLayers(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.body = nnx.Linear(3, 4, bias_init=nnx.initializers.normal(), rngs=rngs)
        self.head = nnx.Linear(4, 2, bias_init=nnx.initializers.normal(), rngs=rngs)


def partition_of(groups: dict[str, Group] | None = None) -> Partition:
    return Partition.of(TwoLayers(nnx.Rngs(0)), [("head/**", "head"), ("**", "body")], groups=groups)


def start() -> dict[str, jax.Array]:
    return arrays_of(TwoLayers(nnx.Rngs(0)))


def gradients(seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [
        {path: rng.normal(size=value.shape).astype(np.float32) for path, value in start().items()}
        for _ in range(NUM_STEPS)
    ]


def trajectory(tx, *, train: TrainConfig | None = None) -> list[dict[str, jax.Array]]:
    """Returns the parameters after each update; `train` gives the hyper-parameters where they live in the state."""
    params, update = start(), jax.jit(tx.update)
    opt_state = tx.init(params)
    if train:
        rates = {"learning_rate": train.learning_rate, "weight_decay": train.weight_decay}
        opt_state = optim.set_hyperparams(opt_state, **rates)
    seen = []
    for grads in gradients():
        updates, opt_state = update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params)
    return seen


def ours(train: TrainConfig, groups: dict[str, Group] | None = None) -> list[dict[str, jax.Array]]:
    return trajectory(optim.optimizer(train, partition_of(groups), num_steps=NUM_STEPS), train=train)


def assert_same(actual, expected):
    # A few roundings of float32 per step; the schedule is computed by other formulas than Optax's.
    for one, other in zip(actual, expected, strict=True):
        for path in other:
            np.testing.assert_allclose(one[path], other[path], rtol=1e-5, atol=1e-6, err_msg=path)


def kernels_only(params):
    return {path: path.endswith("kernel") for path in params}


REFERENCES = {"adamw": optax.adamw, "lamb": optax.lamb, "lion": optax.lion}


@pytest.mark.parametrize("name", REFERENCES)
def test_each_optimizer_is_the_one_of_optax_with_decay_on_kernels_alone(name):
    rate = optax.cosine_decay_schedule(TRAIN.learning_rate, NUM_STEPS)
    reference = REFERENCES[name](rate, weight_decay=TRAIN.weight_decay, mask=kernels_only)
    assert_same(ours(dataclasses.replace(TRAIN, optimizer=name)), trajectory(reference))


def test_sgd_adds_the_decay_to_the_gradient_before_the_momentum():
    train = dataclasses.replace(TRAIN, optimizer="sgd", momentum=0.8, schedule="constant")
    params = {path: np.asarray(value, np.float64) for path, value in start().items()}
    velocity = {path: np.zeros_like(value) for path, value in params.items()}
    expected = []
    for grads in gradients():
        for path, value in params.items():
            decay = train.weight_decay if path.endswith("kernel") else 0.0
            velocity[path] = train.momentum * velocity[path] + grads[path] + decay * value
            params[path] = value - train.learning_rate * velocity[path]
        expected.append(dict(params))
    assert_same(ours(train), expected)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_groups_scale_the_rate_and_the_decay_of_their_label_alone(name):
    train = dataclasses.replace(TRAIN, optimizer=name)
    mixed = ours(train, {"body": Group(learning_rate_scale=0.1, weight_decay_scale=0.5)})
    alone = ours(train)
    slow = ours(
        dataclasses.replace(train, learning_rate=train.learning_rate * 0.1, weight_decay=train.weight_decay * 0.5)
    )
    expected = [
        {path: (one if path.startswith("body/") else other)[path] for path in one}
        for one, other in zip(slow, alone, strict=True)
    ]
    assert_same(mixed, expected)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "lion"])
def test_decay_leaves_biases_alone_and_shrinks_kernels(name):
    train = dataclasses.replace(TRAIN, optimizer=name, schedule="constant")
    decayed, plain = ours(train)[0], ours(dataclasses.replace(train, weight_decay=0.0))[0]
    for path in decayed:
        same = np.array_equal(decayed[path], plain[path])
        assert same == path.endswith("bias"), path


@pytest.mark.parametrize(("limit", "norm"), [(0.01, 0.01), (1e6, None), (None, None)])
def test_clipping_bounds_the_global_norm_and_leaves_smaller_gradients_alone(limit, norm):
    train = TrainConfig(
        optimizer="sgd", momentum=0.0, learning_rate=1.0, weight_decay=0.0, schedule="constant", clip_norm=limit
    )
    first = gradients()[0]
    moved = optax.tree.norm(optax.tree.sub(ours(train)[0], start()))
    np.testing.assert_allclose(moved, norm or optax.tree.norm(first), rtol=1e-4)


def closed_form(schedule: str, step: int, num_steps: int, warmup_steps: int) -> float:
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min((step - warmup_steps) / max(num_steps - warmup_steps, 1), 1.0)
    return {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[schedule]


def scales_at(steps: np.ndarray, schedule: str, *, num_steps: int, warmup_steps: int) -> np.ndarray:
    def scale(step):
        return optim.schedule_scale(schedule, step, num_steps=num_steps, warmup_steps=warmup_steps)

    return np.asarray(jax.vmap(scale)(steps))


@settings(deadline=None, max_examples=30)
@given(
    schedule=st.sampled_from(["constant", "cosine", "linear"]),
    num_steps=st.integers(1, 5000),
    warmup_steps=st.integers(0, 600),
)
def test_schedules_have_their_closed_form_and_stay_between_0_and_1(schedule, num_steps, warmup_steps):
    steps = np.linspace(0, num_steps, 64).astype(int)
    scales = scales_at(steps, schedule, num_steps=num_steps, warmup_steps=warmup_steps)
    expected = [closed_form(schedule, int(step), num_steps, warmup_steps) for step in steps]
    np.testing.assert_allclose(scales, expected, atol=1e-6)  # float32
    assert np.all((scales >= 0) & (scales <= 1))
    assert np.all(scales[steps < min(num_steps, warmup_steps)] > 0), "the first update moves"


@pytest.mark.parametrize("warmup_steps", [1, 2, 7, 50])
def test_warm_up_rises_from_above_0_to_1(warmup_steps):
    scales = scales_at(np.arange(warmup_steps), "cosine", num_steps=100, warmup_steps=warmup_steps)
    assert scales[0] > 0
    assert scales[-1] == 1
    np.testing.assert_allclose(np.diff(scales), 1 / warmup_steps, rtol=1e-4)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("warmup_steps", [0, 10])
def test_decaying_schedules_never_rise_after_warm_up_and_end_at_0(schedule, warmup_steps):
    scales = scales_at(np.arange(warmup_steps, 101), schedule, num_steps=100, warmup_steps=warmup_steps)
    assert np.all(np.diff(scales) <= 0)
    assert scales[0] == 1
    assert scales[-1] == pytest.approx(0, abs=1e-6)
    assert 0 < scales[-2] < 0.02, "the last update still moves"


def test_the_rate_and_decay_change_without_a_new_compilation():
    train = dataclasses.replace(TRAIN, optimizer="sgd", momentum=0.0, schedule="constant", weight_decay=0.0)
    tx = optim.optimizer(train, partition_of(), num_steps=NUM_STEPS)
    params, update, grads = start(), jax.jit(tx.update), gradients()[0]
    moved = {}
    for rate, decay in ((0.1, 0.0), (0.2, 0.0), (0.2, 0.5)):
        opt_state = optim.set_hyperparams(tx.init(params), learning_rate=rate, weight_decay=decay)
        moved[rate, decay], _ = update(grads, opt_state, params)
    assert update._cache_size() == 1
    for path, value in params.items():
        np.testing.assert_allclose(moved[0.1, 0.0][path], -0.1 * grads[path], rtol=1e-6)
        np.testing.assert_allclose(moved[0.2, 0.0][path], -0.2 * grads[path], rtol=1e-6)
        decay = 0.5 * value if path.endswith("kernel") else 0.0
        np.testing.assert_allclose(moved[0.2, 0.5][path], -0.2 * (grads[path] + decay), rtol=1e-5, atol=1e-7)


def test_equal_settings_give_the_very_same_transform():
    first = optim.optimizer(TRAIN, partition_of(), num_steps=NUM_STEPS)
    other_rate = dataclasses.replace(TRAIN, learning_rate=1.0, weight_decay=0.0)
    assert optim.optimizer(other_rate, partition_of(), num_steps=NUM_STEPS) is first
    assert optim.optimizer(TRAIN, partition_of({"head": Group(0.1)}), num_steps=NUM_STEPS) is not first
    assert optim.optimizer(TRAIN, partition_of(), num_steps=NUM_STEPS + 1) is not first
    assert optim.optimizer(dataclasses.replace(TRAIN, clip_norm=1.0), partition_of(), num_steps=NUM_STEPS) is not first


@pytest.mark.parity
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_trajectories_are_those_of_torch(name):
    torch = pytest.importorskip("torch")
    train = TrainConfig(optimizer=name, learning_rate=0.05, weight_decay=0.1, momentum=0.9, schedule="constant")
    params = start()
    ported = {path: torch.nn.Parameter(torch.tensor(np.asarray(value))) for path, value in params.items()}
    groups = [
        {"params": [value for path, value in ported.items() if path.endswith("kernel")]},
        {"params": [value for path, value in ported.items() if path.endswith("bias")], "weight_decay": 0.0},
    ]
    make = {
        "adamw": lambda: torch.optim.AdamW(groups, lr=0.05, weight_decay=0.1),
        "sgd": lambda: torch.optim.SGD(groups, lr=0.05, weight_decay=0.1, momentum=0.9),
    }
    optimizer, rng = make[name](), np.random.default_rng(0)
    x, y = rng.normal(size=(16, 3)).astype(np.float32), rng.normal(size=(16, 2)).astype(np.float32)

    def loss_of(p, x, y, tanh):
        hidden = tanh(x @ p["body/kernel"] + p["body/bias"])
        return ((hidden @ p["head/kernel"] + p["head/bias"] - y) ** 2).mean()

    tx = optim.optimizer(train, partition_of(), num_steps=20)
    opt_state = optim.set_hyperparams(tx.init(params), learning_rate=0.05, weight_decay=0.1)
    update, grad = jax.jit(tx.update), jax.jit(jax.grad(lambda p: loss_of(p, x, y, jax.numpy.tanh)))
    for _ in range(20):
        updates, opt_state = update(grad(params), opt_state, params)
        params = optax.apply_updates(params, updates)
        optimizer.zero_grad()
        loss_of(ported, torch.tensor(x), torch.tensor(y), torch.tanh).backward()
        optimizer.step()
    for path, value in params.items():
        # Twenty float32 steps in two libraries, each from the other's last rounding.
        np.testing.assert_allclose(value, ported[path].detach().numpy(), rtol=2e-4, atol=2e-5, err_msg=path)


@pytest.mark.parametrize(("name", "factor"), [("sgd", 4.0), ("adamw", 2.0), ("lamb", 2.0), ("lion", 2.0)])
def test_the_rate_grows_as_the_batch_or_as_its_square_root(name, factor):
    train = TrainConfig(optimizer=name, learning_rate=0.01, batch_size=128)
    assert optim.learning_rate(train) == 0.01
    assert optim.scaling_rule(train) is None
    scaled = dataclasses.replace(train, base_batch_size=32)
    assert optim.learning_rate(scaled) == pytest.approx(factor * 0.01)
    assert optim.scaling_rule(scaled).endswith(f" from batches of 32 to 128, with {name}")
    smaller = dataclasses.replace(train, base_batch_size=512)
    assert optim.learning_rate(smaller) == pytest.approx(0.01 / factor)
    assert optim.learning_rate(dataclasses.replace(train, base_batch_size=128)) == 0.01
