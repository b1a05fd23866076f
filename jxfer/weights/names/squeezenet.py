"""Names of SqueezeNet's published weights.

No published file has a head for us: the published top is no linear function of the pooled features
(`jxfer.models.squeezenet`), so its tensors are ignored. The names of our own head are our own.
"""

from collections.abc import Iterator

from jxfer.models.squeezenet import SqueezeNetConfig
from jxfer.weights.names.convolutional import IMAGENET
from jxfer.weights.names.parts import conv, linear
from jxfer.weights.naming import Naming, Rule

# Our paths of the fire modules, in order.
_FIRES = tuple(f"layer{layer}/{i}" for layer, count in ((1, 2), (2, 2), (3, 4)) for i in range(count))


def _torchvision(config: SqueezeNetConfig) -> tuple[Rule, ...]:
    rules = conv("features.0", "stem/conv")
    for index, ours in zip((3, 4, 6, 7, 9, 10, 11, 12), _FIRES, strict=True):  # poolings count in between
        rules += conv(f"features.{index}.squeeze", f"{ours}/squeeze")
        rules += conv(f"features.{index}.expand1x1", f"{ours}/expand1")
        rules += conv(f"features.{index}.expand3x3", f"{ours}/expand3")
    return (*rules, *linear("head", "head", optional=True))


def _keras(config: SqueezeNetConfig) -> tuple[Rule, ...]:
    """Names kernels as the Keras 1 session did that wrote the file: numbered in the order in which they were made."""
    stem = (Rule("conv1/uniform1", "stem/conv/kernel"), Rule("conv1/conv1_b", "stem/conv/bias"))
    head = (Rule("head/head_W", "head/kernel", optional=True), Rule("head/head_b", "head/bias", optional=True))
    return (*stem, *_keras_fires(), *head)


def _keras_fires() -> Iterator[Rule]:
    kernel = 1
    for number, ours in enumerate(_FIRES, start=2):
        for theirs, name in (("squeeze1x1", "squeeze"), ("expand1x1", "expand1"), ("expand3x3", "expand3")):
            kernel += 1
            layer = f"fire{number}/{theirs}"
            yield Rule(f"{layer}/uniform{kernel}", f"{ours}/{name}/kernel")
            yield Rule(f"{layer}/{layer}_b", f"{ours}/{name}/bias")


# As Caffe, which the weights come from: 227 pixels of 256, the channels backwards, values of 0 to 255 less the mean.
_CAFFE = {
    "image_size": 227,
    "crop_fraction": 227 / 256,
    "resample": "bilinear",
    "channel_order": "bgr",
    "mean": (103.939 / 255, 116.779 / 255, 123.68 / 255),
    "std": (1 / 255, 1 / 255, 1 / 255),
}

NAMINGS = (
    Naming("torchvision", rules=_torchvision, ignored=("classifier.*",), preprocessing=IMAGENET),
    Naming("keras", rules=_keras, ignored=("conv10/*",), preprocessing=_CAFFE),
)
