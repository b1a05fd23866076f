"""Names of the VGG networks' published weights."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jxfer.models.vgg import CONFIGS, POOLED_SIDE, VGGConfig
from jxfer.typing import InputError
from jxfer.weights.names.convolutional import COUNTERS, IMAGENET, batch_norm
from jxfer.weights.names.parts import conv, linear
from jxfer.weights.naming import FlatLinear, Naming, Rule
from jxfer.weights.resize import InputChannels


@dataclasses.dataclass(frozen=True)
class WholeImageConv:
    """Theirs is a convolution whose kernel covers the whole image, ours a linear layer on rows, columns, channels."""

    side: int
    """Rows and columns of the kernel."""

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """Maps [out, C, H, W] to [H·W·C, out]."""
        return array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0])

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """Maps [H·W·C, out] to [out, C, H, W]."""
        return array.reshape(self.side, self.side, -1, array.shape[1]).transpose(3, 2, 0, 1)


def _torchvision(config: VGGConfig) -> tuple[Rule, ...]:
    flat = Rule("classifier.0.weight", "hidden1/linear/kernel", FlatLinear(POOLED_SIDE, POOLED_SIDE))
    hidden = (flat, Rule("classifier.0.bias", "hidden1/linear/bias"), *linear("classifier.3", "hidden2/linear"))
    return (*_layers(config), *hidden, *linear("classifier.6", "head"))


def _timm(config: VGGConfig) -> tuple[Rule, ...]:
    """Names the hidden layers that timm runs as convolutions, which on larger images than it was trained on differ."""
    hidden: tuple[Rule, ...] = ()
    for k, side in ((1, POOLED_SIDE), (2, 1)):
        theirs, ours = f"pre_logits.fc{k}", f"hidden{k}/linear"
        kernel = Rule(f"{theirs}.weight", f"{ours}/kernel", WholeImageConv(side))
        hidden += (kernel, Rule(f"{theirs}.bias", f"{ours}/bias"))
    return (*_layers(config), *hidden, *linear("head.fc", "head", optional=True))


def _layers(config: VGGConfig) -> tuple[Rule, ...]:
    rules: tuple[Rule, ...] = ()
    index = 0  # theirs number all convolutions, norms, ReLUs and poolings in one row
    for layer, count in enumerate(config.num_convs, start=1):
        for i in range(count):
            rules += conv(f"features.{index}", f"layer{layer}/{i}/conv")
            if config.batch_norm:
                rules += batch_norm(f"features.{index + 1}", f"layer{layer}/{i}/bn")
            index += 3 if config.batch_norm else 2
        index += 1
    return rules


RESIZES = (("layer1/0/conv/kernel", InputChannels()),)
"""The first kernel can be changed to other channels."""


def _read_timm(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    name = config.get("architecture")
    return (name, {}) if name in CONFIGS else None


def _write_timm(size: VGGConfig, classes: tuple[str, ...], input_shape: tuple[int, ...]) -> dict[str, Any]:
    """Raises InputError for networks that timm has no name for."""
    built = dataclasses.replace(size, dropout=0.5)  # does not show in the weights
    name = next((name for name, named in CONFIGS.items() if named == built), None)
    if name is None:
        raise InputError(f"timm has no name for {size}; export it under torchvision's names")
    rows, columns, channels = input_shape
    return {
        "architecture": name,
        "num_classes": len(classes),
        "label_names": list(classes),
        "pretrained_cfg": {
            "input_size": [channels, rows, columns],
            "first_conv": "features.0",
            "classifier": "head.fc",
        },
    }


NAMINGS = (
    Naming("torchvision", rules=_torchvision, ignored=(COUNTERS,), preprocessing=IMAGENET),
    Naming(
        "timm",
        rules=_timm,
        ignored=(COUNTERS,),
        preprocessing=IMAGENET,
        read_config=_read_timm,
        write_config=_write_timm,
    ),
)
