"""jxfer as a library, as a research script uses it: on a model jxfer has never seen, on one device and on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jxfer
from jxfer.config import MeshConfig
from jxfer.partition import fingerprint
from jxfer.sharding import make_mesh, put_batch
from jxfer.state import merge_state, place_state


class Mine(nnx.Module):
    """A model without stages, with names of its own: attention over patches, normalisation, a head."""

    def __init__(self, num_classes: int, *, rngs: nnx.Rngs):
        self.patches = nnx.Conv(1, 16, (4, 4), strides=4, rngs=rngs)
        self.position = nnx.Param(0.02 * rngs.params.normal((4, 16)))
        self.layer3 = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)
        self.layer4 = nnx.Linear(16, 16, rngs=rngs)
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.head = nnx.Linear(16, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.patches(x).reshape(len(x), 4, 16) + self.position
        x = x + self.layer3(x)
        x = x + nnx.gelu(self.layer4(x))
        return self.head(self.norm(x).mean(1))


def make_batches(num_batches: int, *, num_classes: int = 10) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    prototypes = rng.normal(size=(num_classes, 8, 8, 1))
    found = []
    for _ in range(num_batches):
        label = rng.integers(0, num_classes, 32).astype(np.int32)
        image = prototypes[label] + 0.3 * rng.normal(size=(32, 8, 8, 1))
        found.append({"image": image.astype(np.float32), "label": label})
    return found


def start():
    model = Mine(num_classes=10, rngs=nnx.Rngs(0))
    partition = jxfer.Partition.of(model, [("head/**", "head"), ("layer4/**", "top"), ("**", "frozen")])
    tx = partition.optimizer({"head": optax.adamw(2e-2), "top": optax.adamw(2e-3)})
    return model, partition, *jxfer.init_state(model, partition, tx)


def train(state, fixed, batches) -> tuple[jxfer.step.TrainState, list[float]]:
    train_step = jxfer.make_train_step(jxfer.objectives.classification())
    losses = []
    for batch in batches:
        state, metrics = train_step(state, fixed, batch)
        losses.append(metrics["loss"] / metrics["count"])
    return state, [float(loss) for loss in losses]


def test_the_snippet_trains_a_model_jxfer_has_never_seen():
    model, partition, state, fixed = start()
    table = str(partition)
    assert "head/kernel" in table
    assert f"{16 * 16 + 16 + 160 + 10:,} of" in table
    before = fingerprint(merge_state(state, fixed))
    state, losses = train(state, fixed, make_batches(30))
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    after = merge_state(state, fixed)
    assert partition.audit(before, fingerprint(after), fixed.definition.train_graphdef).ok
    trained = partition.assemble(nnx.graphdef(model), after)
    eval_step = jxfer.make_eval_step(jxfer.objectives.classification())
    batch = make_batches(1)[0]
    _, outputs = eval_step(state, fixed, batch)
    np.testing.assert_allclose(trained(batch["image"]), outputs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [MeshConfig(), MeshConfig(fsdp=4)], ids=["data", "data×fsdp"])
def test_the_same_script_on_eight_devices_has_the_same_losses(config):
    _, _, state, fixed = start()
    _, expected = train(state, fixed, make_batches(6))
    _, _, state, fixed = start()
    mesh = make_mesh(config)
    state, fixed = place_state(state, fixed, mesh, config)
    state, losses = train(state, fixed, [put_batch(batch, mesh) for batch in make_batches(6)])
    assert len(state.params["head/kernel"].sharding.device_set) == 8
    np.testing.assert_allclose(losses, expected, rtol=1e-4)  # float32 sums in another order


def test_masks_serve_anybodys_optax_code_over_the_models_own_tree():
    model, partition, *_ = start()
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    tx = optax.masked(optax.sgd(0.5), partition.mask("head"))
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_array_equal(updates["head"]["kernel"], -0.5 * np.ones((16, 10)))
    np.testing.assert_array_equal(updates["layer4"]["kernel"], np.ones((16, 16)))


def test_any_optax_transform_serves_as_the_optimizer():
    model = Mine(num_classes=10, rngs=nnx.Rngs(0))
    partition = jxfer.Partition.of(model, [("head/**", "head"), ("**", "frozen")])
    state, fixed = jxfer.init_state(
        model, partition, optax.MultiSteps(optax.adafactor(1e-2), 2).gradient_transformation()
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state)) < 4 * 170
    state, losses = train(state, fixed, make_batches(4))
    assert set(state.params) == {"head/kernel", "head/bias"}
    assert losses[-1] < losses[0]


def test_every_public_name_is_there():
    for name in jxfer.__all__:
        assert getattr(jxfer, name) is not None
    assert set(dir(jxfer)) == set(jxfer.__all__)
    with pytest.raises(AttributeError, match="module 'jxfer' has no attribute 'lode'"):
        jxfer.lode  # noqa: B018
