"""Names of the published weights of residual networks for CIFAR-10 (github.com/akamaster/pytorch_resnet_cifar10)."""

from jxfer.models.cifar_resnet import CifarResNetConfig
from jxfer.weights.names.convolutional import COUNTERS, batch_norm, plain_conv
from jxfer.weights.names.parts import linear
from jxfer.weights.naming import Naming, Rule


def _rules(config: CifarResNetConfig) -> tuple[Rule, ...]:
    rules = plain_conv("conv1", "stem/conv") + batch_norm("bn1", "stem/bn")
    for k in (1, 2):
        rules += plain_conv(f"layer{{n}}.{{i}}.conv{k}", f"layer{{n}}/{{i}}/conv{k}")
        rules += batch_norm(f"layer{{n}}.{{i}}.bn{k}", f"layer{{n}}/{{i}}/bn{k}")
    return (*rules, *linear("linear", "head"))


# They were trained with the moments of ImageNet, not of CIFAR-10.
_PREPROCESSING = {
    "image_size": 32,
    "crop_fraction": 1.0,
    "channel_order": "rgb",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}

NAMINGS = (Naming("akamaster", rules=_rules, ignored=(COUNTERS,), prefixes=("module.",), preprocessing=_PREPROCESSING),)
