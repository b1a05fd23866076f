"""Names of AlexNet's published weights."""

from jxfer.models.alexnet import POOLED_SIDE, AlexNetConfig
from jxfer.weights.names.convolutional import IMAGENET
from jxfer.weights.names.parts import conv, linear
from jxfer.weights.naming import FlatLinear, Naming, Rule
from jxfer.weights.resize import InputChannels


def _rules(config: AlexNetConfig) -> tuple[Rule, ...]:
    indices = (0, 3, 6, 8, 10)  # ReLUs and poolings count in between
    convs = [conv(f"features.{index}", f"conv{i}/conv") for i, index in enumerate(indices, start=1)]
    flat = Rule("classifier.1.weight", "hidden1/linear/kernel", FlatLinear(POOLED_SIDE, POOLED_SIDE))
    hidden = (flat, Rule("classifier.1.bias", "hidden1/linear/bias"), *linear("classifier.4", "hidden2/linear"))
    return (*sum(convs, ()), *hidden, *linear("classifier.6", "head"))


RESIZES = (("conv1/conv/kernel", InputChannels()),)
"""The first kernel can be changed to other channels."""

NAMINGS = (Naming("torchvision", rules=_rules, preprocessing=IMAGENET),)
