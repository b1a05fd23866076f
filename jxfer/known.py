"""What comes with weights besides weights: their network, the classes of their head, how examples were prepared."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jxfer import data, models, paths
from jxfer.config import PREPROCESSING, DataConfig, Experiment, ModelConfig, SourceConfig, from_dict
from jxfer.data.text import DEFAULT_TOKENIZER
from jxfer.typing import InputError
from jxfer.weights.names import OWN, identify, joined, namings_of, own_naming, resizes_of
from jxfer.weights.naming import Naming
from jxfer.weights.open import VECTORS, Published, open_published
from jxfer.weights.resize import InputChannels, PatchKernel

RUN = "run:"


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


def namings_for(size: Any, published: Published) -> tuple[Naming, ...]:
    """Returns the names that published weights may have: the architecture's, or ours where our export says so."""
    if published.config.get(OWN, {}).get("names") == OWN:
        return (own_naming(published.tensors),)
    return namings_of(size)


def run_directory(weights: str) -> Path:
    """Returns the folder that `run:DIR` names."""
    return Path(weights.removeprefix(RUN)).expanduser()


def which_run(directory: Path) -> str:
    """Returns what to do about a folder that is no finished run: an ablation's has runs in it."""
    runs = sorted(path.parents[1] for path in directory.glob("runs/*/checkpoints/final"))
    return f"name one of its runs, such as '{runs[0]}'" if runs else "run it to its end first"


@functools.lru_cache(maxsize=4)
def open_weights(weights: str) -> Published:
    """Opens published weights once per process."""
    return open_published(weights)


def _filled(config: DataConfig, preprocessing: Mapping[str, Any]) -> DataConfig:
    """Returns the config with what it leaves open taken from `preprocessing`.

    Moments of other channels than the config asks for become their mean, as a kernel for one channel is their sum.
    """
    missing = [name for name in PREPROCESSING if getattr(config, name) is None and preprocessing.get(name) is not None]
    filled = dataclasses.replace(config, **{name: preprocessing[name] for name in missing})
    moments = {name: getattr(filled, name) for name in ("mean", "std") if name in missing}
    averages: dict[str, Any] = {
        name: (sum(values) / len(values),)
        for name, values in moments.items()
        if filled.channels is not None and len(values) not in (1, filled.channels)
    }
    return dataclasses.replace(filled, **averages)


def _shared_words(experiment: Experiment) -> DataConfig:
    """Returns the source's data config, for a model of texts with the vocabulary that source and target share."""
    given = experiment.source.data
    tokenizer = given.tokenizer or experiment.target.tokenizer or DEFAULT_TOKENIZER
    if models.reads(experiment.model) != "text" or not tokenizer.startswith("words:") or "@" in tokenizer:
        return given
    transfers = any(method.start == "source" for method in experiment.methods)
    counted = dataclasses.replace(given if transfers else experiment.target, tokenizer=tokenizer)
    return dataclasses.replace(given, tokenizer=data.keep_words(counted))


def _known_of_run(directory: Path, model: ModelConfig) -> Known:
    record = directory / "config.json"
    if not record.exists():
        raise InputError(
            f"source.weights `{RUN}{directory}`: no run there, '{record}' does not exist; {which_run(directory)}"
        )
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
    published = open_weights(weights)
    identified = identify(published.config)
    if model.name == models.AUTO:
        if identified is None:
            near = paths.nearest(published.files[0].stem, models.names())
            raise InputError(
                f"'{weights}' does not say of which network it is; give model.name: {near} or another of `jxfer list "
                "models`"
            )
        model = dataclasses.replace(identified, dtype=model.dtype, size=(*identified.size, *model.size))
    if VECTORS in published.tensors:
        rows, columns = published.tensors[VECTORS].shape
        model = dataclasses.replace(
            model, size=(("vocab_size", str(rows)), ("embedding_dim", str(columns)), *model.size)
        )
    size = models.size_of(model)
    published = dataclasses.replace(published, tensors=joined(size, published.tensors))
    namings = namings_for(size, published)
    if not namings:
        raise InputError(f"no published names are known for `{model.name}`, so '{weights}' cannot fill it")
    naming = max(namings, key=lambda naming: _num_named(published, naming, size))
    count = _num_classes(published, naming, size)
    named = classes or published.classes or tuple(f"class {index}" for index in range(count))
    if count and len(named) != count:
        raise InputError(f"source.classes has {len(named)} names, but the head of '{weights}' has {count} outputs")
    tokenizer = {"tokenizer": weights} if published.tokenizer else {}
    channels = {"channels": _num_channels(published, naming, size)}
    preprocessing = {**channels, **naming.preprocessing, **published.preprocessing, **tokenizer}
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
    shape = _shape_of("head/kernel", published, naming, size)
    return shape[-1] if shape else 0


def _num_channels(published: Published, naming: Naming, size: Any) -> int | None:
    """Returns the channels of the images that the published network saw; None where it saw others than grey or RGB."""
    for path, resize in resizes_of(size):
        if isinstance(resize, InputChannels | PatchKernel) and (shape := _shape_of(path, published, naming, size)):
            return shape[2] if shape[2] in (1, 3) else None
    return None


def _shape_of(path: str, published: Published, naming: Naming, size: Any) -> tuple[int, ...] | None:
    """Returns a published parameter's shape in our layout, None where it is not published."""
    for rule in naming.rules(size):
        theirs = rule.theirs_of(path)
        for name in [theirs, *(prefix + theirs for prefix in naming.prefixes)] if theirs else ():
            if name in published.tensors:
                return rule.layout.to_ours(np.empty(published.tensors[name].shape, np.bool_)).shape
    return None
