"""Names of MobileNetV2's published weights."""

from collections.abc import Mapping
from typing import Any

from jxfer.models.mobilenet import CONFIGS, NUM_BLOCKS, MobileNetV2Config
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


def _transformers(config: MobileNetV2Config) -> tuple[Rule, ...]:
    stem, base = "mobilenet_v2.conv_stem", "mobilenet_v2"
    rules = _layer(f"{stem}.first_conv", "stem") + _layer(f"{stem}.conv_3x3", f"{_BLOCKS[0]}/depthwise")
    rules += _layer(f"{stem}.reduce_1x1", f"{_BLOCKS[0]}/project")
    for index, ours in enumerate(_BLOCKS[1:]):
        for theirs, part in zip(("expand_1x1", "conv_3x3", "reduce_1x1"), _PARTS, strict=True):
            rules += _layer(f"{base}.layer.{index}.{theirs}", f"{ours}/{part}")
    return (*rules, *_layer(f"{base}.conv_1x1", "top/layer"), *linear("classifier", "head"))


def _layer(theirs: str, ours: str) -> tuple[Rule, ...]:
    return _normed(f"{theirs}.convolution", f"{theirs}.normalization", ours)


def _normed(their_conv: str, their_norm: str, ours: str) -> tuple[Rule, ...]:
    return plain_conv(their_conv, f"{ours}/conv") + batch_norm(their_norm, f"{ours}/bn")


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

NAMINGS = (
    Naming("torchvision", rules=_torchvision, ignored=(COUNTERS,), preprocessing=IMAGENET),
    Naming(
        "transformers",
        rules=_transformers,
        ignored=(COUNTERS,),
        preprocessing=_GOOGLE,
        read_config=_read_config,
        write_config=_write_config,
    ),
)
