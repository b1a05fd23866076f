"""The source's weights, read from a run or from published files, and finished runs read back whole."""

import dataclasses
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from jxfer import checkpoint, models, paths
from jxfer.config import DataConfig, Experiment, FrozenDType, ModelConfig, SourceConfig, from_dict, to_dict
from jxfer.known import RUN, known_of, namings_for, open_weights, run_directory, which_run
from jxfer.rounding import rounded
from jxfer.surgery.head import MLPHead, linear_head
from jxfer.surgery.lora import merged
from jxfer.surgery.neighbours import NeighbourVotes
from jxfer.surgery.taps import TapHead
from jxfer.typing import Arrays, Input, InputError, Surgery
from jxfer.weights.convert import convert
from jxfer.weights.load import load_into, read, weights_of
from jxfer.weights.manifest import Manifest
from jxfer.weights.names import joined, resizes_of


@dataclasses.dataclass(frozen=True)
class Source:
    """A trained source model: its arrays by path, its classes, and the hash of its weights."""

    arrays: Arrays
    """Without those of the head where the weights come without one."""
    classes: tuple[str, ...]
    weights_hash: str
    manifest: Manifest | None = None
    """Of published weights: what became of every leaf and tensor."""
    directory: Path | None = None
    """Of the run that they are of; None for published weights."""
    data: DataConfig | None = None
    """What that run was trained on."""

    @property
    def fresh(self) -> tuple[str, ...]:
        """Parameters that begin anew because the rules of the loading say so."""
        return self.manifest.paths("re-initialised") if self.manifest else ()


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """What a finished run left: its model's arrays, adapters merged, and how to build and feed the model."""

    arrays: dict[str, np.ndarray]
    model: ModelConfig
    classes: tuple[str, ...]
    input: Input
    input_shape: tuple[int, ...]
    data: DataConfig
    directory: Path

    @functools.cached_property
    def weights(self) -> dict[str, np.ndarray]:
        """The arrays that weights files hold: all but the counters of dropout's random keys."""
        return {path: self.arrays[path] for path in weights_of(nnx.eval_shape(self._blank))}

    def build(self) -> nnx.Module:
        """Builds the model and fills it."""
        model = self._blank()
        load_into(model, self.arrays, what=f"weights of '{self.directory}'")
        return model

    def build_like(
        self, config: ModelConfig, *, num_classes: int, input_shape: tuple[int, ...], rngs: nnx.Rngs
    ) -> nnx.Module:
        """Builds a model with random weights as `models.build` does, with a head of the run's kind."""
        model = models.build(config, num_classes=num_classes, input_shape=input_shape, rngs=rngs)
        if (surgery := self._surgery(model, input_shape)) is not None:
            classes = ("",) * num_classes
            surgery(model, source_classes=(), target_classes=classes, data=self.data, rngs=rngs)
        return model

    def _surgery(self, model: nnx.Module, input_shape: tuple[int, ...]) -> Surgery | None:
        """Returns what made the run's head of the architecture's own, by the shapes it left."""
        head = {path.removeprefix("head/"): value for path, value in self.arrays.items() if path.startswith("head/")}
        if "hidden/kernel" in head:
            return MLPHead(head["hidden/kernel"].shape[-1])
        if "bank" in head:
            return NeighbourVotes(most=len(head["ranks"]), num_train=len(head["bank"]))
        if "kernel" in head and head["kernel"].shape[0] != linear_head(model).in_features:
            return TapHead(input_shape, self.input)
        return None

    def _blank(self) -> nnx.Module:
        count = len(self.classes)
        return self.build_like(self.model, num_classes=count, input_shape=self.input_shape, rngs=nnx.Rngs(0))


def read_source(experiment: Experiment, *, num_classes: int, input_shape: tuple[int, ...]) -> Source:
    """Reads the weights that a resolved experiment names.

    Args:
      experiment: with `source.weights`.
      num_classes: of the target, for a head where the weights have none.
      input_shape: of the target's examples, to which weights may be resized.

    Raises:
      InputError: they are not there, or do not fit the model in a way that no rule of `source.load` allows.
    """
    weights = experiment.source.weights
    assert weights is not None
    if weights.startswith(RUN):
        return load_source(run_directory(weights))
    arrays, manifest = read(**_fit(experiment, num_classes, input_shape))
    return Source(arrays, known_of(experiment.source, experiment.model).classes, open_weights(weights).hash, manifest)


def check_source(experiment: Experiment, *, num_classes: int, input_shape: tuple[int, ...]) -> None:
    """Checks that the published weights of a resolved experiment fit its model, without reading their values.

    Raises:
      InputError: as `read_source`.
    """
    if not (experiment.source.weights or RUN).startswith(RUN):
        convert(**_fit(experiment, num_classes, input_shape))


def load_source(directory: Path) -> Source:
    """Reads the weights of a finished run.

    Raises:
      InputError: there is no finished run in `directory`.
    """
    arrays, metadata = _final(directory)
    trained_on = from_dict(DataConfig, metadata["data"]) if "data" in metadata else None
    weights_hash = checkpoint.weights_hash(arrays)  # of what the files hold, adapters apart
    return Source(merged(arrays), tuple(metadata["classes"]), weights_hash, directory=directory, data=trained_on)


def load_run(directory: Path, *, base: Source | None = None) -> FinishedRun:
    """Reads a finished run whole, its base too where it kept only what differs from that.

    Args:
      directory: of the run.
      base: the weights that a delta lies on; None finds them where they were.

    Raises:
      InputError: there is no finished run, or its base is not the one that it was trained from.
    """
    arrays, metadata = _final(directory, base=base)
    if "model" not in metadata:
        raise InputError(f"'{directory}' does not say of which model its weights are; run it again with this version")
    return FinishedRun(
        merged(arrays),
        from_dict(ModelConfig, metadata["model"]),
        tuple(metadata["classes"]),
        metadata.get("input", "image"),
        tuple(metadata["input_shape"] if "input_shape" in metadata else metadata["image_shape"]),
        _with_own_tokenizer(from_dict(DataConfig, metadata["data"]), directory),
        directory,
    )


def delta(
    arrays: Mapping[str, Any], source: Source, dtype: FrozenDType = "float32"
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Returns the arrays that are neither the source's of the same path, in every bit, nor these rounded to `dtype`.

    And the paths of those that are the latter. Where there is none, as of a source that is used as it is, the smallest
    array stands for them: a checkpoint of nothing cannot be written.
    """

    def same(value: Any, old: Any) -> bool:
        if old is None or old.shape != value.shape or old.dtype != value.dtype:
            return False
        return np.asarray(old).tobytes() == np.asarray(value).tobytes()

    differing = {path: value for path, value in arrays.items() if not same(value, source.arrays.get(path))}
    known = {path: source.arrays[path] for path in differing if path in source.arrays}
    rounds = tuple(path for path, old in known.items() if same(differing[path], rounded(path, old, dtype)))
    kept = {path: value for path, value in differing.items() if path not in rounds}
    smallest = min(arrays, key=lambda path: arrays[path].size)
    return kept or {smallest: arrays[smallest]}, rounds


def base_record(
    experiment: Experiment, source: Source, directory: Path, *, rounds: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Returns what the run in `directory` must remember of its base to be whole again.

    Args:
      experiment: resolved.
      source: the base.
      directory: of the run; a base that is a run is remembered by its place relative to it, a file by its whole path.
      rounds: paths of the parameters that are the base's, rounded to the run's `frozen_dtype`.
    """
    weights = experiment.source.weights
    if source.directory is not None:
        weights = RUN + os.path.relpath(source.directory.absolute(), directory.absolute())
    elif str(weights).startswith("file:"):
        weights = f"file:{Path(str(weights).removeprefix('file:')).expanduser().absolute()}"
    config = dataclasses.replace(experiment.source, weights=weights)
    record = {"source": to_dict(config), "hash": source.weights_hash}
    return record | ({"rounded": dict.fromkeys(rounds, experiment.train.frozen_dtype)} if rounds else {})


def _fit(experiment: Experiment, num_classes: int, input_shape: tuple[int, ...]) -> dict[str, Any]:
    """Returns what `convert` and `read` take to fit published weights to the model of a resolved experiment."""
    weights = str(experiment.source.weights)
    known = known_of(experiment.source, experiment.model)
    published = open_weights(weights)
    rules = list(experiment.source.load)
    if not known.classes and not any(paths.match("head/kernel", pattern) for pattern, _ in rules):
        rules.append(("head/**", "reinitialise"))  # whoever transfers from there brings a head

    def build() -> nnx.Module:
        count = len(known.classes) or num_classes
        return models.build(experiment.model, num_classes=count, input_shape=input_shape, rngs=nnx.Rngs(0))

    size = models.size_of(experiment.model)
    abstract = nnx.eval_shape(build)
    return {
        "tensors": joined(size, published.tensors),
        "namings": namings_for(size, published),
        "size": size,
        "expected": weights_of(abstract),
        "what": weights,
        "rules": rules,
        "resizes": resizes_of(size),
        "grid": getattr(abstract, "grid", None),
    }


def _final(directory: Path, *, base: Source | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    final = directory / "checkpoints" / "final"
    if not final.exists():
        raise InputError(f"no finished run in '{directory}': it has no checkpoints/final; {which_run(directory)}")
    arrays, metadata = checkpoint.load_arrays(final)
    if not metadata.get("base"):
        return arrays, metadata
    found = base or _find_base(directory, metadata)
    _check_base(directory, metadata["base"], found.weights_hash)
    rounds = metadata["base"].get("rounded", {})

    def whole(path: str) -> np.ndarray:
        if path in arrays or path not in rounds:
            return np.asarray(arrays.get(path, found.arrays.get(path)))
        return rounded(path, np.asarray(found.arrays[path]), rounds[path])

    return {path: whole(path) for path in metadata["paths"]}, metadata


def _find_base(directory: Path, metadata: Mapping[str, Any]) -> Source:
    """Reads the base of a delta from where it was; of published weights the hash comes first, as others may not fit."""
    source = from_dict(SourceConfig, metadata["base"]["source"])
    try:
        if source.weights.startswith(RUN):
            place = run_directory(source.weights)
            return load_source(place if place.is_absolute() else directory / place)
        digest = open_weights(source.weights).hash
    except InputError as error:
        raise InputError(f"'{directory}' keeps only what differs from its base, which is not there: {error}") from error
    _check_base(directory, metadata["base"], digest)
    experiment = Experiment(name="base", source=source, model=from_dict(ModelConfig, metadata["model"]))
    return read_source(experiment, num_classes=len(metadata["classes"]), input_shape=tuple(metadata["input_shape"]))


def _check_base(directory: Path, record: Mapping[str, Any], digest: str) -> None:
    if digest != record["hash"]:
        raise InputError(
            f"'{directory}' keeps only what differs from weights of hash {record['hash']}, but its base "
            f"'{record['source']['weights']}' has {digest}; give it the base that it was trained from"
        )


def _with_own_tokenizer(config: DataConfig, directory: Path) -> DataConfig:
    kept = directory / "tokenizer.json"
    return dataclasses.replace(config, tokenizer=f"file:{kept.absolute()}") if kept.exists() else config
