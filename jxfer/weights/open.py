"""What is published at an origin: tensors that are not read yet, and what comes with them."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jxfer.config import PREPROCESSING
from jxfer.data.text import read_vectors
from jxfer.origins import fetch, weights_files
from jxfer.typing import InputError
from jxfer.weights.files import open_tensors
from jxfer.weights.tensors import Tensor, in_memory

CHUNK_BYTES = 2**22

VECTORS = "vectors"
"""The one tensor of a file of word vectors."""

VECTOR_SUFFIXES = (".txt", ".vec")

_RESAMPLE = {2: "bilinear", 3: "bicubic", "bilinear": "bilinear", "bicubic": "bicubic"}
"""Pillow's numbers and timm's words."""


@dataclasses.dataclass(frozen=True)
class Published:
    """Weights and what came with them."""

    origin: str
    files: tuple[Path, ...]
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    """The parsed `config.json`; empty where there is none."""
    classes: tuple[str, ...]
    """Names of the head's outputs; empty where nothing says."""
    preprocessing: Mapping[str, Any]
    """Fields of `DataConfig` that the files say."""
    tokenizer: Path | None

    @functools.cached_property
    def hash(self) -> str:
        """16 hex digits of the SHA-256 of the weights files' bytes, which are read for it."""
        digest = hashlib.sha256()
        for file in self.files:
            with open(file, "rb") as stream:
                while chunk := stream.read(CHUNK_BYTES):
                    digest.update(chunk)
        return digest.hexdigest()[:16]


def open_published(origin: str) -> Published:
    """Opens weights without reading their values.

    Raises:
      InputError: the origin cannot be reached, or a file is missing or damaged.
    """
    files = weights_files(origin)
    if files[0].suffix in VECTOR_SUFFIXES:
        return _open_vectors(origin, files[0])
    tensors = open_tensors(files)
    config = _read_json(origin, "config.json")
    processor = _read_json(origin, "preprocessor_config.json")
    return Published(
        origin,
        tuple(files),
        tensors,
        config,
        _classes(config),
        _of_timm(config) | _of_processor(processor) | _of_our_export(config),
        fetch(origin, "tokenizer.json"),
    )


def _open_vectors(origin: str, file: Path) -> Published:
    """Opens a text file of word vectors: one table of embeddings, with a vocabulary instead of a tokeniser."""
    _, vectors = read_vectors(file)
    tensors = in_memory({VECTORS: vectors}, what=str(file))
    return Published(origin, (file,), tensors, {}, (), {"tokenizer": f"vectors:{file}"}, None)


def _read_json(origin: str, name: str) -> dict[str, Any]:
    file = fetch(origin, name)
    if file is None:
        return {}
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"'{file}' is not the JSON of a model; fetch '{origin}' again") from error


def _classes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the names of transformers' `id2label` or timm's `label_names`, in the order of the outputs."""
    if config.get("label_names"):
        return tuple(map(str, config["label_names"]))
    labels = config.get("id2label") or {}
    if any(name == f"LABEL_{index}" for index, name in labels.items()):
        return ()  # what transformers writes where nobody named them
    return tuple(str(labels[index]) for index in sorted(labels, key=int))


def _of_timm(config: Mapping[str, Any]) -> dict[str, Any]:
    pretrained = config.get("pretrained_cfg") or {}
    size = pretrained.get("input_size")
    found = {
        "mean": _floats(pretrained.get("mean")),
        "std": _floats(pretrained.get("std")),
        "image_size": int(size[-1]) if size else None,
        "crop_fraction": _share(pretrained.get("crop_pct")),
        "resample": _RESAMPLE.get(pretrained.get("interpolation")),
    }
    return {name: value for name, value in found.items() if value is not None}


def _of_processor(processor: Mapping[str, Any]) -> dict[str, Any]:
    """Reads what transformers' image processors write: sizes are a number, a shortest edge, or height and width."""
    resized, cropped = (_side(processor.get(name)) for name in ("size", "crop_size"))
    crops = processor.get("do_center_crop") and cropped is not None
    side = cropped if crops else resized
    share = processor.get("crop_pct")
    if crops and cropped and resized and resized >= cropped:
        share = cropped / resized
    found = {
        "mean": _floats(processor.get("image_mean")),
        "std": _floats(processor.get("image_std")),
        "image_size": side if processor.get("do_resize", True) else None,
        "crop_fraction": _share(share),
        "resample": _RESAMPLE.get(processor.get("resample")),
        "channel_order": processor.get("channel_order"),
    }
    return {name: value for name, value in found.items() if value is not None}


def _of_our_export(config: Mapping[str, Any]) -> dict[str, Any]:
    """Reads what `jxfer export` writes beside the words of others, which have none for sounds and texts."""
    ours = config.get("jxfer")
    said = ours.get("data") if isinstance(ours, Mapping) else None
    found = {name: said.get(name) for name in PREPROCESSING} if isinstance(said, Mapping) else {}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in found.items() if v is not None}


def _side(size: Any) -> int | None:
    if isinstance(size, Mapping):
        size = size.get("shortest_edge", size.get("height"))
    return int(size) if isinstance(size, (int, float)) else None


def _floats(values: Any) -> tuple[float, ...] | None:
    return tuple(map(float, values)) if isinstance(values, Sequence) and values else None


def _share(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and 0 < value <= 1 else None
