"""Labels, masks, split and merge, modes, audit, and the printed table."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Net

from jxfer.config import Group
from jxfer.partition import Partition, arrays_of, eval_graphdef, fingerprint
from jxfer.typing import InputError

HEAD = [("head/**", "head"), ("**", "frozen")]


@pytest.fixture(scope="module")
def model():
    return Net(nnx.Rngs(0))


def labels_by_path(partition):
    return {leaf.path: leaf.label for leaf in partition.leaves}


def test_statistics_follow_their_layer_and_random_keys_their_surroundings(model):
    labels = labels_by_path(Partition.of(model, [("bn/**", "norm"), ("head/**", "head"), ("**", "frozen")]))
    assert labels["bn/mean"] == labels["bn/var"] == "norm"
    assert labels["drop/rngs/count"] in ("head", "norm")


def test_statistics_stay_frozen_where_only_part_of_their_layer_trains(model):
    labels = labels_by_path(Partition.of(model, [("**/bias", "bias"), ("**", "frozen")]))
    assert labels["bn/bias"] == "bias"
    assert labels["bn/mean"] == labels["bn/var"] == "frozen"
    assert labels_by_path(Partition.of(model, HEAD))["bn/mean"] == "frozen"


def test_statistics_need_not_be_named_by_the_rules(model):
    labels = labels_by_path(Partition.of(model, [("re:bn/(scale|bias)", "norm"), ("**", "frozen")]))
    assert labels["bn/mean"] == "norm"


def test_train_mode_is_set_layer_by_layer_and_leaves_the_callers_model_alone(model):
    partition = Partition.of(model, [("layers/**", "top"), ("head/**", "head"), ("**", "frozen")])
    view = partition.assemble(partition.train_graphdef(model), arrays_of(model))
    assert view.bn.use_running_average is True
    assert view.drop.deterministic is False
    assert model.bn.use_running_average is False
    probe = partition.assemble(eval_graphdef(model), arrays_of(model))
    assert probe.drop.deterministic is True
    assert probe.bn.use_running_average is True


def test_fully_frozen_models_have_no_random_layer(model):
    partition = Partition.of(model, [("**", "frozen")])
    view = partition.assemble(partition.train_graphdef(model), arrays_of(model))
    assert view.drop.deterministic is True
    assert not partition.random_modules(partition.train_graphdef(model))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(["stem/**", "bn/**", "layers/[0:5]/**", "layers/1?/**", "head/**"]), unique=True))
def test_merge_is_the_inverse_of_split(patterns):
    model = Net(nnx.Rngs(0))
    partition = Partition.of(model, [*((pattern, "train") for pattern in patterns), ("**", "frozen")])
    arrays = arrays_of(model)
    moving, frozen = partition.split(arrays)
    assert not set(moving) & set(frozen)
    merged = partition.merge(moving, frozen)
    assert list(merged) == [leaf.path for leaf in partition.leaves]
    assert all(merged[path] is arrays[path] for path in arrays)


def test_layers_come_back_in_their_own_order(model):
    partition = Partition.of(model, HEAD)
    numbered = {
        path: jnp.full_like(value, int(path.split("/")[1])) if path.startswith("layers/") else value
        for path, value in arrays_of(model).items()
    }
    shuffled = dict(sorted(numbered.items()))
    assert list(shuffled) != list(numbered)
    rebuilt = partition.assemble(eval_graphdef(model), shuffled)
    assert [int(layer.kernel[0, 0]) for layer in rebuilt.layers] == list(range(12))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: arrays.pop("layers/3/kernel"), "no value for `layers/3/kernel`"),
        (lambda arrays: arrays.update({"layers/12/kernel": jnp.ones((8, 8))}), "the model has no `layers/12/kernel`"),
        (lambda arrays: arrays.update({"head/kernel": jnp.ones((8, 6))}), "shape (8, 6), the model needs (8, 5)"),
    ],
)
def test_a_merge_of_other_paths_or_shapes_is_refused(model, change, message):
    partition = Partition.of(model, HEAD)
    arrays = arrays_of(model)
    change(arrays)
    with pytest.raises(InputError) as error:
        partition.assemble(eval_graphdef(model), arrays)
    assert message in str(error.value)


def test_a_leaf_in_the_wrong_half_is_refused(model):
    partition = Partition.of(model, HEAD)
    moving, frozen = partition.split(arrays_of(model))
    with pytest.raises(InputError, match="belongs to the frozen half"):
        partition.merge({**moving, "stem/kernel": frozen["stem/kernel"]}, frozen)


def test_masks_serve_anybodys_optax_code(model):
    partition = Partition.of(model, HEAD)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    tx = optax.chain(
        optax.masked(optax.sgd(1.0), partition.mask("head")),
        optax.masked(optax.set_to_zero(), lambda tree: jax.tree.map(lambda hit: not hit, partition.mask("head")(tree))),
    )
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert float(updates["head"]["kernel"][0, 0]) == -1.0
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(updates["layers"]))
    state = nnx.state(model, nnx.Param)
    assert jax.tree.structure(partition.mask("head")(state)) == jax.tree.structure(state)


def test_masks_of_trees_and_labels_that_are_not_the_models_are_refused(model):
    partition = Partition.of(model, HEAD)
    with pytest.raises(InputError, match="unknown label `haed`; nearest: `head`"):
        partition.mask("haed")
    with pytest.raises(InputError, match="the tree has `heads/kernel`"):
        partition.mask("head")({"heads": {"kernel": jnp.ones(3)}})


def test_each_label_gets_its_own_optimizer_also_on_a_full_tree(model):
    partition = Partition.of(model, [("head/**", "head"), ("layers/11/**", "top"), ("**", "frozen")])
    tx = partition.optimizer({"head": optax.sgd(1.0), "top": optax.sgd(0.5)})
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    assert float(updates["head"]["bias"][0]) == -1.0
    assert float(updates["layers"][11]["bias"][0]) == -0.5
    assert float(updates["layers"][10]["bias"][0]) == 0.0


@pytest.mark.parametrize(
    ("transforms", "message"),
    [({}, "no transform for label `head`"), ({"head": 1, "tpo": 1}, "unknown label with a transform: `tpo`")],
)
def test_transforms_must_be_for_the_labels_there_are(model, transforms, message):
    with pytest.raises(InputError, match=message):
        Partition.of(model, HEAD).optimizer({label: optax.sgd(1.0) for label in transforms})


def test_groups_for_labels_that_are_not_there_are_refused(model):
    with pytest.raises(InputError, match="unknown label in groups: `tail`"):
        Partition.of(model, HEAD, groups={"tail": Group(0.1)})


def test_the_audit_names_leaks_and_leaves_that_are_stuck(model):
    partition = Partition.of(model, HEAD)
    graphdef = partition.train_graphdef(model)
    before = arrays_of(model)
    moved = {path: value + 1 if path.startswith("head/") else value for path, value in before.items()}
    assert partition.audit(fingerprint(before), fingerprint(moved), graphdef).ok
    stuck = partition.audit(fingerprint(before), fingerprint(moved | {"head/bias": before["head/bias"]}), graphdef)
    assert stuck.stuck == ("head/bias",)
    leak = partition.audit(fingerprint(before), fingerprint(moved | {"bn/mean": before["bn/mean"] + 1e-30}), graphdef)
    assert leak.leaks == ("bn/mean",)
    assert "bn/mean" in str(leak)


def test_the_audit_catches_a_frozen_layer_left_in_training_mode(model):
    partition = Partition.of(model, HEAD)
    model_in_train_mode = Net(nnx.Rngs(0))
    same = fingerprint(arrays_of(model))
    moved = same | {"head/bias": "moved", "head/kernel": "moved"}
    audit = partition.audit(same, moved, nnx.graphdef(model_in_train_mode))
    assert audit.leaks == ("bn",)


def test_fingerprints_see_every_bit():
    array = jnp.asarray([0.0, 1.0])

    def digest(value):
        return fingerprint({"x": value})["x"]

    assert digest(array) == digest(jnp.copy(array))
    assert digest(array) != digest(jnp.asarray([-0.0, 1.0]))
    assert digest(array) != digest(array.reshape(2, 1))
    assert digest(jnp.float32(0)) != digest(jnp.int32(0))
    assert digest(jax.random.key(0)) != digest(jax.random.key(1))


def test_fingerprints_do_not_depend_on_where_an_array_lives():
    mesh = jax.make_mesh((8,), ("x",), (jax.sharding.AxisType.Auto,))
    values = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), jnp.float32)
    for spec in (jax.P("x"), jax.P(None, "x"), jax.P()):
        placed = jax.device_put(values, jax.sharding.NamedSharding(mesh, spec))
        assert fingerprint({"x": values}) == fingerprint({"x": placed})


def test_partitions_of_real_and_abstract_models_are_equal(model):
    abstract = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    partition = Partition.of(model, HEAD)
    assert partition == Partition.of(abstract, HEAD)
    assert hash(partition) == hash(Partition.of(abstract, HEAD))
    assert partition.train_graphdef(model) == partition.train_graphdef(abstract)


def test_the_table_shows_every_leaf_with_label_rate_and_decay(model):
    partition = Partition.of(model, HEAD, groups={"head": Group(0.5, 2.0)})
    lines = str(partition).splitlines()
    assert len(lines) == len(partition.leaves) + 2
    row = next(line.split() for line in lines if line.startswith("head/kernel"))
    assert row == ["head/kernel", "8×5", "float32", "40", "head", "0.5", "2"]
    bias = next(line.split() for line in lines if line.startswith("head/bias"))
    assert bias[-2:] == ["0.5", "0"]
    assert lines[-1] == f"45 of {partition.params_total:,} parameters train"
