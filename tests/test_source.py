"""The source's weights: what comes with published ones, reading them in a run, and runs that keep only a difference."""

import dataclasses
import json

import numpy as np
import pytest
import runs
from flax import nnx

from jxfer import ablate, checkpoint, known, methods, models, plan, source
from jxfer.config import DataConfig, ModelConfig, SourceConfig
from jxfer.partition import arrays_of
from jxfer.typing import InputError
from jxfer.weights.names import identify, namings_of
from jxfer.weights.save import export_tensors, write_safetensors

MODEL = "tiny_resnet20"


@pytest.fixture(autouse=True)
def _tiny_models(monkeypatch):
    runs.add_models(monkeypatch)
    runs.use_devices(monkeypatch, 1)


def publish(file, *, head: bool = True) -> SourceConfig:
    """Writes a source's weights as somebody else would."""
    size = models.size_of(ModelConfig(MODEL))
    tensors = export_tensors(arrays_of(runs.build_source(MODEL)), namings_of(size)[0], size)
    kept = {name: value for name, value in tensors.items() if head or not name.startswith("linear.")}
    write_safetensors(file, kept, {})
    known.open_weights.cache_clear()
    return SourceConfig(weights=f"file:{file}", classes=runs.SOURCE_CLASSES if head else ())


@pytest.fixture
def experiment(tmp_path):
    written = runs.write_data(tmp_path / "data")
    published = publish(tmp_path / "weights.safetensors")
    return dataclasses.replace(written, source=published, model=ModelConfig(MODEL))


def test_what_comes_with_weights_fills_what_the_user_left_open(experiment):
    resolved = known.resolve(experiment)
    assert (resolved.target.image_size, resolved.target.channels) == (32, 1), "as its first kernel has"
    assert resolved.target.mean == (pytest.approx((0.485 + 0.456 + 0.406) / 3),), "as kernels are summed"
    colour = dataclasses.replace(experiment, target=dataclasses.replace(experiment.target, channels=3))
    assert known.resolve(colour).target.mean == (0.485, 0.456, 0.406)
    own = dataclasses.replace(experiment, target=dataclasses.replace(experiment.target, mean=(0.1,)))
    assert known.resolve(own).target.mean == (0.1,)
    assert known.resolve(resolved) == resolved


def test_published_weights_are_read_as_they_were_written(experiment):
    found = source.read_source(experiment, num_classes=3, input_shape=(8, 8, 1))
    expected = arrays_of(runs.build_source(MODEL))
    assert found.arrays.keys() == expected.keys()
    for path, value in found.arrays.items():
        np.testing.assert_array_equal(value, expected[path], path)
    assert found.classes == runs.SOURCE_CLASSES
    assert found.manifest.coverage == found.manifest.used == 1.0


def test_weights_without_a_head_serve_methods_that_bring_one(tmp_path, experiment):
    headless = dataclasses.replace(experiment, source=publish(tmp_path / "headless.safetensors", head=False))
    grey = dataclasses.replace(headless, target=dataclasses.replace(headless.target, mean=(0.5,), std=(0.5,)))
    (row,) = ablate.ablate(runs.with_methods(grey, methods.linear_probe), tmp_path / "out", runs.QUIET, command="")
    assert (row["status"], row["source"]) == ("ok", headless.source.weights)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert {leaf["path"] for leaf in manifest["leaves"] if leaf["status"] == "re-initialised"} == {
        "head/bias",
        "head/kernel",
    }
    with pytest.raises(InputError, match=r"the source's weights have no head .* use a new head"):
        ablate.ablate(runs.with_methods(grey, methods.zero_shot), tmp_path / "out", runs.QUIET, command="")


def test_an_unnamed_network_and_a_wrong_number_of_names_are_errors(experiment):
    unnamed = dataclasses.replace(experiment, model=ModelConfig(models.AUTO))
    with pytest.raises(InputError, match=r"does not say of which network it is; give model.name: `.* or another"):
        known.resolve(unnamed)
    misnamed = dataclasses.replace(experiment, source=dataclasses.replace(experiment.source, classes=("a", "b")))
    with pytest.raises(InputError, match=r"source.classes has 2 names, but the head of .* has 5 outputs"):
        known.resolve(misnamed)
    own = dataclasses.replace(experiment, model=ModelConfig("tiny_convnet"))
    with pytest.raises(InputError, match="no published names are known for `tiny_convnet`"):
        known.resolve(own)


def test_a_published_config_names_its_network():
    assert identify({"model_type": "none of ours"}) is None
    config = {
        "model_type": "bert",
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 512,
        "vocab_size": 30522,
    }
    found = identify(config)
    assert (found.name, dict(found.size)["num_layers"]) == ("bert_tiny", "3")
    assert models.size_of(found).num_layers == 3


def test_another_file_under_the_same_name_is_noticed(tmp_path, experiment):
    grey = dataclasses.replace(experiment, target=dataclasses.replace(experiment.target, mean=(0.5,), std=(0.5,)))
    ablate.ablate(runs.with_methods(grey, methods.zero_shot), tmp_path / "out", runs.QUIET, command="")
    publish(tmp_path / "weights.safetensors", head=False)
    with pytest.raises(InputError, match=r"the source weights has changed|source.classes"):
        ablate.ablate(
            runs.with_methods(dataclasses.replace(grey, source=publish_other(tmp_path, grey)), methods.zero_shot),
            tmp_path / "out",
            runs.QUIET,
            command="",
        )


def publish_other(folder, experiment) -> SourceConfig:
    """Writes other values under the old name."""
    file = folder / "weights.safetensors"
    size = models.size_of(ModelConfig(MODEL))
    arrays = {path: value + 1 for path, value in arrays_of(runs.build_source(MODEL)).items()}
    write_safetensors(file, export_tensors(arrays, namings_of(size)[0], size), {})
    known.open_weights.cache_clear()
    return experiment.source


@pytest.fixture(scope="module")
def delta_run(tmp_path_factory):
    """A linear probe that keeps only its head, and the same one whole."""
    root = tmp_path_factory.mktemp("delta")
    with pytest.MonkeyPatch.context() as monkeypatch:
        runs.add_models(monkeypatch)
        runs.use_devices(monkeypatch, 1)
        experiment = runs.write_data(root / "data")
        for save in ("delta", "full"):
            trial = dataclasses.replace(experiment, model=ModelConfig(MODEL), save=save)
            ablate.ablate(runs.with_methods(trial, methods.linear_probe), root / save, runs.QUIET, command="")
    return root / "delta" / "runs" / "linear_probe-shots3-seed0"


def test_a_delta_holds_what_trained_and_is_whole_on_its_base(delta_run):
    kept, metadata = checkpoint.load_arrays(delta_run / "checkpoints" / "final")
    assert set(kept) == {"head/bias", "head/kernel"}
    assert metadata["base"]["source"]["weights"].startswith("run:..")
    whole = source.load_run(delta_run)
    full = source.load_run(delta_run.parents[2] / "full" / "runs" / delta_run.name)
    assert whole.arrays.keys() == full.arrays.keys()
    for path, value in full.arrays.items():
        np.testing.assert_array_equal(whole.arrays[path], value, path)
    assert isinstance(whole.build(), nnx.Module)


def test_a_run_that_changes_nothing_is_whole_on_its_base_too(experiment, tmp_path):
    same_classes = DataConfig(f"folder:{tmp_path / 'data' / 'source'}")
    trial = dataclasses.replace(experiment, target=same_classes, save="delta")
    ablate.ablate(runs.with_methods(trial, methods.zero_shot), tmp_path / "out", runs.QUIET, command="")
    directory = tmp_path / "out" / "runs" / "zero_shot-shots3-seed0"
    kept, _ = checkpoint.load_arrays(directory / "checkpoints" / "final")
    assert len(kept) == 1
    for path, value in arrays_of(runs.build_source(MODEL)).items():
        np.testing.assert_array_equal(source.load_run(directory).arrays[path], value, path)


def test_a_delta_on_another_base_is_an_error(delta_run, tmp_path):
    base = source.load_source(delta_run.parents[1] / "source")
    assert source.load_run(delta_run, base=base).arrays
    other = dataclasses.replace(base, weights_hash="0" * 16)
    with pytest.raises(InputError, match=r"keeps only what differs from weights of hash \w{16}, but its base .* has 0"):
        source.load_run(delta_run, base=other)
    moved = runs.copy_of(delta_run, tmp_path / "runs" / delta_run.name)
    with pytest.raises(InputError, match=r"its base, which is not there: no finished run in .*source"):
        source.load_run(moved)


def test_a_delta_on_published_weights_names_them_where_they_are_not_the_same_any_more(tmp_path, experiment):
    grey = dataclasses.replace(experiment.target, image_size=8)
    trial = dataclasses.replace(experiment, save="delta", target=grey)
    ablate.ablate(runs.with_methods(trial, methods.linear_probe), tmp_path / "out", runs.QUIET, command="")
    run = tmp_path / "out" / "runs" / "linear_probe-shots3-seed0"
    whole = source.load_run(run)
    np.testing.assert_array_equal(whole.arrays["stem/conv/kernel"], runs.build_source(MODEL).stem.conv.kernel[...])
    write_safetensors(tmp_path / "weights.safetensors", {"another": np.zeros(3, np.float32)}, {})
    known.open_weights.cache_clear()
    with pytest.raises(InputError, match=r"keeps only what differs .* has \w{16}; give it the base that it was"):
        source.load_run(run)
    (tmp_path / "weights.safetensors").unlink()
    known.open_weights.cache_clear()
    with pytest.raises(InputError, match=r"keeps only what differs from its base, which is not there: .*does not"):
        source.load_run(run)


def test_the_folder_of_an_ablation_is_answered_with_a_run_in_it(delta_run):
    ablation = delta_run.parents[1]
    with pytest.raises(InputError, match=f"no finished run .*; name one of its runs, such as '{delta_run}'"):
        source.load_run(ablation)
    with pytest.raises(InputError, match=f"no run there, .*; name one of its runs, such as '{delta_run}'"):
        known.known_of(SourceConfig(weights=f"run:{ablation}"), ModelConfig(MODEL))


def test_a_plan_refuses_weights_that_do_not_fit_before_anything_is_read(experiment):
    grey = dataclasses.replace(experiment, target=dataclasses.replace(experiment.target, image_size=8))
    assert plan.plan_experiment(grey, methods.linear_probe).phases
    other = dataclasses.replace(grey, model=ModelConfig(MODEL, size=(("num_blocks", "2"),)))
    with pytest.raises(InputError, match="no tensor for `layer1/1/bn1/bias` and"):
        plan.plan_experiment(other, methods.linear_probe)
    assert plan.plan_experiment(other, methods.scratch).phases
    misspelt = dataclasses.replace(grey, source=dataclasses.replace(grey.source, load=(("haed/**", "reinitialise"),)))
    with pytest.raises(InputError, match=r"no parameter matches `haed/\*\*`; nearest: `head/\*\*`"):
        plan.plan_experiment(misspelt, methods.linear_probe)


def test_a_runs_preprocessing_travels_with_its_weights(tmp_path, experiment):
    own = dataclasses.replace(experiment.target, image_size=8, mean=(0.25,), std=(0.125,), channels=1)
    pretrained = dataclasses.replace(experiment, target=own)
    ablate.ablate(runs.with_methods(pretrained, methods.zero_shot), tmp_path / "source", runs.QUIET, command="")
    weights = f"run:{tmp_path / 'source' / 'runs' / 'zero_shot-shots3-seed0'}"
    transfer = dataclasses.replace(
        experiment, source=SourceConfig(weights=weights), model=ModelConfig(models.AUTO), target=experiment.target
    )
    resolved = known.resolve(transfer)
    assert (resolved.target.mean, resolved.target.std, resolved.model.name) == ((0.25,), (0.125,), MODEL)
    assert isinstance(resolved.target, DataConfig)
