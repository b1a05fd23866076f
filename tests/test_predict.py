"""Finished runs at work: predictions for files and folders, and weights for the rest of the world."""

import dataclasses
import io
import json
import shutil

import jax.export
import numpy as np
import pytest
import runs

from jxfer import ablate, cli, known, methods, models, pretrained, source
from jxfer.config import ModelConfig, SourceConfig
from jxfer.export import export
from jxfer.predict import predict
from jxfer.typing import InputError
from jxfer.weights.files import open_tensors
from jxfer.weights.load import read, weights_of
from jxfer.weights.names import namings_of
from jxfer.weights.save import export_tensors, write_safetensors

MODEL = "tiny_resnet20"


@pytest.fixture(autouse=True)
def _tiny_models(monkeypatch):
    runs.add_models(monkeypatch)
    runs.use_devices(monkeypatch, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An ablation of a probe and of a retrained MLP on published weights."""
    root = tmp_path_factory.mktemp("predict")
    with pytest.MonkeyPatch.context() as monkeypatch:
        runs.add_models(monkeypatch)
        runs.use_devices(monkeypatch, 1)
        experiment = dataclasses.replace(runs.write_data(root / "data"), model=ModelConfig(MODEL))
        size = models.size_of(experiment.model)
        tensors = export_tensors(weights_of(runs.build_source(MODEL)), namings_of(size)[0], size)
        write_safetensors(root / "weights.safetensors", tensors, {})
        trial = dataclasses.replace(
            runs.with_methods(experiment, methods.linear_probe, methods.feature_retraining),
            source=SourceConfig(weights=f"file:{root / 'weights.safetensors'}"),
            target=dataclasses.replace(experiment.target, image_size=8, channels=1, mean=(0.5,), std=(0.5,)),
        )
        ablate.ablate(trial, root / "out", runs.QUIET, command="")
    return root


def directory(folder, method="linear_probe"):
    return folder / "out" / "runs" / f"{method}-shots3-seed0"


@pytest.mark.parametrize("method", ["linear_probe", "feature_retraining"])
def test_predictions_are_those_that_the_run_was_measured_by(folder, method):
    with np.load(directory(folder, method) / "predictions.npz") as stored:
        expected = {str(name): logits for name, logits in zip(stored["ids"], stored["logits"], strict=True)}
    found = list(predict(source.load_run(directory(folder, method)), [str(folder / "data" / "target")]))
    assert len(found) == 90
    for prediction in found:
        name = "/".join(prediction.input.split("/")[-2:])
        if name in expected:
            assert prediction.label == runs.TARGET_CLASSES[int(expected[name].argmax())]
            odds = np.exp(expected[name] - expected[name].max())
            top = next(iter(prediction.probabilities.values()))
            assert top == pytest.approx(odds.max() / odds.sum(), rel=1e-4)
            assert sum(prediction.probabilities.values()) == pytest.approx(1.0)


def test_unreadable_inputs_are_reported_one_by_one_and_the_rest_is_done(folder, tmp_path, capsys):
    shutil.copytree(folder / "data" / "target" / "b", tmp_path / "mixed")
    (tmp_path / "mixed" / "000.png").write_bytes(b"no image")
    (tmp_path / "mixed" / "notes.txt").write_text("no image either")
    status = cli.main(["predict", str(directory(folder)), str(tmp_path / "mixed"), "--json"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert status == cli.BAD_INPUT
    assert len(lines) == 31
    assert {line["input"].rsplit("/", 1)[1] for line in lines if "error" in line} == {"000.png", "notes.txt"}
    assert all(line["label"] in runs.TARGET_CLASSES for line in lines if "error" not in line)
    status = cli.main(["predict", str(directory(folder)), str(tmp_path / "mixed" / "001.png")])
    heading, row = capsys.readouterr().out.splitlines()
    assert status == cli.DONE
    assert heading.split() == ["class", "share", "next", "input"]
    assert row[heading.index("input") :].endswith("001.png")
    assert row[heading.index("share") :].split()[0].endswith("%")


def test_what_is_not_there_is_reported_too_and_a_missing_run_is_an_error(folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    image = folder / "data" / "target" / "b" / "000.png"
    inputs = [str(tmp_path / "nowhere.png"), str(tmp_path / "empty"), str(image)]
    assert cli.main(["predict", str(directory(folder)), *inputs]) == cli.BAD_INPUT
    shown = capsys.readouterr()
    assert shown.err.splitlines() == [
        f"{inputs[0]}: cannot be read: no such file or folder",
        f"{inputs[1]}: cannot be read: the folder has no files",
        "jxfer: inputs that could not be read: 2",
    ]
    assert [line.split()[-1] for line in shown.out.splitlines()] == ["input", str(image)]
    with pytest.raises(InputError, match=r"no finished run in '.*empty'"):
        source.load_run(tmp_path / "empty")


def test_an_export_is_read_back_by_the_names_of_the_field(folder, tmp_path):
    run = source.load_run(directory(folder))
    files = export(run, tmp_path / "export")
    tensors = open_tensors(files[:1])
    assert "layer1.0.conv1.weight" in tensors
    assert "linear.weight" in tensors
    size = models.size_of(run.model)
    arrays, manifest = read(tensors, namings_of(size), size, run.arrays, what="export")
    assert manifest.coverage == manifest.used == 1.0
    for path, value in run.arrays.items():
        np.testing.assert_array_equal(arrays[path], value, path)
    card = (tmp_path / "export" / "README.md").read_text()
    result = json.loads((directory(folder) / "result.json").read_text())
    assert f"| test | accuracy | {result['metrics']['accuracy']:.4f} |" in card
    assert "head/kernel" in card, "what trained"
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert list(config["id2label"].values()) == list(runs.TARGET_CLASSES)
    processor = json.loads((tmp_path / "export" / "preprocessor_config.json").read_text())
    assert processor["image_mean"] == [0.5]
    for file in files:
        assert str(folder).encode() not in file.read_bytes(), "where the data lie is nobody else's concern"


def test_standard_input_is_for_texts(folder):
    with pytest.raises(InputError, match="`-` reads texts, and `tiny_resnet20` reads image"):
        predict(source.load_run(directory(folder)), ["-"])


def test_a_network_that_only_we_have_goes_out_under_our_names(folder, tmp_path):
    mlp = source.load_run(directory(folder, "feature_retraining"))
    with pytest.raises(InputError, match=r"no name for `head/hidden/\w+`.*`--names jxfer`"):
        export(mlp, tmp_path / "theirs")
    files = export(mlp, tmp_path / "ours", names="jxfer")
    assert {name.replace(".", "/") for name in open_tensors(files[:1])} == set(mlp.arrays)
    with pytest.raises(InputError, match=r"unknown names for `tiny_resnet20`: `torchvsion`"):
        export(mlp, tmp_path / "theirs", names="torchvsion")


@pytest.mark.parametrize("names", [None, "jxfer"])
def test_an_export_is_a_source_that_says_of_itself_all_that_a_user_need_not_know(names, folder, tmp_path):
    run = source.load_run(directory(folder))
    export(dataclasses.replace(run, data=dataclasses.replace(run.data, mean=(0.25,))), tmp_path / "export", names=names)
    origin = f"file:{tmp_path / 'export'}"
    found = known.known_of(SourceConfig(weights=origin), ModelConfig(models.AUTO))
    assert (found.model, found.classes) == (run.model, run.classes)
    assert (found.preprocessing["mean"], found.preprocessing["image_size"]) == ((0.25,), 8)
    model = pretrained.load(origin)
    for path, value in weights_of(model).items():
        np.testing.assert_array_equal(value, run.arrays[path], path)


def test_the_exported_function_gives_the_logits_for_any_batch(folder, tmp_path):
    run = source.load_run(directory(folder))
    status = cli.main(["export", str(directory(folder)), str(tmp_path / "export"), "--stablehlo"])
    assert status == cli.DONE
    function = jax.export.deserialize(bytearray((tmp_path / "export" / "model.stablehlo").read_bytes()))
    images = np.random.default_rng(0).integers(0, 255, (5, *run.input_shape)).astype(np.uint8)
    from jxfer.predict import classifier

    np.testing.assert_allclose(function.call(images), classifier(run)(images), rtol=1e-5, atol=1e-5)
    assert function.call(images[:2]).shape == (2, 3)


@pytest.mark.parametrize("args", [["predict"], ["predict", "RUN"], ["export", "RUN"], ["export", "RUN", "DIR", "more"]])
def test_wrong_numbers_of_operands_are_one_line(args, capsys):
    assert cli.main(args) == cli.BAD_INPUT
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "usage: jxfer" in error


def test_texts_are_predicted_from_lines_on_standard_input(tmp_path, monkeypatch, capsys):
    rows = [f"{text} number {i}\t{label}" for i in range(30) for text, label in (("good fine", "+"), ("bad poor", "-"))]
    (tmp_path / "texts.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    size = (("vocab_size", "50"), ("embedding_dim", "8"), ("hidden_dim", "8"), ("num_layers", "1"), ("dropout", "0.1"))
    experiment = runs.with_train(runs.write_data(tmp_path / "data"), num_steps=40, learning_rate=0.03)
    target = dataclasses.replace(
        experiment.target, name=f"table:{tmp_path / 'texts.tsv'}", tokenizer="words:50", max_tokens=6
    )
    trial = dataclasses.replace(experiment, target=target, model=ModelConfig("lstm", size=size), shots=(10,))
    (row,) = ablate.ablate(runs.with_methods(trial, methods.scratch), tmp_path / "out", runs.QUIET, command="")
    assert row["metrics"]["accuracy"] > 0.9
    monkeypatch.setattr("sys.stdin", io.StringIO("good fine number 3\nbad poor\n"))
    directory = tmp_path / "out" / "runs" / "scratch-shots10-seed0"
    assert cli.main(["predict", str(directory), "-"]) == cli.DONE
    assert [line[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["+", "-"]
    # Dropout's counters are in the run, and in no weights file.
    run = source.load_run(directory)
    assert run.arrays.keys() - run.weights.keys() == {"embed/dropout/rngs/count", "layers/0/dropout/rngs/count"}
    assert cli.main(["export", str(directory), str(tmp_path / "export")]) == cli.DONE
    for origin in (f"run:{directory}", f"file:{tmp_path / 'export'}"):
        found = weights_of(pretrained.load(origin))
        assert all(np.array_equal(found[path], value) for path, value in run.weights.items())
    preparation = known.known_of(SourceConfig(weights=f"file:{tmp_path / 'export'}"), run.model).preprocessing
    assert preparation == {"channels": None, "max_tokens": 6, "tokenizer": f"file:{tmp_path / 'export'}"}


def test_given_word_vectors_are_loaded_and_the_rest_begins_anew(tmp_path):
    words = ("good", "fine", "bad", "poor")
    vectors = [f"{word} {' '.join([str(sign)] * 4)}" for word, sign in zip(words, (1, 1, -1, -1), strict=True)]
    (tmp_path / "vectors.txt").write_text("\n".join(vectors) + "\n")
    rows = [f"{text}\t{label}" for _ in range(15) for text, label in (("good fine", "+"), ("bad poor", "-"))]
    (tmp_path / "texts.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    experiment = runs.with_train(runs.write_data(tmp_path / "data"), num_steps=4)
    trial = dataclasses.replace(
        experiment,
        source=SourceConfig(
            weights=f"file:{tmp_path / 'vectors.txt'}", load=(("embed/**", "load"), ("**", "reinitialise"))
        ),
        target=dataclasses.replace(experiment.target, name=f"table:{tmp_path / 'texts.tsv'}", max_tokens=4),
        model=ModelConfig("gru", size=(("hidden_dim", "4"), ("num_layers", "1"))),
        shots=(3,),
    )
    (row,) = ablate.ablate(runs.with_methods(trial, methods.linear_probe), tmp_path / "out", runs.QUIET, command="")
    assert row["status"] == "ok"
    run = source.load_run(tmp_path / "out" / "runs" / "linear_probe-shots3-seed0")
    table = run.arrays["embed/embedding"]
    np.testing.assert_array_equal(table[2:], [[1] * 4, [1] * 4, [-1] * 4, [-1] * 4])
    assert (row["params_trainable"], run.data.max_tokens) == (2 * 8 + 2, 4)
