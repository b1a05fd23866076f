"""Tests of jxfer/sharding.py: placement by rules, and the same losses on every mesh."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jxfer import sharding
from jxfer.config import MeshConfig
from jxfer.typing import InputError

REPLICATED = [("**", "replicated")]
FSDP = [("**", "fsdp")]
MODEL = [("hidden/kernel", "None,model"), ("head/kernel", "model,None"), ("**", "replicated")]
MESHES = {
    "one_device": (MeshConfig(), FSDP),
    "data": (MeshConfig(), REPLICATED),
    "fsdp": (MeshConfig(fsdp=8), FSDP),
    "data_and_fsdp": (MeshConfig(fsdp=2), FSDP),
    "model": (MeshConfig(model=4), MODEL),
    "all_three": (MeshConfig(fsdp=2, model=2), MODEL),
}


def mlp_params() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "hidden/kernel": rng.normal(size=(16, 64)).astype(np.float32) / 4,
        "hidden/bias": np.zeros(64, np.float32),
        "head/kernel": rng.normal(size=(64, 32)).astype(np.float32) / 8,
    }


def mlp_step(tx: optax.GradientTransformation, state: dict[str, Any], batch: Any) -> tuple[dict[str, Any], jax.Array]:
    def loss_fn(params: dict[str, jax.Array]) -> jax.Array:
        hidden = jax.nn.relu(batch["features"] @ params["hidden/kernel"] + params["hidden/bias"])
        losses = optax.softmax_cross_entropy_with_integer_labels(hidden @ params["head/kernel"], batch["label"])
        return jnp.sum(losses * batch["mask"]) / jnp.sum(batch["mask"])

    loss, grads = jax.value_and_grad(loss_fn)(state["params"])
    updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
    return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}, loss


@functools.cache
def train(name: str) -> tuple[list[float], dict[str, Any], int]:
    """Returns the losses of five steps on batches of 13 rows, the last state, and the number of compilations."""
    config, rules = MESHES[name]
    mesh = sharding.make_mesh(config, devices=jax.devices()[:1] if name == "one_device" else None)
    tx = optax.adamw(1e-2)
    state = {"params": mlp_params(), "opt_state": tx.init(mlp_params())}
    shardings = sharding.state_shardings(state, sharding.param_specs(mlp_params(), rules, mesh), mesh)
    state = sharding.place(state, shardings)
    step = jax.jit(functools.partial(mlp_step, tx), donate_argnums=0, out_shardings=(shardings, None))
    rng = np.random.default_rng(1)
    losses = []
    for _ in range(5):
        features = rng.normal(size=(13, 16)).astype(np.float32)
        batch = {"features": features, "label": rng.integers(32, size=13).astype(np.int32)}
        batch = sharding.pad_batch(batch, multiple=sharding.num_batch_shards(mesh))
        state, loss = step(state, sharding.put_batch(batch, mesh))
        losses.append(float(loss))
    return losses, state, step._cache_size()


@pytest.mark.parametrize("name", MESHES)
def test_losses_are_the_same_on_every_mesh_though_the_batch_does_not_divide(name):
    losses, _, num_compilations = train(name)
    # float32 sums in another order; 1e-5 is about a hundred roundings
    np.testing.assert_allclose(losses, train("one_device")[0], rtol=1e-5)
    assert len(set(losses)) == len(losses)
    assert num_compilations == 1


@pytest.mark.parametrize(
    ("name", "spec"), [("fsdp", PartitionSpec(None, "fsdp")), ("model", PartitionSpec(None, "model"))]
)
def test_moments_are_still_split_as_their_parameter_after_steps(name, spec):
    _, state, _ = train(name)
    parts = getattr(MESHES[name][0], name)
    for leaf in (
        state["params"]["hidden/kernel"],
        *(getattr(state["opt_state"][0], m)["hidden/kernel"] for m in ("mu", "nu")),
    ):
        assert leaf.sharding.spec == spec
        assert leaf.addressable_shards[0].data.shape == (16, 64 // parts)
    assert state["opt_state"][0].count.sharding.is_fully_replicated


def test_the_mesh_takes_all_devices_and_data_takes_what_is_left():
    assert dict(sharding.make_mesh(MeshConfig(fsdp=2, model=2)).shape) == {"data": 2, "fsdp": 2, "model": 2}
    mesh = sharding.make_mesh(MeshConfig(), devices=jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "model": 1}
    assert sharding.num_batch_shards(sharding.make_mesh(MeshConfig(model=4))) == 2


@pytest.mark.parametrize("config", [MeshConfig(fsdp=3), MeshConfig(model=16), MeshConfig(fsdp=0)])
def test_a_mesh_that_does_not_divide_the_devices_names_the_count_and_the_choices(config):
    with pytest.raises(InputError, match=r"does not divide 8 device.*1, 2, 4, 8"):
        sharding.make_mesh(config)


def test_fsdp_splits_the_largest_dimension_that_divides_and_replicates_the_rest():
    shapes = {"conv": (3, 3, 64, 128), "odd": (1001, 7), "tall": (1001, 64), "bias": (64,), "scalar": ()}
    arrays = {path: np.zeros(shape) for path, shape in shapes.items()}
    specs = sharding.param_specs(arrays, FSDP, sharding.make_mesh(MeshConfig(fsdp=4)))
    assert {path: specs[path].spec for path in specs} == {
        "conv": PartitionSpec(None, None, None, "fsdp"),
        "odd": PartitionSpec(),
        "tall": PartitionSpec(None, "fsdp"),
        "bias": PartitionSpec(),
        "scalar": PartitionSpec(),
    }


def test_fsdp_over_one_device_replicates():
    specs = sharding.param_specs({"w": np.zeros((64, 64))}, FSDP, sharding.make_mesh(MeshConfig()))
    assert specs["w"].spec == PartitionSpec()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("None,model", r"`None,model` for `layer/kernel` of shape \(64, 30\): model=4 does not divide 30"),
        ("model", r"`model` for `layer/kernel` of shape \(64, 30\): name one axis or None per dimension"),
        ("model,model", r"none twice"),
        ("None,modle", r"no mesh axis 'modle'"),
    ],
)
def test_axes_that_do_not_fit_name_the_parameter_its_shape_and_the_size(value, message):
    mesh = sharding.make_mesh(MeshConfig(model=4))
    with pytest.raises(InputError, match=message):
        sharding.param_specs({"layer/kernel": np.zeros((64, 30))}, [("**", value)], mesh)


@pytest.mark.parametrize(
    "tx",
    [
        optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3),
        optax.chain(optax.clip_by_global_norm(1.0), optax.MultiSteps(optax.adam(1e-3), 2).gradient_transformation()),
        optax.partition({"a": optax.sgd(1e-2, momentum=0.9), "b": optax.lamb(1e-3)}, {"w": "a", "v": "b", "b": "b"}),
        optax.adafactor(1e-3, min_dim_size_to_factor=8),
    ],
    ids=["inject_hyperparams", "chain_and_accumulation", "partition", "factored"],
)
def test_whatever_has_the_shape_of_a_parameter_follows_it_through_any_optax_state(tx):
    params = {"w": jnp.zeros((64, 64)), "v": jnp.zeros((64, 32)), "b": jnp.zeros(3)}
    mesh = sharding.make_mesh(MeshConfig(fsdp=4))
    specs = sharding.param_specs(params, FSDP, mesh)
    state = {"opt_state": tx.init(params), "ema": params, "key": jax.random.key(0), "none": None}
    shardings = sharding.state_shardings(state, specs, mesh)
    for leaf, given in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        owners = [path for path in ("w", "v") if leaf.shape == params[path].shape]
        expected = specs[owners[0]] if owners else NamedSharding(mesh, PartitionSpec())
        assert given.is_equivalent_to(expected, leaf.ndim)
    assert shardings["none"] is None
    placed = sharding.place(state, shardings)
    assert placed["ema"]["w"].addressable_shards[0].data.shape == (16, 64)
    assert placed["key"] == state["key"]


@pytest.mark.parametrize("num_devices", [1, 8])
def test_donating_a_placed_tree_leaves_the_original_alive(num_devices):
    mesh = sharding.make_mesh(MeshConfig(), devices=jax.devices()[:num_devices])
    replicated = NamedSharding(mesh, PartitionSpec())
    original = {
        "one": jnp.ones((8, 8)),
        "placed": jax.device_put(jnp.ones((8, 8)), replicated),
        "key": jax.random.key(0),
    }
    host = np.ones((64, 64), np.float32)
    placed = sharding.place({**original, "host": host}, replicated)
    change = jax.jit(lambda tree: {name: leaf + 1 for name, leaf in tree.items()}, donate_argnums=0)
    change({name: placed[name] for name in ("one", "placed", "host")})
    jax.jit(lambda key: jax.random.split(key, 1)[0], donate_argnums=0)(placed["key"])
    assert not any(leaf.is_deleted() for leaf in original.values())
    assert jax.random.key_data(original["key"]).tolist() == [0, 0]
    assert (host == 1).all()
    assert (np.asarray(original["one"]) == 1).all()


def test_padding_repeats_the_first_row_and_masks_it_without_touching_the_original():
    batch = {"image": np.arange(6, dtype=np.uint8).reshape(3, 2), "mask": np.ones(3, np.float32)}
    padded = sharding.pad_batch(batch, multiple=4)
    assert padded["image"].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1]]
    assert padded["image"].dtype == np.uint8
    assert padded["mask"].tolist() == [1, 1, 1, 0]
    assert batch["mask"].tolist() == [1, 1, 1]
    assert sharding.pad_batch({"label": np.zeros(4, np.int32)}, multiple=4)["mask"].tolist() == [1, 1, 1, 1]


def test_a_batch_is_split_over_data_and_fsdp_and_must_divide():
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, model=2))
    batch = sharding.put_batch({"image": np.zeros((8, 3), np.uint8)}, mesh)
    assert batch["image"].addressable_shards[0].data.shape == (2, 3)
    with pytest.raises(InputError, match=r"6 rows does not divide into 4 shards; use `pad_batch`"):
        sharding.put_batch({"image": np.zeros((6, 3), np.uint8)}, mesh)
