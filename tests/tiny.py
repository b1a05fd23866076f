"""Every model kind, shrunk until a training step compiles in about a second, with a task and images to go with it."""

import numpy as np
from flax import nnx

from jxfer import models
from jxfer.config import ModelConfig
from jxfer.data import ArraySplit
from jxfer.models.cifar_resnet import CifarResNetConfig
from jxfer.models.convnet import ConvNetConfig
from jxfer.models.resnet import ResNetConfig
from jxfer.task import Task

CONFIGS = {
    "convnet": ConvNetConfig(widths=(4, 6, 8)),
    "convnet_dropout": ConvNetConfig(widths=(4, 6, 8), dropout=0.2),
    "resnet20": CifarResNetConfig(num_blocks=1, widths=(4, 6, 8)),
    "resnet18_32": ResNetConfig((1, 1, 1, 1), small_images=True, widths=(4, 4, 6, 8)),
}
"""To be put in place of the published sizes: `monkeypatch.setattr(models, "_CONFIGS", tiny.CONFIGS)`."""

LAST_STAGE = {"convnet": "layer2", "convnet_dropout": "layer2", "resnet20": "layer3", "resnet18_32": "layer4"}

IMAGE_SHAPE = (8, 8, 1)
TASK = Task(tuple("abcdef"), tuple("dba"), IMAGE_SHAPE)


def build(name: str, *, num_classes: int = 3, seed: int = 0) -> nnx.Module:
    """Builds the tiny model of a kind; needs the patch above."""
    return models.build(ModelConfig(name), num_classes=num_classes, input_shape=IMAGE_SHAPE, rngs=nnx.Rngs(seed))


def make_split(num_examples: int = 13, *, num_classes: int = 3, seed: int = 0) -> ArraySplit:
    """Returns images [N 8 8 1] uint8 that are brighter for higher labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, num_examples).astype(np.int32)
    image = rng.integers(0, 128, (num_examples, *IMAGE_SHAPE)) + 40 * labels[:, None, None, None]
    ids = np.array([f"train/{index:05d}" for index in range(num_examples)])
    return ArraySplit(ids, labels, {"image": image.astype(np.uint8)})
