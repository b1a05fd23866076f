"""The architectures by name: plain NNX modules made of named stages (`jxfer.models.stages`)."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from jxfer import paths
from jxfer.config import ModelConfig
from jxfer.models import cifar_resnet, convnet, resnet
from jxfer.models.stages import Staged, run_stages, stage_of
from jxfer.typing import InputError

__all__ = ["Staged", "build", "names", "run_stages", "stage_of"]

_CONFIGS: dict[str, Any] = {**convnet.CONFIGS, **cifar_resnet.CONFIGS, **resnet.CONFIGS}
_ARCHITECTURES: dict[type, Any] = {
    convnet.ConvNetConfig: convnet.ConvNet,
    cifar_resnet.CifarResNetConfig: cifar_resnet.CifarResNet,
    resnet.ResNetConfig: resnet.ResNet,
}


def names() -> tuple[str, ...]:
    """Returns the names that `build` knows."""
    return tuple(_CONFIGS)


def build(config: ModelConfig, *, num_classes: int, image_shape: tuple[int, int, int], rngs: nnx.Rngs) -> nnx.Module:
    """Builds a model with random weights; float32 parameters, whatever type it computes in.

    Args:
      config: its name and the type it computes in.
      num_classes: outputs of the head.
      image_shape: rows, columns, channels of the images it will see.
      rngs: keys for the weights and for dropout.

    Raises:
      InputError: no such model, or the images are smaller than what it shrinks to a single pixel.
    """
    if config.name not in _CONFIGS:
        raise paths.unknown("model", config.name, names())
    size = _CONFIGS[config.name]
    rows, columns, channels = image_shape
    if min(rows, columns) < size.total_stride:
        least = f"{size.total_stride}×{size.total_stride}"
        fix = "set a larger `image_size` or take a smaller model such as `convnet`"
        raise InputError(f"images of {rows}×{columns} are too small for `{config.name}`, which needs {least}; {fix}")
    dtype = jnp.dtype(config.dtype)
    return _ARCHITECTURES[type(size)](size, in_channels=channels, num_classes=num_classes, dtype=dtype, rngs=rngs)
