"""Names of the residual networks' published weights."""

import functools
from collections.abc import Mapping
from typing import Any

from jxfer.models.resnet import CONFIGS, ResNetConfig
from jxfer.typing import InputError
from jxfer.weights.names.convolutional import COUNTERS, IMAGENET, batch_norm, plain_conv, require
from jxfer.weights.names.parts import labels, linear, nearest
from jxfer.weights.naming import Naming, Rule

# Sizes that timm knows by the same name; what it calls `resnet50d` and the like are other networks.
_TIMM = ("resnet18", "resnet34", "resnet50", "resnet101")
# What transformers means where a `config.json` is silent: a ResNet-50.
_STEM_WIDTH, _OUTPUTS, _NUM_BLOCKS, _BLOCK = 64, (256, 512, 1024, 2048), (3, 4, 6, 3), "bottleneck"


def _torchvision(config: ResNetConfig) -> tuple[Rule, ...]:
    rules = plain_conv("conv1", "stem/conv") + batch_norm("bn1", "stem/bn")
    for k in range(1, _convs(config) + 1):
        rules += plain_conv(f"layer{{n}}.{{i}}.conv{k}", f"layer{{n}}/{{i}}/conv{k}")
        rules += batch_norm(f"layer{{n}}.{{i}}.bn{k}", f"layer{{n}}/{{i}}/bn{k}")
    rules += plain_conv("layer{n}.{i}.downsample.0", "layer{n}/{i}/downsample/conv")
    rules += batch_norm("layer{n}.{i}.downsample.1", "layer{n}/{i}/downsample/bn")
    return (*rules, *linear("fc", "head"))


def _transformers(config: ResNetConfig, *, before: str) -> tuple[Rule, ...]:
    rules = _layer(f"{before}embedder.embedder", "stem/conv", "stem/bn")
    for stage in range(len(config.num_blocks)):
        theirs, ours = f"{before}encoder.stages.{stage}.layers.{{i}}", f"layer{stage + 1}/{{i}}"
        for k in range(_convs(config)):
            rules += _layer(f"{theirs}.layer.{k}", f"{ours}/conv{k + 1}", f"{ours}/bn{k + 1}")
        if stage > 0 or config.expansion > 1:  # the first layer of basic blocks changes no shape
            rules += _layer(f"{theirs}.shortcut", f"{ours}/downsample/conv", f"{ours}/downsample/bn")
    return (*rules, *linear("classifier.1", "head"))


def _layer(theirs: str, our_conv: str, our_norm: str) -> tuple[Rule, ...]:
    return plain_conv(f"{theirs}.convolution", our_conv) + batch_norm(f"{theirs}.normalization", our_norm)


def _convs(config: ResNetConfig) -> int:
    """Returns how many convolutions a block has, not counting the shortcut's."""
    return 3 if config.block == "bottleneck" else 2


def _read_transformers(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    if config.get("model_type") != "resnet":
        return None
    block = config.get("layer_type", _BLOCK)
    outputs = tuple(config.get("hidden_sizes", _OUTPUTS))
    widths = tuple(width // ResNetConfig(_NUM_BLOCKS, block).expansion for width in outputs)
    require(config, hidden_act="relu", downsample_in_first_stage=False, downsample_in_bottleneck=False)
    require({"embedding_size": _STEM_WIDTH, **config}, embedding_size=widths[0])
    return nearest(ResNetConfig(tuple(config.get("depths", _NUM_BLOCKS)), block, widths=widths), CONFIGS)


def _write_transformers(size: ResNetConfig, classes: tuple[str, ...], input_shape: tuple[int, ...]) -> dict[str, Any]:
    _check_stem(size, "transformers")
    return {
        "model_type": "resnet",
        "architectures": ["ResNetForImageClassification"],
        "num_channels": input_shape[-1],
        "embedding_size": size.widths[0],
        "hidden_sizes": [width * size.expansion for width in size.widths],
        "depths": list(size.num_blocks),
        "layer_type": size.block,
        **labels(classes),
    }


def _read_timm(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    name = config.get("architecture")
    return (name, {}) if name in _TIMM else None


def _write_timm(size: ResNetConfig, classes: tuple[str, ...], input_shape: tuple[int, ...]) -> dict[str, Any]:
    _check_stem(size, "timm")
    name = next((name for name in _TIMM if CONFIGS[name] == size), None)
    if name is None:
        raise InputError(f"timm has no name for {size}; export it under torchvision's or transformers' names")
    rows, columns, channels = input_shape
    return {
        "architecture": name,
        "num_classes": len(classes),
        "label_names": list(classes),
        "pretrained_cfg": {"input_size": [channels, rows, columns], "first_conv": "conv1", "classifier": "fc"},
    }


def _check_stem(size: ResNetConfig, publisher: str) -> None:
    if size.small_images:
        raise InputError(f"{publisher} has no ResNet with the stem for small images; export torchvision's names")


def _transformers_naming(name: str, *, before: str) -> Naming:
    """`before` is what transformers puts before all names but the head's; nothing where there is no head."""
    return Naming(
        name,
        rules=functools.partial(_transformers, before=before),
        ignored=(COUNTERS,),
        preprocessing={**IMAGENET, "resample": "bicubic"},
        read_config=_read_transformers,
        write_config=_write_transformers,
    )


NAMINGS = (
    Naming("torchvision", rules=_torchvision, ignored=(COUNTERS,), preprocessing=IMAGENET),
    _transformers_naming("transformers", before="resnet."),
    Naming(
        "timm",
        rules=_torchvision,
        ignored=(COUNTERS,),
        preprocessing={**IMAGENET, "resample": "bicubic"},
        read_config=_read_timm,
        write_config=_write_timm,
    ),
    _transformers_naming("transformers-encoder", before=""),
)
