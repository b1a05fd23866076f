"""Low-rank updates: they begin as nothing, compute what their definition says, train alone, and merge into kernels."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
from flax import nnx
from networks import Net, make_batch
from safetensors import safe_open

import jxfer
from jxfer import checkpoint, methods, models, plan
from jxfer.checks import check
from jxfer.config import DataConfig, Experiment, ModelConfig, Phase, SearchConfig
from jxfer.export import export
from jxfer.models.bert import BertConfig
from jxfer.models.rnn import RnnConfig
from jxfer.models.vit import ViTConfig
from jxfer.partition import Partition, arrays_of
from jxfer.predict import classifier
from jxfer.run import run
from jxfer.search import Job
from jxfer.solvers.ridge import RidgePath
from jxfer.source import load_run, load_source
from jxfer.surgery.head import NewHead
from jxfer.surgery.lora import LoRA, adapt, merged
from jxfer.task import Task, load_data
from jxfer.typing import InputError
from jxfer.variants import variants

EVERYWHERE = (("head/**", 0), ("**", 2))

SIZES = {
    "tiny_vit": ViTConfig(4, 8, 2, 2, 16),
    "tiny_vit_scanned": ViTConfig(4, 8, 2, 2, 16, scan=True),
    "tiny_bert": BertConfig(8, 2, 2, 16, vocab_size=20, max_positions=12),
    "tiny_lstm": RnnConfig("lstm", vocab_size=20, embedding_dim=4, hidden_dim=6),
}
SHAPES = {"tiny_bert": (6,), "tiny_lstm": (6,)}
NUM_ADAPTED = {
    "tiny_convnet": 3,
    "tiny_convnet_dropout": 3,
    "tiny_resnet20": 1 + 3 * 2,  # the stem and two in each block
    "tiny_resnet18_32": 1 + 4 * 2 + 3,  # shortcuts too
    "tiny_vit": 1 + 2 * 6,  # patches, and six in each block
    "tiny_vit_scanned": 1 + 2 * 6,
    "tiny_bert": 2 * 6,
    "tiny_lstm": 2 * 2,  # of tokens and of the state, in both directions
}
LINEAR_SHAPES = {"kernel": (8, 8), "bias": (8,), "lora/down/kernel": (8, 2), "lora/up/kernel": (2, 8), "lora/scale": ()}


@pytest.fixture(autouse=True)
def _models(monkeypatch):
    runs.add_models(monkeypatch)
    runs.use_devices(monkeypatch, 1)
    for name, size in SIZES.items():
        monkeypatch.setitem(models._CONFIGS, name, size)


def build(name: str, *, seed: int = 0) -> nnx.Module:
    shape = SHAPES.get(name, (8, 8, 1))
    return models.build(ModelConfig(name), num_classes=3, input_shape=shape, rngs=nnx.Rngs(seed))


def example(name: str) -> jax.Array:
    rng = np.random.default_rng(0)
    if name in SHAPES:
        return jnp.asarray(rng.integers(0, 20, (4, 6)), jnp.int32)
    return jnp.asarray(rng.normal(size=(4, 8, 8, 1)), jnp.float32)


def adapted(model: nnx.Module, *, scale: float = 3.0) -> nnx.Module:
    adapt(model, EVERYWHERE, adapter_scale=scale, rngs=nnx.Rngs(1))
    return model


def trained(model: nnx.Module, *, seed: int = 2) -> nnx.Module:
    """Gives the second factor of every update values other than zero."""
    rng = np.random.default_rng(seed)
    for keys, module in nnx.iter_modules(model):
        if keys and keys[-1] == "up" and "lora" in keys:
            module.kernel.set_value(jnp.asarray(rng.normal(size=module.kernel.shape), jnp.float32))
    return model


@jax.jit
def outputs(graphdef, state, x):
    return nnx.merge(graphdef, state)(x)


def logits(model: nnx.Module, x: jax.Array) -> np.ndarray:
    model.eval()
    return np.asarray(outputs(*nnx.split(model), x))


@pytest.mark.parametrize("name", NUM_ADAPTED)
def test_an_adapted_model_begins_as_it_was_and_ends_as_its_merged_kernels(name):
    model, x = build(name), example(name)
    before, kept = logits(model, x), arrays_of(model)
    adapted(model)
    np.testing.assert_array_equal(logits(model, x), before)
    arrays = arrays_of(model)
    assert sum(path.endswith("lora/scale") for path in arrays) == NUM_ADAPTED[name]
    assert all(arrays[path] is value for path, value in kept.items()), "its own parameters stay where they were"
    after = logits(trained(model), x)
    assert np.max(np.abs(after - before)) > 1e-3
    whole, plain = merged(arrays_of(model)), build(name)
    assert list(whole) == list(kept)
    for path, variable in nnx.to_flat_state(nnx.state(plain, nnx.Param)):
        variable.set_value(jnp.asarray(whole["/".join(map(str, path))]))
    np.testing.assert_allclose(logits(plain, x), after, rtol=1e-4, atol=1e-5 * np.max(np.abs(after)))


def test_the_update_of_a_linear_layer_is_the_product_of_its_factors_times_the_scale():
    model = trained(adapted(Net(nnx.Rngs(0)), scale=0.5))
    own = {path.removeprefix("layers/3/"): value for path, value in arrays_of(model).items() if "layers/3/" in path}
    assert {path: value.shape for path, value in own.items()} == LINEAR_SHAPES
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 8)), jnp.float32)
    expected = x @ own["kernel"] + own["bias"] + 0.5 * (x @ own["lora/down/kernel"] @ own["lora/up/kernel"])
    np.testing.assert_allclose(model.layers[3](x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"strides": 2, "padding": 1},
        {"kernel_dilation": 2, "padding": "SAME", "use_bias": False},
        {"strides": (1, 2), "padding": "VALID"},
        {"padding": "CIRCULAR", "dtype": jnp.bfloat16},
    ],
    ids=str,
)
def test_the_update_of_a_convolution_sees_the_windows_of_its_layer(options):
    model = nnx.Sequential(nnx.Conv(3, 5, (3, 2), rngs=nnx.Rngs(0), **options))
    adapt(model, [("**", 4)], adapter_scale=2.0, rngs=nnx.Rngs(1))
    trained(model)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 6, 3)), jnp.float32)
    after = model(x)
    plain = nnx.Conv(3, 5, (3, 2), rngs=nnx.Rngs(0), **options)
    plain.kernel.set_value(jnp.asarray(merged(arrays_of(model))["layers/0/kernel"]))
    assert after.dtype == plain(x).dtype
    tolerance = 1e-5 if after.dtype == jnp.float32 else 0.05
    np.testing.assert_allclose(np.float32(after), np.float32(plain(x)), rtol=tolerance, atol=10 * tolerance)


def test_the_first_factor_is_uniform_in_the_bounds_of_its_inputs():
    model = nnx.Sequential(nnx.Linear(100, 7, rngs=nnx.Rngs(0)), nnx.Conv(4, 7, (5, 5), rngs=nnx.Rngs(0)))
    adapt(model, [("**", 64)], adapter_scale=1.0, rngs=nnx.Rngs(1))
    for layer in model.layers:
        down = layer.lora.down.kernel.get_value()
        assert 0.098 < np.max(np.abs(down)) <= 0.1
        assert np.std(down) == pytest.approx(0.1 / 3**0.5, rel=0.03)
        assert not np.any(layer.lora.up.kernel.get_value())


def test_ranks_are_rules_over_kernels_and_layers_in_groups_are_left_alone():
    model = build("tiny_vit")
    ranks = (("head/**", 0), ("blocks/1/attention/query/**", 4), ("blocks/*/attention/value/kernel", 2), ("**", 0))
    LoRA(ranks)(model, source_classes=(), target_classes=(), data=DataConfig(), rngs=nnx.Rngs(0))
    downs = {path: value.shape for path, value in arrays_of(model).items() if "down/kernel" in path and "lora" in path}
    assert downs == {
        "blocks/0/attention/value/lora/down/kernel": (8, 2),
        "blocks/1/attention/query/lora/down/kernel": (8, 4),
        "blocks/1/attention/value/lora/down/kernel": (8, 2),
    }
    grouped = nnx.Sequential(nnx.Conv(4, 4, (3, 3), feature_group_count=4, rngs=nnx.Rngs(0)))
    with pytest.raises(InputError, match=r"Sequential: it has no linear layer .* and no convolution"):
        adapt(grouped, [("**", 2)], adapter_scale=1.0, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (
            (("blocks/*/atention/**", 2), ("**", 0)),
            r"no kernel of .* matches `blocks/\*/atention/\*\*`; nearest",
        ),
        ((("blocks/**", 2),), r"no rule covers kernel of a linear layer or convolution `"),
        ((("**", 0),), "LoRA puts no update into ViT: every rank is 0"),
    ],
)
def test_ranks_that_fit_nothing_are_refused(ranks, message):
    with pytest.raises(InputError, match=message):
        adapt(build("tiny_vit"), ranks, adapter_scale=1.0, rngs=nnx.Rngs(0))


def test_numbers_out_of_range_are_refused():
    with pytest.raises(InputError, match=r"the rank of `\*\*` is -1; give a whole number"):
        LoRA((("**", -1),))
    with pytest.raises(InputError, match=r"adapter_scale is 0\.0; give a number above 0"):
        LoRA(adapter_scale=0.0)


def test_a_layer_that_a_model_has_twice_is_adapted_in_both_places():
    layer = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    model = nnx.Sequential(layer, layer)
    adapt(model, [("**", 2)], adapter_scale=1.0, rngs=nnx.Rngs(1))
    assert model.layers[0] is model.layers[1]
    assert list(arrays_of(model)) == [f"layers/0/{path}" for path in sorted(LINEAR_SHAPES)]


def test_abstract_models_are_adapted_alike():
    abstract = arrays_of(nnx.eval_shape(lambda: adapted(build("tiny_vit"))))
    real = arrays_of(adapted(build("tiny_vit")))
    assert {p: (v.shape, v.dtype) for p, v in abstract.items()} == {p: (v.shape, v.dtype) for p, v in real.items()}


def test_the_library_trains_the_updates_of_a_model_it_has_never_seen_and_nothing_below_them():
    model = Net(nnx.Rngs(0))
    adapt(model, [("head/**", 0), ("**", 2)], adapter_scale=2.0, rngs=nnx.Rngs(1))
    partition = Partition.of(model, [("head/**", "head"), ("**/lora/**", "lora"), ("**", "frozen")])
    tx = partition.optimizer({"head": optax.adam(1e-2), "lora": optax.adam(1e-2)})
    start = {path: np.array(value) for path, value in arrays_of(model).items() if "rngs" not in path}
    state, fixed = jxfer.init_state(model, partition, tx)
    train_step = jxfer.make_train_step(jxfer.objectives.classification())
    losses = []
    for _ in range(4):
        state, metrics = train_step(state, fixed, make_batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    end = jxfer.merge_state(state, fixed)
    moved = {path for path, value in start.items() if np.any(value != end[path])}
    factors = {path for path in start if path.endswith(("down/kernel", "up/kernel"))}
    assert moved == factors | {"head/kernel", "head/bias"}
    assert len(factors) == 2 * 13


def test_a_step_costs_less_than_full_fine_tuning_as_no_frozen_kernel_has_a_gradient(monkeypatch):
    monkeypatch.setitem(models._CONFIGS, "vit_64", ViTConfig(4, 64, 2, 2, 256))
    experiment = Experiment("costs", model=ModelConfig("vit_64"))
    task = Task(runs.SOURCE_CLASSES, runs.TARGET_CLASSES, (16, 16, 1))
    shallow = dataclasses.replace(methods.lora, surgeries=(NewHead(), LoRA((("blocks/**", 2), ("**", 0)))))
    flops = {
        method.name: plan.plan_method(experiment, method, task).phases[0][1].step_flops
        for method in (dataclasses.replace(shallow, name="lora"), methods.fine_tuning)
    }
    assert 0.6 < flops["lora"] / flops["fine_tuning"] < 0.75  # two thirds, and the updates' own


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Experiment:
    experiment = dataclasses.replace(runs.write_data(tmp_path_factory.mktemp("data")), model=ModelConfig("tiny_vit"))
    return runs.with_train(experiment, num_steps=6, eval_every=3, optimizer="sgd")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(models._CONFIGS, "tiny_vit", SIZES["tiny_vit"])
        return runs.write_source(tmp_path_factory.mktemp("source") / "run", "tiny_vit")


def finish(experiment, method, directory, source):
    row = run(Job(experiment, method, 3, 0), directory, runs.QUIET, source=source)
    assert row["error"] is None, row["error"]
    return row, checkpoint.load_arrays(directory / "checkpoints" / "final")[0]


@pytest.fixture(scope="module")
def finished(experiment, source, tmp_path_factory):
    """A run of the method, saved as what differs from its source."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(models._CONFIGS, "tiny_vit", SIZES["tiny_vit"])
        runs.use_devices(monkeypatch, 1)
        directory = tmp_path_factory.mktemp("run")
        delta = runs.with_train(dataclasses.replace(experiment, save="delta"), optimizer="adamw")
        return directory, *finish(delta, methods.lora, directory, source)


def test_a_run_moves_updates_and_head_alone_and_keeps_nothing_else_on_disk(finished, source):
    _, row, saved = finished
    assert row["audit"] == {"frozen_unchanged": True, "trainable_moved": 28, "trainable_total": 28}
    assert {path.split("/")[0] if "lora" not in path else "lora" for path in saved} == {"head", "lora"}
    params = sum(value.size for path, value in saved.items() if not path.endswith("scale"))
    assert row["params_trainable"] == params
    assert row["params_total"] > params + 1000


def test_a_finished_run_is_read_back_merged_and_says_what_it_measured(finished, experiment, source):
    directory, *_ = finished
    back = load_run(directory, base=source)
    assert list(back.arrays) == list(arrays_of(build("tiny_vit")))
    split = load_data(experiment.target).splits["train"]
    with np.load(directory / "predictions.npz") as measured:
        rows = [list(split.ids).index(name) for name in measured["ids"]]
        logits = classifier(back)(split.read(np.asarray(rows))["image"])
        np.testing.assert_allclose(logits, measured["logits"], rtol=1e-4, atol=1e-5)


def test_what_it_exports_has_the_layers_names_and_shapes_alone(finished, source, tmp_path):
    back = load_run(finished[0], base=source)
    file, *_ = export(back, tmp_path, names="transformers")
    with safe_open(file, framework="np") as tensors:
        assert not [name for name in tensors.keys() if "lora" in name]  # noqa: SIM118 - no dict
        query = tensors.get_tensor("vit.encoder.layer.1.attention.attention.query.weight")
    np.testing.assert_array_equal(query.T, back.arrays["blocks/1/attention/query/kernel"])
    assert np.any(source.arrays["blocks/1/attention/query/kernel"] != query.T)


def test_one_transfers_from_such_a_run_as_from_any(finished, experiment, source, tmp_path):
    from_it = load_source(finished[0])
    assert from_it.weights_hash != source.weights_hash
    again = dataclasses.replace(experiment, source=dataclasses.replace(experiment.source, weights=f"run:{finished[0]}"))
    row, saved = finish(again, methods.fine_tuning_kept_head, tmp_path, from_it)
    assert row["audit"]["frozen_unchanged"]
    assert not any("lora" in path for path in saved)


def test_what_is_left_of_the_source_task_is_measured_under_the_updates(experiment, source, tmp_path):
    known = dataclasses.replace(source, data=experiment.source.data)
    row, _ = finish(runs.with_train(experiment, learning_rate=1.0), methods.lora, tmp_path / "lora", known)
    before, _ = finish(experiment, methods.linear_probe, tmp_path / "probe", known)
    assert row["source_metrics"]["loss"] != before["source_metrics"]["loss"]


def test_scales_and_seeds_of_updates_train_as_one_population_and_end_as_alone(experiment, source, tmp_path):
    search = SearchConfig(learning_rate=(0.1, 1.0), adapter_scale=(0.5, 4.0), head_seed=(0, 1))
    method = dataclasses.replace(methods.lora, surgeries=(NewHead(), LoRA(EVERYWHERE)))
    row, arrays = finish(dataclasses.replace(experiment, search=search), method, tmp_path / "together", source)
    apart = dataclasses.replace(experiment, search=dataclasses.replace(search, population=1))
    alone, expected = finish(apart, method, tmp_path / "apart", source)
    assert row["population"][0]["parts"] == [8]
    assert alone["population"][0]["parts"] == [1] * 8
    losses = {each["variant"]: each["validation_metrics"]["loss"] for each in row["variants"]}
    assert len(set(losses.values())) == 8, "each number makes a difference"
    for each in alone["variants"]:
        assert losses[each["variant"]] == pytest.approx(each["validation_metrics"]["loss"], rel=1e-4)
    assert row["variant"] == alone["variant"]
    for path, value in expected.items():
        np.testing.assert_allclose(arrays[path], value, rtol=1e-3, atol=1e-4, err_msg=path)
    scales = {float(value) for path, value in arrays.items() if path.endswith("lora/scale")}
    assert scales == {float(row["variant"].split("adapter_scale=")[1])}


def test_variants_whose_frozen_updates_differ_train_apart(experiment):
    phases = (Phase("probe", ("head",), share=0.5), Phase("tune", ("head", "lora"), share=0.5))
    method = dataclasses.replace(methods.lora, surgeries=(NewHead(), LoRA(EVERYWHERE)), phases=phases)
    task = Task(runs.SOURCE_CLASSES, runs.TARGET_CLASSES, (8, 8, 1))

    def parts(search: SearchConfig) -> list[tuple[int, ...]]:
        searching = dataclasses.replace(experiment, search=search)
        return [population.parts for population in plan.plan_method(searching, method, task).populations]

    assert parts(SearchConfig(learning_rate=(0.1, 0.2))) == [(2,), (2,)]
    assert parts(SearchConfig(adapter_scale=(0.5, 4.0))) == [(1, 1), (2,)]


def test_features_under_updates_that_differ_are_counted_for_each(experiment, source, tmp_path, monkeypatch):
    monkeypatch.setenv("JXFER_CACHE", str(tmp_path / "cache"))
    phases = (Phase("probe", ("head",), solver=RidgePath()), Phase("tune", ("head", "lora")))
    method = dataclasses.replace(methods.lora, surgeries=(NewHead(), LoRA(EVERYWHERE)), phases=phases)
    scales = SearchConfig(adapter_scale=(0.5, 4.0))
    row, _ = finish(dataclasses.replace(experiment, search=scales), method, tmp_path / "two", source)
    alone, _ = finish(experiment, method, tmp_path / "one", source)
    for name in ("examples", "flops"):
        assert row["features"][name] == 2 * alone["features"][name], name
    assert row["features"]["reused"] == 0
    rates = dataclasses.replace(experiment, search=SearchConfig(learning_rate=(0.1, 1.0)))
    shared, _ = finish(rates, method, tmp_path / "rates", source)
    assert shared["features"]["examples"] == alone["features"]["examples"]


def test_methods_without_adapters_are_not_searched_for_their_scale(experiment):
    searching = dataclasses.replace(experiment, search=SearchConfig(adapter_scale=(0.5, 4.0)))
    assert [each.name for each in variants(searching, methods.linear_probe)] == ["default"]
    assert [each.name for each in variants(searching, methods.lora)] == ["adapter_scale=0.5", "adapter_scale=4"]
    with pytest.raises(InputError, match=r"search\.adapter_scale"):
        check(dataclasses.replace(searching, search=SearchConfig(adapter_scale=(0.0,))))


@pytest.mark.parity
def test_peft_computes_and_merges_the_same():
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    ours = nnx.Sequential(
        nnx.Conv(3, 5, (3, 3), strides=2, padding=1, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(5, 4, rngs=nnx.Rngs(0))
    )
    theirs = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3, stride=2, padding=1), torch.nn.ReLU(), torch.nn.Linear(5, 4))
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0", "2"]))
    adapt(ours, [("**", 2)], adapter_scale=6 / 2, rngs=nnx.Rngs(1))
    trained(ours)
    arrays = {path: np.asarray(value) for path, value in arrays_of(ours).items()}
    module = wrapped.base_model.model
    names = {"kernel": "base_layer.weight", "bias": "base_layer.bias"}
    names |= {"lora/down/kernel": "lora_A.default.weight", "lora/up/kernel": "lora_B.default.weight"}
    to_torch = {4: lambda x: x.transpose(3, 2, 0, 1), 2: lambda x: x.T, 1: lambda x: x}
    with torch.no_grad():
        for index in (0, 2):
            for own, other in names.items():
                value = arrays[f"layers/{index}/{own}"]
                parameter = module[index].get_parameter(other)
                parameter.copy_(torch.tensor(to_torch[value.ndim](value).reshape(parameter.shape)))
        x = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
        features = torch.relu(module[0](torch.from_numpy(x))).mean((2, 3))
        expected = module[2](features).numpy()
        found = ours.layers[2](nnx.relu(ours.layers[0](jnp.asarray(x.transpose(0, 2, 3, 1)))).mean((1, 2)))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        whole, plain = merged(arrays), wrapped.merge_and_unload()
        for index in (0, 2):
            kernel = to_torch[whole[f"layers/{index}/kernel"].ndim](whole[f"layers/{index}/kernel"])
            np.testing.assert_allclose(kernel, plain[index].weight.numpy(), rtol=1e-5, atol=1e-6)
