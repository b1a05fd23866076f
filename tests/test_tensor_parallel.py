"""Transformers split over the `model` axis by the rules `tensor` and `tensor+fsdp`: placement, results, collectives."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from flax import nnx
from jax.sharding import PartitionSpec as P

from jxfer import ablate, methods, models, optim, sharding, source
from jxfer.config import MeshConfig, ModelConfig, TrainConfig
from jxfer.models.bert import Bert, BertConfig
from jxfer.models.convnet import ConvNet, ConvNetConfig
from jxfer.models.vit import ViT, ViTConfig
from jxfer.objectives import classification
from jxfer.partition import Partition, arrays_of, eval_graphdef
from jxfer.predict import classifier
from jxfer.state import init_state, place_state
from jxfer.step import make_train_step
from jxfer.task import load_data
from jxfer.typing import InputError

NUM_LAYERS, DIM, HEADS, MLP = 2, 32, 4, 96
VIT = ViTConfig(4, DIM, NUM_LAYERS, HEADS, MLP)
BERT = BertConfig(DIM, NUM_LAYERS, HEADS, MLP, vocab_size=24, max_positions=8, dropout=0.0)
KINDS: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
    "vit": (ViT, VIT, (8, 8, 1)),
    "bert": (Bert, BERT, (8,)),
    "vit scanned": (ViT, ViTConfig(4, DIM, NUM_LAYERS, HEADS, MLP, scan=True), (8, 8, 1)),
}
TRAIN = TrainConfig(optimizer="sgd", learning_rate=0.1, clip_norm=1.0)


def tensor(**sizes: int) -> MeshConfig:
    rules = (("**", "tensor+fsdp" if "fsdp" in sizes else "tensor"),)
    return MeshConfig(frozen=rules, trainable=rules, **sizes)


MESHES = {"tensor": tensor(model=4), "data, fsdp and tensor": tensor(model=2, fsdp=2)}


def build(kind: str) -> nnx.Module:
    make, size, shape = KINDS[kind]
    return make(size, input_shape=shape, num_classes=3, dtype=jnp.float32, rngs=nnx.Rngs(0))


def batch_of(kind: str, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 3, 8).astype(np.int32)
    if kind == "bert":
        return {"text": rng.integers(1, 24, (8, 8)).astype(np.int32), "label": label}
    return {"image": rng.normal(size=(8, 8, 8, 1)).astype(np.float32), "label": label}


@functools.cache
def train(kind: str, rules: tuple[tuple[str, str], ...], mesh_name: str | None) -> tuple[list[float], dict[str, Any]]:
    """Returns the losses of three steps and the parameters after them, on one device where no mesh is named."""
    config = MESHES[mesh_name] if mesh_name else MeshConfig()
    mesh = sharding.make_mesh(config, devices=None if mesh_name else jax.devices()[:1])
    model = build(kind)
    partition = Partition.of(model, rules)
    tx = optim.optimizer(TRAIN, partition, num_steps=3)
    state, fixed = init_state(model, partition, tx)
    opt_state = optim.set_hyperparams(state.opt_state, learning_rate=0.1, weight_decay=0.0)
    state, fixed = place_state(dataclasses.replace(state, opt_state=opt_state), fixed, mesh, config)
    train_step, losses = make_train_step(classification()), []
    for seed in range(3):
        state, metrics = train_step(state, fixed, sharding.put_batch(batch_of(kind, seed), mesh))
        losses.append(float(metrics["loss"]) / float(metrics["count"]))
    return losses, state.params


ALL = (("**", "all"),)
LAST = (("head/**", "head"), ("blocks/1/**", "last"), ("**", "frozen"))


@pytest.mark.parametrize(
    ("kind", "rules", "mesh"),
    [
        pytest.param("vit", ALL, "tensor", marks=pytest.mark.slow),
        ("bert", ALL, "data, fsdp and tensor"),
        ("vit scanned", ALL, "tensor"),
        pytest.param("bert", LAST, "tensor", marks=pytest.mark.slow),
    ],
)
def test_losses_and_parameters_are_those_of_one_device(kind, rules, mesh, caplog):
    with jax.log_compiles(), caplog.at_level("WARNING"):
        losses, params = train(kind, rules, mesh)
    assert sum(message.startswith("Compiling jit(train_step)") for message in caplog.messages) == 1
    expected_losses, expected = train(kind, rules, None)
    # float32 sums in another order
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    for path, value in params.items():
        np.testing.assert_allclose(value, expected[path], rtol=1e-4, atol=2e-6, err_msg=path)
    parts = MESHES[mesh].model
    up = params["blocks/1/mlp/up/kernel"]
    assert up.addressable_shards[0].data.shape[1] == MLP // parts


def specs_of(config: MeshConfig, kind: str = "vit", **more: tuple[int, ...]) -> dict[str, P]:
    arrays = arrays_of(nnx.eval_shape(lambda: build(kind)))
    arrays |= {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in more.items()}
    specs = sharding.param_specs(arrays, config.trainable, sharding.make_mesh(config))
    return {path: spec.spec for path, spec in specs.items()}


def test_outputs_of_the_first_layers_and_inputs_of_the_second_are_split_and_the_rest_is_whole():
    specs = specs_of(tensor(model=4))
    split = {path.removeprefix("blocks/0/"): spec for path, spec in specs.items() if spec != P()}
    split = {path: spec for path, spec in split.items() if not path.startswith("blocks/")}
    columns = [f"attention/{name}" for name in ("query", "key", "value")] + ["mlp/up"]
    assert split == {
        **{f"{layer}/kernel": P(None, "model") for layer in columns},
        **{f"{layer}/bias": P("model") for layer in columns},
        **{f"{layer}/kernel": P("model", None) for layer in ("attention/out", "mlp/down")},
    }


def test_what_the_model_axis_leaves_whole_may_be_split_by_fsdp():
    specs = specs_of(tensor(model=2, fsdp=2), "bert")
    assert specs["blocks/0/attention/query/kernel"] == P("fsdp", "model")
    assert specs["blocks/0/mlp/down/kernel"] == P("model", "fsdp")
    assert specs["blocks/0/mlp/up/bias"] == P("model")
    assert specs["embed/position/embedding"] == P()
    assert specs_of(MeshConfig(fsdp=8, trainable=(("**", "tensor+fsdp"),)), "bert") == specs_of(
        MeshConfig(fsdp=8), "bert"
    )


def test_an_adapter_is_split_on_the_side_on_which_its_layer_is():
    adapters = {
        "blocks/0/attention/query/lora/down/kernel": (DIM, 2),
        "blocks/0/attention/query/lora/up/kernel": (2, DIM),
        "blocks/0/mlp/down/lora/down/kernel": (MLP, 2),
        "blocks/0/mlp/down/lora/up/kernel": (2, DIM),
    }
    specs = specs_of(tensor(model=4), **adapters)
    assert [specs[path] for path in adapters] == [P(), P(None, "model"), P("model", None), P()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_has_two_all_reduces_and_no_weight_is_gathered(kind):
    config = tensor(model=4)
    program = forward_program(kind, config)
    # A scanned block is there once.
    assert len(re.findall(r" all-reduce(?:-start)?\(", program)) == 2 * (1 if "scan" in kind else NUM_LAYERS)
    assert not re.findall(r"all-gather|all-to-all|collective-permute|reduce-scatter", program)


def test_with_fsdp_only_the_fsdp_axis_is_gathered():
    program = forward_program("vit", tensor(model=2, fsdp=2))
    whole = {f"{DIM},{DIM}", f"{DIM},{MLP}", f"{MLP},{DIM}"}
    assert gathered(program)
    assert not whole.intersection(gathered(program))


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_a_step_under_fsdp_gathers_each_parameter_once_and_no_activation(kind):
    program, split = fsdp_program(kind)
    assert gathered(program) == split
    assert not re.findall(r"all-to-all|collective-permute", program)


def test_microbatches_gather_each_parameter_once_too_and_add_up_over_the_devices_each():
    jax.config.update("jax_disable_most_optimizations", False)  # of which one moves the gathering out of the loop
    try:
        program, split = fsdp_program("vit", num_microbatches=2)
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
    loop, entry = program.split("\nENTRY ")
    assert gathered(entry) == split
    assert not gathered(loop)
    assert re.findall(r" all-reduce(?:-start)?\(", loop)


def fsdp_program(kind: str, *, num_microbatches: int = 1) -> tuple[str, list[str]]:
    """Returns the compiled training step over four devices, and the shapes of the parameters that they split."""
    config = MeshConfig(fsdp=4)
    mesh, model = sharding.make_mesh(config, devices=jax.devices()[:4]), build(kind)
    partition = Partition.of(model, ALL)
    started = init_state(model, partition, optim.optimizer(TRAIN, partition, num_steps=3))
    state, fixed = place_state(*started, mesh, config)
    step = make_train_step(classification(), num_microbatches=num_microbatches)
    program = step.lower(state, fixed, sharding.put_batch(batch_of(kind, 0), mesh)).compile().as_text()
    split = [value for value in state.params.values() if not value.sharding.is_fully_replicated]
    return program, sorted(",".join(map(str, value.shape)) for value in split)


def gathered(program: str) -> list[str]:
    return sorted(re.findall(r"= f32\[([\d,]+)\]\S* all-gather(?:-start)?\(", program))


def forward_program(kind: str, config: MeshConfig) -> str:
    """Returns the compiled program that maps a batch to logits, over the mesh."""
    model, mesh = build(kind), sharding.make_mesh(config)
    partition, graphdef = Partition.of(model, ALL), eval_graphdef(model)
    arrays = arrays_of(model)
    arrays = sharding.put(arrays, sharding.param_specs(arrays, config.trainable, mesh))
    batch = sharding.put_batch(batch_of(kind, 0), mesh)
    x = batch["text" if kind == "bert" else "image"]
    return jax.jit(lambda arrays, x: partition.assemble(graphdef, arrays)(x)).lower(arrays, x).compile().as_text()


def test_heads_that_do_not_divide_are_named_with_the_choices():
    model = build("vit")
    config = tensor(model=8)
    with pytest.raises(
        InputError, match=r"`tensor` for `blocks/0/attention`: mesh.model=8 does not divide its 4 heads"
    ):
        sharding.check_placement(model, config)
    partition = Partition.of(model, ALL)
    started = init_state(model, partition, optim.optimizer(TRAIN, partition, num_steps=1))
    with pytest.raises(InputError, match=r"4 heads; use 1, 2, 4$"):
        place_state(*started, sharding.make_mesh(config), config)


def test_widths_that_do_not_divide_name_the_parameter():
    model = ViT(ViTConfig(4, 32, 1, 4, 66), input_shape=(8, 8, 1), num_classes=3, dtype=jnp.float32, rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match=r"`tensor` for `blocks/0/mlp/\w+/\w+` of .*: mesh.model=4 does not divide 66"):
        sharding.check_placement(model, tensor(model=4))


def test_a_network_without_blocks_has_nothing_to_split():
    settings = {"input_shape": (8, 8, 1), "num_classes": 3, "dtype": jnp.float32}
    model = ConvNet(ConvNetConfig(widths=(4, 6, 8)), **settings, rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match=r"`tensor` has nothing to split: of the \d+ parameters .* use fsdp, or axes"):
        sharding.check_placement(model, tensor(model=2))


@pytest.mark.slow  # steps over such a mesh are tested above, whole runs over others in test_run.py
def test_what_a_whole_run_measures_over_the_mesh_is_what_one_device_predicts(tmp_path, monkeypatch):
    runs.add_models(monkeypatch)
    monkeypatch.setitem(models._CONFIGS, "tiny_vit", dataclasses.replace(VIT, num_layers=1))
    experiment = runs.with_train(runs.write_data(tmp_path / "data"), frozen_dtype="int8", remat=True)
    experiment = dataclasses.replace(experiment, model=ModelConfig("tiny_vit"), mesh=tensor(model=2))
    tried = runs.with_methods(experiment, methods.partial)
    ablate.ablate(tried, tmp_path / "out", runs.QUIET, command="")
    assert [row["error"] for row in runs.rows_on_disk(tmp_path / "out")] == [None]
    (split,) = load_data(experiment.target).splits.values()
    images = dict(zip(split.ids.tolist(), split.read(np.arange(len(split)))["image"], strict=True))
    directory = tmp_path / "out" / "runs" / "partial-shots3-seed0"
    kept = np.load(directory / "predictions.npz")
    given = classifier(source.load_run(directory))(np.stack([images[name] for name in kept["ids"].tolist()]))
    np.testing.assert_allclose(kept["logits"], given, rtol=1e-4, atol=1e-5 * np.abs(given).max())
