"""Every experiment runs, shrunk: a few steps of each method, one seed, the first number of shots, and its report."""

import ast
import dataclasses
import itertools
import runpy
from pathlib import Path

import numpy as np
import pytest
import runs
import scipy.io.wavfile
from flax import nnx

from jxfer import ablate, methods, models, report
from jxfer.config import DataConfig, Experiment, ModelConfig, SearchConfig, TrainConfig
from jxfer.data import glyphs
from jxfer.overrides import load_experiment
from jxfer.weights.load import weights_of
from jxfer.weights.names import namings_of
from jxfer.weights.save import export_tensors, write_safetensors

FILES = sorted((Path(__file__).parents[1] / "experiments").glob("*.py"))


def shrink(train: TrainConfig) -> TrainConfig:
    return dataclasses.replace(
        train, num_steps=4, batch_size=16, eval_every=2, log_every=2, warmup_steps=0, checkpoint_every=None
    )


SIZES = {
    "squeezenet1_1": (("stem_width", "8"), ("squeezed", "8,8,8,8,8,8,8,8"), ("expanded", "8,8,8,8,8,8,8,8")),
    "resnet20": (("num_blocks", "1"), ("widths", "4,6,8")),
    "speech_embedding": (("widths", "4,4,6,8,8"),),
    "minilm_l6": (
        ("hidden_dim", "16"),
        ("num_layers", "1"),
        ("num_heads", "2"),
        ("mlp_dim", "16"),
        ("vocab_size", "60"),
    ),
}
"""Of the networks whose published weights an experiment starts from."""


def publish(experiment: Experiment, folder: Path) -> Experiment:
    """Returns the experiment with a small network, and weights of it where the published ones would be."""
    name = "minilm_l6" if experiment.model.name == "auto" else experiment.model.name
    model = ModelConfig(name, size=SIZES[name])
    size = models.size_of(model)
    classes = experiment.source.classes
    shape = {"image": (32, 32, 3), "audio": (16000,), "text": (8,)}[models.reads(model)]
    built = models.build(model, num_classes=len(classes) or 3, input_shape=shape, rngs=nnx.Rngs(0))
    naming = namings_of(size)[-1 if models.reads(model) == "text" else 0]
    arrays = {path: value for path, value in weights_of(built).items() if classes or not path.startswith("head/")}
    file = folder / "weights.safetensors"
    write_safetensors(file, export_tensors(arrays, naming, size), {})
    return dataclasses.replace(
        experiment, model=model, source=dataclasses.replace(experiment.source, weights=f"file:{file}")
    )


def write_target(experiment: Experiment, folder: Path) -> DataConfig:
    """Writes a small data set of the kind and the classes that the experiment expects of its user's."""
    target, classes = experiment.target, experiment.source.classes or runs.TARGET_CLASSES
    folder.mkdir()
    if models.reads(experiment.model) == "image":
        name = runs.write_folder(folder / "images", classes)
        return dataclasses.replace(target, name=name, image_size=32, channels=3, validation_fraction=0.3)
    if models.reads(experiment.model) == "text":
        rows = [f"{label},title {label},text number {index}" for index in range(20) for label in "1234"]
        (folder / "texts.csv").write_text("\n".join(rows) + "\n")
        tokenizer = {"tokenizer": "words:60", "max_tokens": 8, "test_fraction": 0.3, "validation_fraction": 0.1}
        return dataclasses.replace(target, name=f"table:{folder / 'texts.csv'}", **tokenizer)
    rng = np.random.default_rng(0)
    for digit, speaker, index in itertools.product(range(2), ("ann", "bob"), range(12)):
        sound = (1000 * rng.normal(size=4000)).astype(np.int16)
        scipy.io.wavfile.write(folder / f"{digit}_{speaker}_{index}.wav", 8000, sound)
    runpy.run_path(str(Path(__file__).parents[1] / "experiments" / "spoken_digits.py"))["main"](folder)
    return dataclasses.replace(target, name=f"table:{folder / 'digits.csv'}", seconds=0.5, validation_fraction=0.3)


def shrunk(experiment: Experiment, folder: Path) -> Experiment:
    """Returns the experiment with little to do, its first two methods and its own: `test_run.py` has jxfer's.

    A folder of the user's own is one that is written here, and so are published weights.
    """
    folder.mkdir()
    if experiment.source.weights is None:
        small = dataclasses.replace(
            experiment,
            source=dataclasses.replace(experiment.source, train=shrink(experiment.source.train)),
            model=dataclasses.replace(experiment.model, name=f"tiny_{experiment.model.name}"),
        )
        if experiment.target.name.startswith("folder:"):
            name = runs.write_folder(folder / "images", runs.TARGET_CLASSES)
            small = dataclasses.replace(small, target=dataclasses.replace(small.target, name=name))
    else:
        small = publish(experiment, folder)
        small = dataclasses.replace(small, target=write_target(small, folder / "data"))
    return dataclasses.replace(
        small,
        train=shrink(experiment.train),
        methods=tuple(
            each for i, each in enumerate(experiment.methods) if i < 2 or methods.METHODS.get(each.name) != each
        ),
        search=SearchConfig(experiment.search.learning_rate[:1]),
        shots=(2,) if experiment.shots[0] else (None,),
        seeds=1,
    )


SLOW = ("image_folder", "spoken_digits")
"""Of which the others have the like: a folder, published weights."""

EACH = [pytest.param(file, marks=pytest.mark.slow if file.stem in SLOW else (), id=file.stem) for file in FILES]


@pytest.mark.parametrize("file", EACH)
def test_every_experiment_runs_and_makes_its_report(file, tmp_path, monkeypatch, sketched):
    monkeypatch.setenv("JXFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(glyphs, "EXAMPLES_PER_CLASS", {"train": 6, "test": 2})  # rendering characters takes long
    runs.add_models(monkeypatch)
    runs.use_devices(monkeypatch, 1)
    experiment = shrunk(load_experiment(file), tmp_path / "folder")
    rows = ablate.ablate(experiment, tmp_path / "out", runs.QUIET, command=f"jxfer ablate {file}")
    assert [(row["method"], row["status"], row["error"]) for row in rows] == [
        (method.name, "ok", None) for method in experiment.methods
    ]
    report.build(tmp_path / "out")
    for name in ("report.md", "report.html"):
        text = (tmp_path / "out" / name).read_text()
        assert all(method.name in text for method in experiment.methods)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_experiment_says_what_it_claims_and_how_to_run_it(file):
    docstring = ast.get_docstring(ast.parse(file.read_text()))
    assert f"jxfer ablate experiments/{file.name}" in docstring
    assert load_experiment(file).name == file.stem


def test_there_is_an_experiment_on_a_folder_of_the_users_own():
    targets = [load_experiment(file).target for file in FILES]
    assert any(isinstance(target, DataConfig) and target.name.startswith("folder:") for target in targets)
