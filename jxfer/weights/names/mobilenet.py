"""Names of MobileNetV2's published weights."""

import functools
import re
from collections.abc import Mapping
from typing import Any

from jxfer.models.mobilenet import CONFIGS, NUM_BLOCKS, MobileNetV2Config
from jxfer.typing import InputError
from jxfer.weights.names.convolutional import COUNTERS, IMAGENET, batch_norm, plain_conv, require
from jxfer.weights.names.parts import labels, linear, nearest
from jxfer.weights.naming import Naming, Rule

# Our paths of the inverted residuals, in order.
_BLOCKS = tuple(f"layer{layer}/{i}" for layer, count in enumerate(NUM_BLOCKS, start=1) for i in range(count))
_PARTS = ("expand", "depthwise", "project")
# What transformers means where a `config.json` is silent.
_WIDTH, _DROPOUT, _EPSILON, _TF_PADDING = 1.0, 0.8, 1e-3, True


def _torchvision(config: MobileNetV2Config) -> tuple[Rule, ...]:
    rules = _normed("features.0.0", "features.0.1", "stem")
    for index, ours in enumerate(_BLOCKS, start=1):
        theirs = f"features.{index}.conv"
        parts = _PARTS[1:] if index == 1 else _PARTS  # the first block does not expand
        for i, part in enumerate(parts[:-1]):
            rules += _normed(f"{theirs}.{i}.0", f"{theirs}.{i}.1", f"{ours}/{part}")
        last = len(parts) - 1  # the projection has no ReLU, so it is not nested
        rules += _normed(f"{theirs}.{last}", f"{theirs}.{last + 1}", f"{ours}/project")
    return (*rules, *_normed("features.18.0", "features.18.1", "top/layer"), *linear("classifier.1", "head"))


def _timm(config: MobileNetV2Config) -> tuple[Rule, ...]:
    """Names the parts of a block `conv_dw`, `conv_pwl` where it expands first, and else `conv_dw`, `conv_pw`."""
    rules = _normed("conv_stem", "bn1", "stem")
    for ours in _BLOCKS:
        layer, i = ours.removeprefix("layer").split("/")
        theirs = f"blocks.{int(layer) - 1}.{i}"
        names = ("conv_dw", "conv_pw") if ours == _BLOCKS[0] else ("conv_pw", "conv_dw", "conv_pwl")
        for k, (name, part) in enumerate(zip(names, _PARTS[-len(names) :], strict=True), start=1):
            rules += _normed(f"{theirs}.{name}", f"{theirs}.bn{k}", f"{ours}/{part}")
    return (*rules, *_normed("conv_head", "bn2", "top/layer"), *linear("classifier", "head", optional=True))


def _transformers(config: MobileNetV2Config, *, before: str) -> tuple[Rule, ...]:
    stem = f"{before}conv_stem"
    rules = _layer(f"{stem}.first_conv", "stem") + _layer(f"{stem}.conv_3x3", f"{_BLOCKS[0]}/depthwise")
    rules += _layer(f"{stem}.reduce_1x1", f"{_BLOCKS[0]}/project")
    for index, ours in enumerate(_BLOCKS[1:]):
        for theirs, part in zip(("expand_1x1", "conv_3x3", "reduce_1x1"), _PARTS, strict=True):
            rules += _layer(f"{before}layer.{index}.{theirs}", f"{ours}/{part}")
    return (*rules, *_layer(f"{before}conv_1x1", "top/layer"), *linear("classifier", "head"))


def _layer(theirs: str, ours: str) -> tuple[Rule, ...]:
    return _normed(f"{theirs}.convolution", f"{theirs}.normalization", ours)


def _normed(their_conv: str, their_norm: str, ours: str) -> tuple[Rule, ...]:
    return plain_conv(their_conv, f"{ours}/conv") + batch_norm(their_norm, f"{ours}/bn")


def _read_timm(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Only networks that differ in width: those whose names end in `d` are deeper too."""
    found = re.fullmatch(r"mobilenetv2_(\d{3})", config.get("architecture", ""))
    return nearest(MobileNetV2Config(width=int(found[1]) / 100), CONFIGS) if found else None


def _write_timm(size: MobileNetV2Config, classes: tuple[str, ...], input_shape: tuple[int, ...]) -> dict[str, Any]:
    """Raises InputError for networks that timm has no name for."""
    built = MobileNetV2Config(width=size.width, dropout=size.dropout)
    if size != built:
        raise InputError(f"timm has no name for {size}; export it under transformers' names")
    rows, columns, channels = input_shape
    return {
        "architecture": f"mobilenetv2_{round(100 * size.width):03d}",
        "num_classes": len(classes),
        "label_names": list(classes),
        "pretrained_cfg": {
            "input_size": [channels, rows, columns],
            "first_conv": "conv_stem",
            "classifier": "classifier",
        },
    }


def _read_config(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    if config.get("model_type") != "mobilenet_v2":
        return None
    require(config, expand_ratio=6, output_stride=32, depth_divisible_by=8, min_depth=8, hidden_act="relu6")
    require(config, first_layer_is_expansion=True, finegrained_output=True)
    size = MobileNetV2Config(
        width=float(config.get("depth_multiplier", _WIDTH)),
        dropout=float(config.get("classifier_dropout_prob", _DROPOUT)),
        epsilon=float(config.get("layer_norm_eps", _EPSILON)),
        tf_padding=config.get("tf_padding", _TF_PADDING),
    )
    return nearest(size, CONFIGS)


def _write_config(size: MobileNetV2Config, classes: tuple[str, ...], input_shape: tuple[int, ...]) -> dict[str, Any]:
    return {
        "model_type": "mobilenet_v2",
        "architectures": ["MobileNetV2ForImageClassification"],
        "num_channels": input_shape[-1],
        "image_size": input_shape[0],
        "depth_multiplier": size.width,
        "classifier_dropout_prob": size.dropout,
        "layer_norm_eps": size.epsilon,
        "tf_padding": size.tf_padding,
        **labels(classes),
    }


# Google's own networks see pixels between -1 and 1.
_GOOGLE = {**IMAGENET, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def _transformers_naming(name: str, *, before: str) -> Naming:
    """`before` is what transformers puts before all names but the head's; nothing where there is no head."""
    return Naming(
        name,
        rules=functools.partial(_transformers, before=before),
        ignored=(COUNTERS,),
        preprocessing=_GOOGLE,
        read_config=_read_config,
        write_config=_write_config,
    )


NAMINGS = (
    Naming("torchvision", rules=_torchvision, ignored=(COUNTERS,), preprocessing=IMAGENET),
    _transformers_naming("transformers", before="mobilenet_v2."),
    _transformers_naming("transformers-encoder", before=""),
    Naming(
        "timm",
        rules=_timm,
        ignored=(COUNTERS,),
        preprocessing={**IMAGENET, "resample": "bicubic"},
        read_config=_read_timm,
        write_config=_write_timm,
    ),
)
