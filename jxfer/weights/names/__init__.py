"""Under which names each architecture's weights are published, and which architecture a published config is of."""

from collections.abc import Iterable, Mapping
from typing import Any

from jxfer.config import ModelConfig, from_dict
from jxfer.models.alexnet import AlexNetConfig
from jxfer.models.bert import BertConfig
from jxfer.models.cifar_resnet import CifarResNetConfig
from jxfer.models.convnext import ConvNeXtConfig
from jxfer.models.mobilenet import MobileNetV2Config
from jxfer.models.resnet import ResNetConfig
from jxfer.models.rnn import RnnConfig
from jxfer.models.speech_embedding import SpeechEmbeddingConfig
from jxfer.models.squeezenet import SqueezeNetConfig
from jxfer.models.vgg import VGGConfig
from jxfer.models.vit import ViTConfig
from jxfer.weights.convert import Resizes
from jxfer.weights.names import (
    alexnet,
    bert,
    cifar_resnet,
    convnext,
    mobilenet,
    resnet,
    rnn,
    speech_embedding,
    squeezenet,
    vgg,
    vit,
)
from jxfer.weights.naming import Naming, Rule
from jxfer.weights.resize import InputChannels
from jxfer.weights.tensors import Tensor

OWN = "jxfer"
"""The naming of our own paths, with dots, and the part of a `config.json` that says what only we know."""

_MODULES: dict[type, Any] = {
    AlexNetConfig: alexnet,
    BertConfig: bert,
    CifarResNetConfig: cifar_resnet,
    ConvNeXtConfig: convnext,
    MobileNetV2Config: mobilenet,
    ResNetConfig: resnet,
    RnnConfig: rnn,
    SpeechEmbeddingConfig: speech_embedding,
    SqueezeNetConfig: squeezenet,
    VGGConfig: vgg,
    ViTConfig: vit,
}

_FIRST_CONVOLUTION = (("stem/conv/kernel", InputChannels()), ("stem/kernel", InputChannels()))
"""What of an architecture without rules of its own can be resized: its first kernel, to other channels."""


def namings_of(size: Any) -> tuple[Naming, ...]:
    """Returns the ways in which an architecture is published; none for one of our own."""
    module = _MODULES.get(type(size))
    return module.NAMINGS if module else ()


def own_naming(names: Iterable[str]) -> Naming:
    """Returns the naming of our own paths for tensors of these names, which have dots for the paths' slashes."""
    rules = tuple(Rule(name, name.replace(".", "/")) for name in names)
    return Naming(OWN, lambda size: rules)


def resizes_of(size: Any) -> Resizes:
    """Returns which leaves of an architecture can be resized, and how."""
    return getattr(_MODULES.get(type(size)), "RESIZES", _FIRST_CONVOLUTION)


def joined(size: Any, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Returns a file's tensors with those made one that are one parameter here, as a distilled DeiT's two heads are."""
    join = getattr(_MODULES.get(type(size)), "join_heads", None)
    return join(tensors) if join else tensors


def identify(config: Mapping[str, Any]) -> ModelConfig | None:
    """Returns the model that a published `config.json` describes, None where it is none that is known.

    Raises:
      InputError: it is of a known family, with a part that is not built.
    """
    if isinstance(ours := config.get(OWN), Mapping) and "model" in ours:
        return from_dict(ModelConfig, ours["model"])
    for module in _MODULES.values():
        for naming in module.NAMINGS:
            if found := naming.read_config(config):
                name, fields = found
                return ModelConfig(name, size=tuple((field, spell(value)) for field, value in fields.items()))
    return None


def spell(value: Any) -> str:
    """Returns the value of a size's field as `ModelConfig.size` has it."""
    if isinstance(value, (tuple, list)):
        return ",".join(map(spell, value))
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
