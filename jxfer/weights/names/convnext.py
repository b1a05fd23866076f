"""The names under which timm, torchvision and transformers publish ConvNeXt."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from jxfer.models.convnext import CONFIGS, ConvNeXtConfig
from jxfer.typing import InputError
from jxfer.weights.names.convolutional import IMAGENET, require
from jxfer.weights.names.parts import conv, labels, linear, nearest, norm
from jxfer.weights.naming import Naming, Rule


@dataclasses.dataclass(frozen=True)
class PerChannel:
    """Theirs has a row and a column of size 1 after the channels, ours only channels."""

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """Maps [C, 1, 1] to [C]."""
        return array.reshape(array.shape[:-2])

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """Maps [C] to [C, 1, 1]."""
        return array.reshape(*array.shape, 1, 1)


def _timm(config: ConvNeXtConfig) -> tuple[Rule, ...]:
    rules = [*conv("stem.0", "stem/conv"), *norm("stem.1", "stem/norm")]
    for stage in range(len(config.num_blocks)):
        rules += _downsample(f"stages.{stage}.downsample", stage)
        theirs, ours = f"stages.{stage}.blocks.{{i}}", f"layer{stage + 1}/{{i}}"
        rules += _block(theirs, ours, ("conv_dw", "norm", "mlp.fc1", "mlp.fc2"))
        rules.append(Rule(f"{theirs}.gamma", f"{ours}/scale/scale"))
    return (*rules, *norm("head.norm", "norm"), *linear("head.fc", "head", optional=True))


def _torchvision(config: ConvNeXtConfig) -> tuple[Rule, ...]:
    rules = [*conv("features.0.0", "stem/conv"), *norm("features.0.1", "stem/norm")]
    for stage in range(len(config.num_blocks)):
        rules += _downsample(f"features.{2 * stage}", stage)
        theirs, ours = f"features.{2 * stage + 1}.{{i}}", f"layer{stage + 1}/{{i}}"
        rules += _block(theirs, ours, ("block.0", "block.2", "block.3", "block.5"))
        rules.append(Rule(f"{theirs}.layer_scale", f"{ours}/scale/scale", PerChannel()))
    return (*rules, *norm("classifier.0", "norm"), *linear("classifier.2", "head", optional=True))


def _transformers(config: ConvNeXtConfig, *, before: str) -> tuple[Rule, ...]:
    embed = f"{before}embeddings"
    rules = [*conv(f"{embed}.patch_embeddings", "stem/conv"), *norm(f"{embed}.layernorm", "stem/norm")]
    for stage in range(len(config.num_blocks)):
        prefix = f"{before}encoder.stages.{stage}"
        rules += _downsample(f"{prefix}.downsampling_layer", stage)
        theirs, ours = f"{prefix}.layers.{{i}}", f"layer{stage + 1}/{{i}}"
        rules += _block(theirs, ours, ("dwconv", "layernorm", "pwconv1", "pwconv2"))
        rules.append(Rule(f"{theirs}.layer_scale_parameter", f"{ours}/scale/scale"))
    return (*rules, *norm(f"{before}layernorm", "norm"), *linear("classifier", "head", optional=True))


def _downsample(theirs: str, stage: int) -> tuple[Rule, ...]:
    """Returns the rules of what comes before a stage: here the beginning of its first block."""
    if stage == 0:
        return ()
    ours = f"layer{stage + 1}/0/downsample"
    return (*norm(f"{theirs}.0", f"{ours}/norm"), *conv(f"{theirs}.1", f"{ours}/conv"))


def _block(theirs: str, ours: str, names: tuple[str, str, str, str]) -> tuple[Rule, ...]:
    depthwise, normalise, up, down = (f"{theirs}.{name}" for name in names)
    mlp = (*linear(up, f"{ours}/mlp/up"), *linear(down, f"{ours}/mlp/down"))
    return (*conv(depthwise, f"{ours}/conv"), *norm(normalise, f"{ours}/norm"), *mlp)


def _read_transformers(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    if config.get("model_type") != "convnext":
        return None
    require(config, hidden_act="gelu", patch_size=4, num_stages=4)
    size = ConvNeXtConfig(
        num_blocks=tuple(config.get("depths", (3, 3, 9, 3))),
        widths=tuple(config.get("hidden_sizes", (96, 192, 384, 768))),
        layer_scale=float(config.get("layer_scale_init_value", 1e-6)),
        drop_path=float(config.get("drop_path_rate", 0.0)),
        head_norm_eps=float(config.get("layer_norm_eps", 1e-12)),
    )
    return nearest(size, CONFIGS)


def _write_transformers(size: ConvNeXtConfig, classes: tuple[str, ...], input_shape: tuple[int, ...]) -> dict[str, Any]:
    return {
        "model_type": "convnext",
        "architectures": ["ConvNextForImageClassification"],
        "num_channels": input_shape[2],
        "patch_size": 4,
        "num_stages": 4,
        "hidden_act": "gelu",
        "image_size": input_shape[0],
        "depths": list(size.num_blocks),
        "hidden_sizes": list(size.widths),
        "layer_scale_init_value": size.layer_scale,
        "drop_path_rate": size.drop_path,
        "layer_norm_eps": size.head_norm_eps,
        **labels(classes),
    }


def _read_timm(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    name = config.get("architecture")
    return (name, {}) if name in CONFIGS else None


def _write_timm(size: ConvNeXtConfig, classes: tuple[str, ...], input_shape: tuple[int, ...]) -> dict[str, Any]:
    """Raises InputError for networks that timm has no name for."""
    built = dataclasses.replace(size, layer_scale=1e-6, drop_path=0.0)  # neither shows in a trained network
    name = next((name for name, named in CONFIGS.items() if named == built), None)
    if name is None:
        raise InputError(f"timm has no name for {size}; export it under transformers' names")
    rows, columns, channels = input_shape
    return {
        "architecture": name,
        "num_classes": len(classes),
        "label_names": list(classes),
        "pretrained_cfg": {"input_size": [channels, rows, columns], "first_conv": "stem.0", "classifier": "head.fc"},
    }


_BICUBIC = {**IMAGENET, "resample": "bicubic"}


def _transformers_naming(name: str, *, before: str) -> Naming:
    return Naming(
        name,
        functools.partial(_transformers, before=before),
        preprocessing=_BICUBIC,
        read_config=_read_transformers,
        write_config=_write_transformers,
    )


NAMINGS = (
    Naming("timm", _timm, preprocessing=_BICUBIC, read_config=_read_timm, write_config=_write_timm),
    Naming("torchvision", _torchvision, preprocessing={**IMAGENET, "crop_fraction": 0.95}),
    _transformers_naming("transformers", before="convnext."),
    _transformers_naming("transformers-encoder", before=""),
)
"""transformers leaves the network's name out where there is no head.

torchvision's ConvNeXts were each evaluated on images of their own size before the crop, of 0.95 to 0.97 of it."""
