"""The source's weights: what comes with them besides weights, and reading them from a run or a published file."""

import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from jxfer import checkpoint, data, models, paths
from jxfer.config import PREPROCESSING, DataConfig, Experiment, ModelConfig, SourceConfig, from_dict, to_dict
from jxfer.data.text import DEFAULT_TOKENIZER
from jxfer.surgery.head import MLPHead
from jxfer.typing import Arrays, Input, InputError
from jxfer.weights.load import load_into, read, weights_of
from jxfer.weights.manifest import Manifest
from jxfer.weights.names import identify, joined, namings_of, resizes_of
from jxfer.weights.naming import Naming
from jxfer.weights.open import VECTORS, Published, open_published

RUN = "run:"


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

    @property
    def fresh(self) -> tuple[str, ...]:
        """Parameters that begin anew because the rules of the loading say so."""
        return self.manifest.paths("re-initialised") if self.manifest else ()


@dataclasses.dataclass(frozen=True)
class Known:
    """What comes with weights: their network, the classes of their head, and how examples were prepared for them."""

    model: ModelConfig
    classes: tuple[str, ...]
    """Empty where there is no head."""
    preprocessing: Mapping[str, Any]
    """Fields of `DataConfig`."""
    channels: int | None = None
    """Of the images that a run saw."""


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """What a finished run left: its model's arrays, and how to build and feed the model."""

    arrays: dict[str, np.ndarray]
    model: ModelConfig
    classes: tuple[str, ...]
    input: Input
    input_shape: tuple[int, ...]
    data: DataConfig
    directory: Path

    def build(self) -> nnx.Module:
        """Builds the model, heads of other shapes than the architecture's own included, and fills it."""
        with_head = {path.removeprefix("head/"): value for path, value in self.arrays.items() if path[:5] == "head/"}
        rngs, classes = nnx.Rngs(0), self.classes
        model = models.build(self.model, num_classes=len(classes), input_shape=self.input_shape, rngs=rngs)
        if "hidden/kernel" in with_head:
            width = with_head["hidden/kernel"].shape[-1]
            MLPHead(width)(model, source_classes=(), target_classes=classes, data=self.data, rngs=rngs)
        load_into(model, self.arrays, what=f"weights of '{self.directory}'")
        return model


def resolve(experiment: Experiment) -> Experiment:
    """Returns the experiment with what comes with its source filled in: the network, and how examples are prepared.

    Raises:
      InputError: the weights cannot be opened, or nothing says of which network they are.
    """
    source = experiment.source
    if source.weights is None:
        given = _shared_words(experiment)
        preprocessing: Mapping[str, Any] = {name: getattr(given, name) for name in PREPROCESSING}
        source = dataclasses.replace(source, data=given)
        model = experiment.model
    else:
        known = known_of(source, experiment.model)
        preprocessing, model = known.preprocessing, known.model
    return dataclasses.replace(experiment, source=source, target=_filled(experiment.target, preprocessing), model=model)


def known_of(source: SourceConfig, model: ModelConfig) -> Known:
    """Returns what comes with the weights that `source` names, before any of them is read."""
    assert source.weights is not None
    if source.weights.startswith(RUN):
        return _known_of_run(run_directory(source.weights), model)
    return _known_of_published(source.weights, source.classes, model)


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
    known = known_of(experiment.source, experiment.model)
    published = _open(weights)
    rules = list(experiment.source.load)
    if not known.classes and not any(paths.match("head/kernel", pattern) for pattern, _ in rules):
        rules.append(("head/**", "reinitialise"))  # whoever transfers from there brings a head

    def build() -> nnx.Module:
        count = len(known.classes) or num_classes
        return models.build(experiment.model, num_classes=count, input_shape=input_shape, rngs=nnx.Rngs(0))

    size = models.size_of(experiment.model)
    abstract = nnx.eval_shape(build)
    arrays, manifest = read(
        joined(size, published.tensors),
        namings_of(size),
        size,
        weights_of(abstract),
        what=weights,
        rules=rules,
        resizes=resizes_of(size),
        grid=getattr(abstract, "grid", None),
    )
    return Source(arrays, known.classes, published.hash, manifest)


def load_source(directory: Path) -> Source:
    """Reads the weights of a finished run.

    Raises:
      InputError: there is no finished run in `directory`.
    """
    arrays, metadata = _final(directory)
    return Source(arrays, tuple(metadata["classes"]), checkpoint.weights_hash(arrays), directory=directory)


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
        arrays,
        from_dict(ModelConfig, metadata["model"]),
        tuple(metadata["classes"]),
        metadata.get("input", "image"),
        tuple(metadata["input_shape"] if "input_shape" in metadata else metadata["image_shape"]),
        _with_own_tokenizer(from_dict(DataConfig, metadata["data"]), directory),
        directory,
    )


def delta(arrays: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """Returns the arrays that differ, in any bit, from the source's of the same path."""

    def same(path: str, value: Any) -> bool:
        old = source.arrays.get(path)
        if old is None or old.shape != value.shape or old.dtype != value.dtype:
            return False
        return np.asarray(old).tobytes() == np.asarray(value).tobytes()

    return {path: value for path, value in arrays.items() if not same(path, value)}


def base_record(experiment: Experiment, source: Source, directory: Path) -> dict[str, Any]:
    """Returns what the run in `directory` must remember of its base to be whole again.

    Args:
      experiment: resolved.
      source: the base.
      directory: of the run; a base that is a run is remembered by its place relative to it.
    """
    weights = experiment.source.weights
    if source.directory is not None:
        weights = RUN + os.path.relpath(source.directory.absolute(), directory.absolute())
    config = dataclasses.replace(experiment.source, weights=weights)
    return {"source": to_dict(config), "hash": source.weights_hash}


def run_directory(weights: str) -> Path:
    """Returns the folder that `run:DIR` names."""
    return Path(weights.removeprefix(RUN)).expanduser()


def _final(directory: Path, *, base: Source | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    final = directory / "checkpoints" / "final"
    if not final.exists():
        raise InputError(f"no finished run in '{directory}': it has no checkpoints/final; run it to its end first")
    arrays, metadata = checkpoint.load_arrays(final)
    if not metadata.get("base"):
        return arrays, metadata
    record = metadata["base"]
    found = base or _find_base(directory, metadata)
    if found.weights_hash != record["hash"]:
        raise InputError(
            f"'{directory}' keeps only what differs from weights of hash {record['hash']}, but its base "
            f"'{record['source']['weights']}' has {found.weights_hash}; give it the base that it was trained from"
        )
    return {path: np.asarray(arrays.get(path, found.arrays.get(path))) for path in metadata["paths"]}, metadata


def _find_base(directory: Path, metadata: Mapping[str, Any]) -> Source:
    source = from_dict(SourceConfig, metadata["base"]["source"])
    if source.weights.startswith(RUN):
        place = run_directory(source.weights)
        return load_source(place if place.is_absolute() else directory / place)
    experiment = Experiment(name="base", source=source, model=from_dict(ModelConfig, metadata["model"]))
    return read_source(experiment, num_classes=len(metadata["classes"]), input_shape=tuple(metadata["input_shape"]))


def _with_own_tokenizer(config: DataConfig, directory: Path) -> DataConfig:
    kept = directory / "tokenizer.json"
    return dataclasses.replace(config, tokenizer=f"file:{kept.absolute()}") if kept.exists() else config


def _filled(config: DataConfig, preprocessing: Mapping[str, Any]) -> DataConfig:
    """Returns the config with what it leaves open taken from `preprocessing`."""
    missing = {name: preprocessing[name] for name in PREPROCESSING if preprocessing.get(name) is not None}
    return dataclasses.replace(
        config, **{name: value for name, value in missing.items() if getattr(config, name) is None}
    )


def _shared_words(experiment: Experiment) -> DataConfig:
    """Returns the source's data config, for a model of texts with the vocabulary that source and target share."""
    given = experiment.source.data
    tokenizer = given.tokenizer or experiment.target.tokenizer or DEFAULT_TOKENIZER
    if models.reads(experiment.model) != "text" or not tokenizer.startswith("words:") or "@" in tokenizer:
        return given
    transfers = any(method.start == "source" for method in experiment.methods)
    counted = dataclasses.replace(given if transfers else experiment.target, tokenizer=tokenizer)
    return dataclasses.replace(given, tokenizer=data.keep_words(counted))


@functools.lru_cache(maxsize=4)
def _open(weights: str) -> Published:
    return open_published(weights)


def _known_of_run(directory: Path, model: ModelConfig) -> Known:
    record = directory / "config.json"
    if not record.exists():
        raise InputError(f"source.weights `{RUN}{directory}`: no run there, '{record}' does not exist")
    try:
        content = json.loads(record.read_text())
        classes = tuple(content["task"]["target_classes"])
        shape = content["task"].get("input_shape") or content["task"]["image_shape"]
        target = content["experiment"]["target"]
        own = from_dict(ModelConfig, content["experiment"]["model"])
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(f"'{record}' is not the record of a jxfer run; give the folder of a finished run") from error
    preprocessing = {name: _tuple(target.get(name)) for name in PREPROCESSING}
    return Known(
        own if model.name == models.AUTO else model, classes, preprocessing, int(shape[-1]) if len(shape) == 3 else None
    )


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _known_of_published(weights: str, classes: tuple[str, ...], model: ModelConfig) -> Known:
    published = _open(weights)
    identified = identify(published.config)
    if model.name == models.AUTO:
        if identified is None:
            raise InputError(
                f"'{weights}' does not say of which network it is; give model.name: {', '.join(models.names())}"
            )
        model = dataclasses.replace(identified, dtype=model.dtype, size=(*identified.size, *model.size))
    if VECTORS in published.tensors:
        rows, columns = published.tensors[VECTORS].shape
        model = dataclasses.replace(
            model, size=(("vocab_size", str(rows)), ("embedding_dim", str(columns)), *model.size)
        )
    size = models.size_of(model)
    published = dataclasses.replace(published, tensors=joined(size, published.tensors))
    namings = namings_of(size)
    if not namings:
        raise InputError(f"no published names are known for `{model.name}`, so '{weights}' cannot fill it")
    naming = max(namings, key=lambda naming: _num_named(published, naming, size))
    count = _num_classes(published, naming, size)
    named = classes or published.classes or tuple(f"class {index}" for index in range(count))
    if count and len(named) != count:
        raise InputError(f"source.classes has {len(named)} names, but the head of '{weights}' has {count} outputs")
    tokenizer = {"tokenizer": weights} if published.tokenizer else {}
    preprocessing = {**naming.preprocessing, **published.preprocessing, **tokenizer}
    return Known(model, named if count else (), preprocessing)


def _num_named(published: Published, naming: Naming, size: Any) -> int:
    """Counts the tensors that a naming's rules are for."""
    rules = naming.rules(size)
    return sum(
        any(rule.ours_of(name.removeprefix(prefix)) for rule in rules for prefix in ("", *naming.prefixes))
        for name in published.tensors
    )


def _num_classes(published: Published, naming: Naming, size: Any) -> int:
    """Returns the outputs of the published head, 0 where there is none."""
    for rule in naming.rules(size):
        theirs = rule.theirs_of("head/kernel")
        for name in [theirs, *(prefix + theirs for prefix in naming.prefixes)] if theirs else ():
            if name in published.tensors:
                shape = published.tensors[name].shape
                return int(rule.layout.to_ours(np.empty(shape, np.bool_)).shape[-1])
    return 0
