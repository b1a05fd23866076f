"""Names of the VGG networks' published weights."""

from jxfer.models.vgg import POOLED_SIDE, VGGConfig
from jxfer.weights.names.convolutional import COUNTERS, IMAGENET, batch_norm
from jxfer.weights.names.parts import conv, linear
from jxfer.weights.naming import FlatLinear, Naming, Rule
from jxfer.weights.resize import InputChannels


def _rules(config: VGGConfig) -> tuple[Rule, ...]:
    flat = Rule("classifier.0.weight", "hidden1/linear/kernel", FlatLinear(POOLED_SIDE, POOLED_SIDE))
    hidden = (flat, Rule("classifier.0.bias", "hidden1/linear/bias"), *linear("classifier.3", "hidden2/linear"))
    return (*_layers(config), *hidden, *linear("classifier.6", "head"))


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

NAMINGS = (Naming("torchvision", rules=_rules, ignored=(COUNTERS,), preprocessing=IMAGENET),)
