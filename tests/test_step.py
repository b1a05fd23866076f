"""The step: what is frozen costs nothing and stays still, whatever else is switched on; one device or eight."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from networks import Net, make_batch

from jxfer import optim
from jxfer.config import Group, MeshConfig, TrainConfig
from jxfer.objectives import classification
from jxfer.partition import Partition, arrays_of, fingerprint
from jxfer.penalties.l2sp import L2SP
from jxfer.sharding import make_mesh, pad_batch, put_batch
from jxfer.state import init_state, merge_state, place_state
from jxfer.step import make_eval_step, make_train_step

HEAD = [("head/**", "head"), ("**", "frozen")]
TOP = [("head/**", "head"), ("layers/1?/**", "top"), ("**", "frozen")]
ALL = [("**", "all")]
EVERYTHING_ON = TrainConfig(learning_rate=0.1, weight_decay=0.1, clip_norm=0.5, warmup_steps=2, ema_decay=0.9)


def start(rules, train=EVERYTHING_ON, *, model=None, num_steps=20, **kwargs):
    model = model or Net(nnx.Rngs(0))
    partition = Partition.of(model, rules)
    tx = optim.optimizer(train, partition, num_steps=num_steps)
    state, fixed = init_state(model, partition, tx, ema=train.ema_decay is not None, **kwargs)
    opt_state = optim.set_hyperparams(
        state.opt_state, learning_rate=train.learning_rate, weight_decay=train.weight_decay
    )
    return dataclasses.replace(state, opt_state=opt_state), fixed


def step_of(train=EVERYTHING_ON, **kwargs):
    objective = classification(train.label_smoothing)
    return make_train_step(objective, ema_decay=train.ema_decay, num_microbatches=train.num_microbatches, **kwargs)


def run(state, fixed, train_step, *, num_steps=3, batch=None):
    history = []
    for index in range(num_steps):
        state, metrics = train_step(state, fixed, batch or make_batch(seed=index))
        history.append(metrics)
    return state, history


def flops(function, *arguments):
    return function.lower(*arguments).compile().cost_analysis()["flops"]


BIASES = [("**/bias", "bias"), ("**", "frozen")]
OPTIMIZERS = ("sgd", "adamw", "lamb", "lion")
EACH = list(itertools.product(OPTIMIZERS, (HEAD, TOP, ALL, BIASES)))
QUICK = [("adamw", HEAD), ("adamw", TOP), ("adamw", ALL), ("adamw", BIASES), ("sgd", TOP), ("lamb", TOP), ("lion", TOP)]


@pytest.mark.parametrize(
    ("optimizer", "rules"),
    [pytest.param(*each, marks=() if each in QUICK else pytest.mark.slow) for each in EACH],
)
def test_only_the_trainable_move(rules, optimizer):
    train = dataclasses.replace(EVERYTHING_ON, optimizer=optimizer, num_microbatches=2)
    state, fixed = start(rules, train)
    before = fingerprint(merge_state(state, fixed))
    state, _ = run(state, fixed, step_of(train), num_steps=4)
    state = dataclasses.replace(state, ema={})
    partition = fixed.definition.partition
    audit = partition.audit(before, fingerprint(merge_state(state, fixed)), fixed.definition.train_graphdef)
    assert not audit.leaks
    # A layer behind a ReLU can be dead for these few examples; everything else must have moved.
    assert len(audit.stuck) <= 1, audit


def test_everything_about_a_step_is_as_large_as_what_moves():
    state, fixed = start(HEAD)
    head = {"head/kernel", "head/bias"}
    assert set(state.params) == set(state.ema) == head
    sizes = [leaf.size for leaf in jax.tree.leaves(state.opt_state)]
    assert sum(sizes) <= 2 * 45 + 8, "moments of the head, and a few counters"
    assert set(fixed.params).isdisjoint(head)
    jaxpr = jax.make_jaxpr(step_of())(state, fixed, make_batch())
    assert len(jaxpr.out_avals) == len(jax.tree.leaves(state)) + 4, "the state and four metrics, nothing frozen"


def test_the_gradient_norm_is_that_of_what_moves():
    train = TrainConfig(clip_norm=None)
    state, fixed = start(HEAD, train)
    model, batch = Net(nnx.Rngs(0)), make_batch()
    model.bn.use_running_average = True
    graphdef, arrays = nnx.split(model)
    arrays = nnx.to_pure_dict(arrays)

    def loss_fn(head):
        logits = nnx.merge(graphdef, {**arrays, "head": head}, copy=True)(batch["image"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    expected = optax.tree.norm(jax.grad(loss_fn)(arrays["head"]))
    _, metrics = step_of(train)(state, fixed, batch)
    np.testing.assert_allclose(metrics["grad_norm"], expected, rtol=1e-5)


def test_clipping_sees_only_what_moves():
    train = TrainConfig(
        optimizer="sgd", momentum=0.0, learning_rate=1.0, weight_decay=0.0, clip_norm=1e-3, schedule="constant"
    )
    state, fixed = start(HEAD, train)
    before = jax.tree.map(jnp.copy, state.params)
    state, _ = step_of(train)(state, fixed, make_batch())
    moved = optax.tree.norm(optax.tree.sub(state.params, before))
    np.testing.assert_allclose(moved, 1e-3, rtol=1e-3)


def test_frozen_statistics_and_dropout_stay_still_while_moving_ones_move():
    for rules, moves in ((HEAD, False), (ALL, True)):
        state, fixed = start(rules)
        start_arrays = {path: np.asarray(value) for path, value in merge_state(state, fixed).items() if "bn" in path}
        state, _ = run(state, fixed, step_of())
        after = merge_state(state, fixed)
        changed = [path for path in ("bn/mean", "bn/var") if np.any(after[path] != start_arrays[path])]
        assert changed == (["bn/mean", "bn/var"] if moves else [])


def test_a_fully_frozen_model_gives_the_same_loss_at_every_step():
    model = Net(nnx.Rngs(0))
    partition = Partition.of(model, [("**", "frozen")])
    state, fixed = init_state(model, partition, optax.identity())
    _, history = run(state, fixed, make_train_step(classification()), batch=make_batch())
    assert len({float(metrics["loss"]) for metrics in history}) == 1
    assert float(history[0]["grad_norm"]) == 0.0


def test_moving_dropout_draws_anew_at_every_step():
    train = TrainConfig(learning_rate=1e-30, weight_decay=0.0)
    state, fixed = start(ALL, train)
    _, history = run(state, fixed, step_of(train), batch=make_batch(64))
    assert len({float(metrics["loss"]) for metrics in history}) == 3


def test_a_phase_compiles_once():
    train_step = step_of(TrainConfig(clip_norm=0.123))
    state, fixed = start(HEAD, TrainConfig(clip_norm=0.123))
    before = train_step._cache_size()
    run(state, fixed, train_step, num_steps=5)
    assert train_step._cache_size() == before + 1


def test_runs_that_differ_in_seed_rate_and_decay_share_one_program():
    train_step = step_of()
    state, fixed = start(TOP)
    run(state, fixed, train_step)
    compiled = train_step._cache_size()
    other = dataclasses.replace(EVERYTHING_ON, learning_rate=0.3, weight_decay=0.01)
    state, fixed = start(TOP, other, model=Net(nnx.Rngs(7)))
    run(state, fixed, step_of(other))
    assert train_step._cache_size() == compiled


def test_the_callers_model_survives_the_donation_of_the_state():
    model = Net(nnx.Rngs(0))
    before = fingerprint(arrays_of(model))
    state, fixed = start(ALL, model=model)
    run(state, fixed, step_of())
    assert fingerprint(arrays_of(model)) == before
    assert model(make_batch()["image"]).shape == (16, 5)


class Tower(nnx.Module):
    """A frozen stack of convolutions under a small head, so that the backbone dominates the FLOPs."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Conv(8 if i else 1, 8, (3, 3), rngs=rngs) for i in range(6)])
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.head(x.mean((1, 2)))


@pytest.mark.parametrize("num_microbatches", [1, 4])
def test_a_frozen_backbone_costs_its_forward_pass_with_clipping_and_norms_on(num_microbatches):
    train = dataclasses.replace(EVERYTHING_ON, num_microbatches=num_microbatches)
    batch = {"image": jnp.ones((64, 16, 16, 1)), "label": jnp.zeros(64, jnp.int32)}
    model = Tower(nnx.Rngs(0))
    state, fixed = start(HEAD, train, model=model)
    forward = flops(make_eval_step(classification()), state, fixed, batch)
    frozen = flops(step_of(train), state, fixed, batch)
    # XLA counts the body of a scan once: a step in parts then reports the cost of one part.
    assert frozen * num_microbatches <= 1.02 * forward * (1.02 if num_microbatches > 1 else 1)
    everything = flops(step_of(train), *start(ALL, train, model=model), batch)
    assert everything * num_microbatches > 2.7 * forward


def test_differentiating_everything_and_zeroing_would_cost_three_times_that():
    batch = {"image": jnp.ones((64, 16, 16, 1)), "label": jnp.zeros(64, jnp.int32)}
    model = Tower(nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    mask = Partition.of(model, HEAD).mask("head")

    @jax.jit
    def naive(params):
        def loss_fn(params):
            logits = nnx.merge(graphdef, params)(batch["image"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

        grads = jax.grad(loss_fn)(params)
        clipped, _ = optax.clip_by_global_norm(0.5).update(grads, optax.EmptyState())
        return jax.tree.map(lambda grad, keep: grad * keep, clipped, mask(params))

    state, fixed = start(HEAD, model=model)
    assert flops(naive, params) > 2.7 * flops(step_of(), state, fixed, batch)


def test_microbatches_add_up_to_the_whole_batch():
    # Without batch norm and dropout in training mode the parts must give exactly the mean over the whole batch.
    batch = pad_batch({name: np.asarray(value) for name, value in make_batch(14).items()}, multiple=16)
    results = []
    for num_microbatches in (1, 2, 4, 8):
        train = TrainConfig(optimizer="sgd", learning_rate=0.1, num_microbatches=num_microbatches)
        model = Net(nnx.Rngs(0))
        model.drop = nnx.Dropout(0.0, rngs=nnx.Rngs(0))
        state, fixed = start([("head/**", "head"), ("layers/**", "top"), ("**", "frozen")], train, model=model)
        state, history = run(state, fixed, step_of(train), batch=batch)
        results.append((state.params, history[-1]))
    for params, metrics in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7), params, results[0][0])
        assert float(metrics["count"]) == 14.0
        np.testing.assert_allclose(metrics["loss"], results[0][1]["loss"], rtol=1e-5)


def test_a_batch_that_does_not_divide_into_microbatches_is_refused():
    train = TrainConfig(num_microbatches=3)
    state, fixed = start(HEAD, train)
    with pytest.raises(ValueError, match="a batch of 16 does not divide into 3 microbatches"):
        step_of(train)(state, fixed, make_batch(16))


def test_padded_rows_change_nothing():
    batch = {name: np.asarray(value) for name, value in make_batch(10).items()}
    results = []
    for rows in (batch, pad_batch(batch, multiple=16)):
        state, fixed = start(HEAD, TrainConfig(), model=without_dropout())
        state, history = run(state, fixed, step_of(TrainConfig()), batch=rows)
        results.append((state.params["head/kernel"], history[-1]["loss"], history[-1]["accuracy"]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *results)


def without_dropout():
    model = Net(nnx.Rngs(0))
    model.drop = nnx.Dropout(0.0, rngs=nnx.Rngs(0))
    return model


def test_the_average_is_the_exponential_moving_average():
    train = TrainConfig(ema_decay=0.9)
    state, fixed = start(HEAD, train)
    expected = np.asarray(state.ema["head/kernel"])
    for index in range(3):
        state, _ = step_of(train)(state, fixed, make_batch(seed=index))
        expected = 0.9 * expected + 0.1 * np.asarray(state.params["head/kernel"])
    np.testing.assert_allclose(state.ema["head/kernel"], expected, rtol=1e-5, atol=1e-8)
    assert merge_state(state, fixed)["head/kernel"] is state.ema["head/kernel"]


def test_l2_sp_pulls_towards_the_start_with_its_closed_form_gradient():
    params, reference = {"a": jnp.asarray([1.0, 2.0]), "head": jnp.ones(2)}, {"a": jnp.asarray([0.0, 1.0])}
    penalty = L2SP(weight=0.5)
    np.testing.assert_allclose(penalty(params, reference), 0.5 / 2 * 2.0)
    grads = jax.grad(penalty)(params, reference)
    np.testing.assert_allclose(grads["a"], 0.5 * (params["a"] - reference["a"]))
    assert not np.any(grads["head"])


def test_a_strong_l2_sp_keeps_the_backbone_where_it_was():
    distances = []
    for penalties in ((), (L2SP(weight=30.0),)):
        train = TrainConfig(optimizer="sgd", learning_rate=0.02, weight_decay=0.0)
        model = Net(nnx.Rngs(0))
        paths = tuple(path for path in arrays_of(model) if path.startswith("layers/"))
        state, fixed = start(ALL, train, model=model, reference=paths)
        state, _ = run(state, fixed, step_of(train, penalties=penalties), num_steps=15)
        distances.append(float(optax.tree.norm({path: state.params[path] - fixed.reference[path] for path in paths})))
    assert distances[1] < 0.5 * distances[0]


MESHES = [MeshConfig(), MeshConfig(fsdp=8), MeshConfig(fsdp=2), MeshConfig(fsdp=4)]


@pytest.mark.parametrize("rules", [pytest.param(HEAD, marks=pytest.mark.slow), ALL])
def test_one_device_and_eight_give_the_same_losses(rules):
    train = dataclasses.replace(EVERYTHING_ON, learning_rate=0.01)
    histories, states = [], []
    for mesh_config, devices in [(MeshConfig(), jax.devices()[:1])] + [(config, jax.devices()) for config in MESHES]:
        model = Net(nnx.Rngs(0), width=32)
        mesh = make_mesh(mesh_config, devices=devices)
        everywhere = dataclasses.replace(mesh_config, frozen=(("**", "fsdp"),))
        state, fixed = place_state(*start(rules, train, model=model), mesh, everywhere)
        losses = []
        for index in range(5):
            batch = pad_batch({k: np.asarray(v) for k, v in make_batch(12, seed=index).items()}, multiple=8)
            state, metrics = step_of(train)(state, fixed, put_batch(batch, mesh))
            losses.append(float(metrics["loss"]) / float(metrics["count"]))
        histories.append(losses)
        states.append(state)
    for losses in histories[1:]:
        np.testing.assert_allclose(losses, histories[0], rtol=2e-5)


def test_the_state_keeps_its_placement_from_step_to_step(caplog):
    mesh = make_mesh(MeshConfig(fsdp=8))
    model = Net(nnx.Rngs(0), width=64)
    state, fixed = place_state(*start(ALL, model=model), mesh, MeshConfig(fsdp=8))
    kernel = state.params["layers/0/kernel"].sharding
    assert not kernel.is_fully_replicated
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == (64, 64)]
    assert moments
    assert not any(leaf.sharding.is_fully_replicated for leaf in moments)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for index in range(3):
            batch = {name: np.asarray(value) for name, value in make_batch(seed=index).items()}
            state, _ = step_of()(state, fixed, put_batch(batch, mesh))
            assert state.params["layers/0/kernel"].sharding.is_equivalent_to(kernel, 2)
    compiled = [record for record in caplog.messages if record.startswith("Compiling jit(train_step)")]
    assert len(compiled) == 1


@pytest.mark.parametrize("leak", ["stop_gradient", "decay", "momentum"])
def test_freezing_by_the_optimizer_alone_would_leak_where_the_step_does_not(leak):
    """Each of these is a published way to freeze that moves frozen leaves; the step's types do not allow it."""
    model = Net(nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def frozen_mask(tree):
        return jax.tree.map(lambda hit: not hit, Partition.of(model, HEAD).mask("head")(tree))

    zero = jax.tree.map(jnp.zeros_like, params)
    if leak == "stop_gradient":  # zero gradients, but decay moves every leaf
        tx, grads = optax.adamw(0.1, weight_decay=0.1), [zero]
    elif leak == "decay":  # decay added after the freezing
        tx = optax.chain(optax.masked(optax.set_to_zero(), frozen_mask), optax.add_decayed_weights(0.1))
        grads = [jax.tree.map(jnp.ones_like, params)]
    else:  # gradients zeroed in mid-run: the momentum moves the leaf on
        tx, grads = optax.sgd(0.1, momentum=0.9), [jax.tree.map(jnp.ones_like, params), zero]
    opt_state = tx.init(params)
    for grad in grads:
        updates, opt_state = tx.update(grad, opt_state, params)
    assert np.any(updates["stem"]["kernel"]), "the naive way leaks"

    state, fixed = start(HEAD, model=model)
    before = fingerprint({**fixed.params, **fixed.variables})
    run(state, fixed, step_of())
    assert fingerprint({**fixed.params, **fixed.variables}) == before


def test_bfloat16_computes_in_bfloat16_and_trains_float32_parameters():
    from jxfer import models
    from jxfer.config import ModelConfig

    model = models.build(ModelConfig("convnet", "bfloat16"), num_classes=5, input_shape=(8, 8, 1), rngs=nnx.Rngs(0))
    state, fixed = start(ALL, model=model)
    text = step_of().lower(state, fixed, make_batch()).as_text()
    convolutions = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    assert convolutions
    assert all("bf16" in line for line in convolutions)
    state, history = run(state, fixed, step_of())
    assert {value.dtype for value in state.params.values()} == {jnp.dtype("float32")}
    assert all(np.isfinite(float(metrics["loss"])) for metrics in history)


def test_groups_scale_the_learning_rate():
    train = TrainConfig(optimizer="sgd", momentum=0.0, learning_rate=1.0, weight_decay=0.0, schedule="constant")
    moves = []
    for scale in (1.0, 0.1):
        model = without_dropout()
        partition = Partition.of(model, TOP, groups={"top": Group(learning_rate_scale=scale)})
        state, fixed = init_state(model, partition, optim.optimizer(train, partition, num_steps=5))
        opt_state = optim.set_hyperparams(state.opt_state, learning_rate=1.0, weight_decay=0.0)
        state = dataclasses.replace(state, opt_state=opt_state)
        before = {path: np.asarray(value) for path, value in state.params.items()}
        state, _ = step_of(train)(state, fixed, make_batch())
        moves.append({path: np.asarray(value) - before[path] for path, value in state.params.items()})
    np.testing.assert_allclose(moves[0]["head/kernel"], moves[1]["head/kernel"], rtol=1e-6)
    np.testing.assert_allclose(0.1 * moves[0]["layers/10/kernel"], moves[1]["layers/10/kernel"], rtol=1e-3, atol=1e-8)
