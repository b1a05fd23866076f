"""Small experiments for the tests: folders of 8x8 images, networks of a few channels, a session that shows nothing."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from flax import nnx
from PIL import Image

from jxfer import checkpoint, models, partition, sharding, source
from jxfer.config import (
    DataConfig,
    Experiment,
    Group,
    MeshConfig,
    Method,
    ModelConfig,
    Phase,
    SourceConfig,
    TrainConfig,
)
from jxfer.loop import Session
from jxfer.methods import ALL
from jxfer.surgery.head import NewHead

MODELS = {f"tiny_{name}": size for name, size in tiny.CONFIGS.items()}
"""One of every kind of model, under names of their own: what jxfer remembers within a process goes by name."""

SOURCE_CLASSES = ("a", "b", "c", "d", "e")
TARGET_CLASSES = ("b", "c", "e")
"""Some of the source's classes, and not its first ones."""

TRAIN = TrainConfig(num_steps=4, batch_size=16, learning_rate=1e-2, eval_every=2, log_every=2)

TWO_PHASES = Method(
    "two_phases",
    surgeries=(NewHead(),),
    phases=(
        Phase("probe", train=("head",), share=0.5),
        Phase("tune", train=ALL, share=0.5, groups=(("head", Group(0.1)), ("backbone", Group(0.1)))),
    ),
)
"""A method whose second phase begins where the first one ends."""

QUIET = Session(progress=lambda what, done, total: None, should_stop=lambda: False)


def stop_after(num_calls: int) -> Session:
    """Returns a session that wants to stop once progress was reported so many times."""
    seen: list[str] = []
    return Session(lambda what, done, total: seen.append(what), lambda: len(seen) >= num_calls)


def add_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the networks of `MODELS` known to jxfer."""
    for name, size in MODELS.items():
        monkeypatch.setitem(models._CONFIGS, name, size)


def use_devices(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Lets runs see the first `count` devices alone."""

    def make_mesh(config: MeshConfig) -> jax.sharding.Mesh:
        return sharding.make_mesh(config, devices=jax.devices()[:count])

    for user in ("search", "phase"):
        monkeypatch.setattr(f"jxfer.{user}.make_mesh", make_mesh)


def write_folder(root: Path, class_names: Sequence[str], *, per_class: int = 30) -> str:
    """Writes 8x8 images, noise around a pattern of each class, and returns the data set's name."""
    for class_name in class_names:
        rng = np.random.default_rng(ord(class_name[0]))
        pattern = rng.uniform(0, 127, (8, 8))
        (root / class_name).mkdir(parents=True)
        for index in range(per_class):
            pixels = (pattern + rng.uniform(0, 127, (8, 8))).astype(np.uint8)
            Image.fromarray(pixels).save(root / class_name / f"{index:03d}.png")
    return f"folder:{root}"


def write_data(root: Path) -> Experiment:
    """Writes a source and a target and returns an experiment on them, without methods."""
    return Experiment(
        name="tiny",
        source=SourceConfig(DataConfig(write_folder(root / "source", SOURCE_CLASSES)), TRAIN),
        target=DataConfig(write_folder(root / "target", TARGET_CLASSES)),
        model=ModelConfig("tiny_convnet"),
        train=TRAIN,
        shots=(3,),
        seeds=1,
    )


def build_source(model: str) -> nnx.Module:
    """Builds a network for the source's classes."""
    num_classes = len(SOURCE_CLASSES)
    return models.build(ModelConfig(model), num_classes=num_classes, input_shape=(8, 8, 1), rngs=nnx.Rngs(7))


def write_source(directory: Path, model: str) -> source.Source:
    """Returns a source as a finished run leaves it; random weights and statistics transfer as well as any."""
    if not directory.exists():
        rng = np.random.default_rng(0)
        arrays = {}
        for path, value in partition.arrays_of(build_source(model)).items():
            if not jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
                noise = rng.uniform(0.5, 1.5, value.shape)  # positive, as variances must stay
                arrays[path] = np.asarray(value * noise, value.dtype)
        checkpoint.save_arrays(directory / "checkpoints" / "final", arrays, metadata={"classes": SOURCE_CLASSES})
    return source.load_source(directory)


def with_train(experiment: Experiment, **settings: Any) -> Experiment:
    """Returns the experiment with other settings of `train`."""
    return dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, **settings))


def with_methods(experiment: Experiment, *methods: Method, **settings: Any) -> Experiment:
    """Returns the experiment with these methods and other settings."""
    return dataclasses.replace(experiment, methods=methods, **settings)


def rows_on_disk(directory: Path) -> list[dict[str, Any]]:
    """Returns the rows of `results.jsonl`."""
    return [json.loads(line) for line in (directory / "results.jsonl").read_text().splitlines()]


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a row without what differs between equal runs: its time, and who computed the features they share."""
    features = {name: value for name, value in (row["features"] or {}).items() if name not in ("computed", "reused")}
    return {name: value for name, value in row.items() if name != "seconds"} | {"features": features}


def copy_of(directory: Path, to: Path) -> Path:
    """Returns a copy of a directory."""
    return Path(shutil.copytree(directory, to))
