"""The architectures by name: plain NNX modules made of named stages (`jxfer.models.stages`)."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jxfer import paths
from jxfer.config import ModelConfig
from jxfer.models import (
    alexnet,
    audio_cnn,
    bert,
    cifar_resnet,
    convnet,
    convnext,
    mobilenet,
    resnet,
    rnn,
    speech_embedding,
    squeezenet,
    vgg,
    vit,
)
from jxfer.models.stages import Staged, run_stages, stage_of
from jxfer.typing import Input, InputError

__all__ = ["Staged", "build", "names", "reads", "run_stages", "size_of", "stage_of"]

AUTO = "auto"
"""The name that stands for the network that the source's weights are of."""

_ARCHITECTURES: dict[type, Any] = {
    alexnet.AlexNetConfig: alexnet.AlexNet,
    audio_cnn.AudioCnnConfig: audio_cnn.AudioCnn,
    bert.BertConfig: bert.Bert,
    cifar_resnet.CifarResNetConfig: cifar_resnet.CifarResNet,
    convnet.ConvNetConfig: convnet.ConvNet,
    convnext.ConvNeXtConfig: convnext.ConvNeXt,
    mobilenet.MobileNetV2Config: mobilenet.MobileNetV2,
    resnet.ResNetConfig: resnet.ResNet,
    rnn.RnnConfig: rnn.Rnn,
    speech_embedding.SpeechEmbeddingConfig: speech_embedding.SpeechEmbedding,
    squeezenet.SqueezeNetConfig: squeezenet.SqueezeNet,
    vgg.VGGConfig: vgg.VGG,
    vit.ViTConfig: vit.ViT,
}
_CONFIGS: dict[str, Any] = {
    **convnet.CONFIGS,
    **cifar_resnet.CONFIGS,
    **resnet.CONFIGS,
    **alexnet.CONFIGS,
    **vgg.CONFIGS,
    **squeezenet.CONFIGS,
    **mobilenet.CONFIGS,
    **vit.CONFIGS,
    **convnext.CONFIGS,
    **bert.CONFIGS,
    **rnn.CONFIGS,
    **audio_cnn.CONFIGS,
    **speech_embedding.CONFIGS,
}


def names() -> tuple[str, ...]:
    """Returns the names that `build` knows."""
    return tuple(_CONFIGS)


def size_of(config: ModelConfig) -> Any:
    """Returns the size that a config names, with its fields changed as the config says.

    Raises:
      InputError: no such model or field, or a value does not fit its field.
    """
    if config.name == AUTO:
        raise InputError(f"model.name is `{AUTO}`, but nothing says which; name one: {', '.join(names())}")
    if config.name not in _CONFIGS:
        raise paths.unknown("model", config.name, names())
    size = _CONFIGS[config.name]
    return dataclasses.replace(size, **_changes(config, size))


def reads(config: ModelConfig) -> Input:
    """Returns what a model reads: `image`, `text` or `audio`."""
    return typing.cast(Input, getattr(_CONFIGS.get(config.name), "reads", "image"))


def build(config: ModelConfig, *, num_classes: int, input_shape: tuple[int, ...], rngs: nnx.Rngs) -> nnx.Module:
    """Builds a model with random weights; float32 parameters, whatever type it computes in.

    Args:
      config: its name and the type it computes in.
      num_classes: outputs of the head.
      input_shape: what one example looks like: rows, columns, channels of an image, tokens of a text, samples of a
        sound.
      rngs: keys for the weights and for dropout.

    Raises:
      InputError: no such model, it reads something else, or the images are smaller than what it shrinks to a pixel.
    """
    size = size_of(config)
    dimensions = {"image": 3, "text": 1, "audio": 1}[reads(config)]
    if len(input_shape) != dimensions:
        raise InputError(f"`{config.name}` reads {reads(config)}, which examples of shape {input_shape} are not")
    least = getattr(size, "total_stride", 1)
    if min(input_shape[:2]) < least:
        rows, columns, *_ = input_shape
        fix = "set a larger `image_size` or take a smaller model such as `convnet`"
        raise InputError(
            f"images of {rows}×{columns} are too small for `{config.name}`, which needs {least}×{least}; {fix}"
        )
    dtype = jnp.dtype(config.dtype)
    return _ARCHITECTURES[type(size)](size, input_shape=input_shape, num_classes=num_classes, dtype=dtype, rngs=rngs)


def _changes(config: ModelConfig, size: Any) -> dict[str, Any]:
    fields = {field.name: getattr(size, field.name) for field in dataclasses.fields(size)}
    for name, _ in config.size:
        if name not in fields:
            raise paths.unknown(f"field of `{config.name}`:", name, fields)
    hints = typing.get_type_hints(type(size))
    return {name: _read(config, name, text, hints[name]) for name, text in config.size}


def _read(config: ModelConfig, name: str, text: str, hint: Any) -> Any:
    """Reads the value of a field from its text."""
    words: Mapping[str, Any] = {"true": True, "false": False, "none": None}
    if text.lower() in words and hint is not str:
        return words[text.lower()]
    if typing.get_origin(hint) is tuple:
        element = typing.get_args(hint)[0]
        return tuple(_read(config, name, part, element) for part in text.strip("()").split(",") if part.strip())
    kinds = [kind for kind in (typing.get_args(hint) or (hint,)) if kind in (int, float)]
    if not kinds:
        return text
    try:
        return kinds[0](text.strip())
    except ValueError:
        raise InputError(f"model.size: `{name}` of `{config.name}` takes {kinds[0].__name__}, not `{text}`") from None
