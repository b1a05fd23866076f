"""What the namings of convolutional networks share: their layers' rules and how their images are prepared."""

from collections.abc import Mapping
from typing import Any

from jxfer.typing import InputError, Path
from jxfer.weights.naming import CONV, Rule

COUNTERS = "*.num_batches_tracked"
"""Tensors in which PyTorch's batch norms count the batches they have seen."""

IMAGENET: Mapping[str, Any] = {
    "image_size": 224,
    "crop_fraction": 0.875,
    "resample": "bilinear",
    "channel_order": "rgb",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}
"""How torchvision prepares images: the short side to 256 pixels, the middle 224, and the moments of ImageNet."""


def plain_conv(theirs: str, ours: Path) -> tuple[Rule, ...]:
    """Returns the rule of PyTorch's convolution without a bias."""
    return (Rule(f"{theirs}.weight", f"{ours}/kernel", CONV),)


def batch_norm(theirs: str, ours: Path) -> tuple[Rule, ...]:
    """Returns the rules of PyTorch's batch norm: scale, bias and the statistics."""
    names = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    return tuple(Rule(f"{theirs}.{name}", f"{ours}/{leaf}") for name, leaf in names.items())


def require(config: Mapping[str, Any], **values: Any) -> None:
    """Checks fields of a published config in which our networks have no choice; one that is missing is as ours.

    Raises:
      InputError: a field has another value.
    """
    for name, value in values.items():
        if config.get(name, value) != value:
            kind = config.get("model_type")
            raise InputError(f"config.json: `{name}` is {config[name]!r}; a `{kind}` is only built with {value!r}")
