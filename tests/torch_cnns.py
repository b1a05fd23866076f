"""Plain PyTorch networks under torchvision's names, written from the papers, and how parity tests compare with them."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import nn
from weights import fill

from jxfer.models.alexnet import AlexNetConfig
from jxfer.models.mobilenet import MobileNetV2Config
from jxfer.models.squeezenet import SqueezeNetConfig
from jxfer.models.vgg import VGGConfig
from jxfer.weights.naming import Naming

# Float32 has 24 bits; sums over up to a few thousand products in another order differ by about 1e-6 of their size,
# and tens of layers pass that on.
BLOCK_TOLERANCE = 1e-5
WHOLE_TOLERANCE = 1e-4
CLASSES = 7


class Classifying(nn.Module):
    """Features of the image, a pooling, and layers on the flattened result."""

    def __init__(self, features: list[nn.Module], pool: nn.Module, classifier: list[nn.Module]):
        super().__init__()
        self.features = nn.Sequential(*features)
        self.avgpool = pool
        self.classifier = nn.Sequential(*classifier)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def alexnet(config: AlexNetConfig, channels: int, classes: int) -> nn.Module:
    a, b, c, d, e = config.widths
    hidden, rate = config.hidden_dim, config.dropout
    features = [
        *(nn.Conv2d(channels, a, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(a, b, 5, 1, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(b, c, 3, 1, 1), nn.ReLU()),
        *(nn.Conv2d(c, d, 3, 1, 1), nn.ReLU()),
        *(nn.Conv2d(d, e, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(3, 2)),
    ]
    first = [nn.Dropout(rate), nn.Linear(e * 36, hidden), nn.ReLU()]
    second = [nn.Dropout(rate), nn.Linear(hidden, hidden), nn.ReLU()]
    return Classifying(features, nn.AdaptiveAvgPool2d(6), [*first, *second, nn.Linear(hidden, classes)])


def vgg(config: VGGConfig, channels: int, classes: int) -> nn.Module:
    features: list[nn.Module] = []
    for width, count in zip(config.widths, config.num_convs, strict=True):
        for _ in range(count):
            features.append(nn.Conv2d(channels, width, 3, 1, 1))
            features += [nn.BatchNorm2d(width)] if config.batch_norm else []
            features.append(nn.ReLU())
            channels = width
        features.append(nn.MaxPool2d(2, 2))
    hidden, rate = config.hidden_dim, config.dropout
    first = [nn.Linear(channels * 49, hidden), nn.ReLU(), nn.Dropout(rate)]
    second = [nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(rate)]
    return Classifying(features, nn.AdaptiveAvgPool2d(7), [*first, *second, nn.Linear(hidden, classes)])


class Fire(nn.Module):
    def __init__(self, channels: int, squeezed: int, expanded: int):
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.squeeze(x))
        return torch.cat([torch.relu(self.expand1x1(x)), torch.relu(self.expand3x3(x))], 1)


class SqueezeNet(nn.Module):
    """The published features, with our head on their average under the name that we give it."""

    def __init__(self, config: SqueezeNetConfig, channels: int, classes: int):
        super().__init__()
        inputs = (config.stem_width, *(2 * width for width in config.expanded))
        fires = [Fire(*sizes) for sizes in zip(inputs, config.squeezed, config.expanded, strict=False)]
        stem = [nn.Conv2d(channels, config.stem_width, 3, 2), nn.ReLU()]
        pools = [nn.MaxPool2d(3, 2, ceil_mode=True) for _ in range(3)]
        layers = [*stem, pools[0], *fires[:2], pools[1], *fires[2:4], pools[2], *fires[4:]]
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(inputs[-1], classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(self.features(x)).flatten(1))


class InvertedResidual(nn.Module):
    def __init__(self, channels: int, width: int, stride: int, expansion: int, epsilon: float):
        super().__init__()
        wide = channels * expansion
        expand = [normed(channels, wide, 1, epsilon=epsilon)] if expansion > 1 else []
        depthwise = normed(wide, wide, 3, stride, groups=wide, epsilon=epsilon)
        project = [nn.Conv2d(wide, width, 1, bias=False), nn.BatchNorm2d(width, eps=epsilon)]
        self.conv = nn.Sequential(*expand, depthwise, *project)
        self.shortcut = stride == 1 and channels == width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.shortcut else self.conv(x)


def normed(channels: int, width: int, size: int, stride: int = 1, *, groups: int = 1, epsilon: float) -> nn.Module:
    conv = nn.Conv2d(channels, width, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width, eps=epsilon), nn.ReLU6())


def mobilenet_v2(config: MobileNetV2Config, channels: int, classes: int) -> nn.Module:
    epsilon = config.epsilon
    width = config.channels(32)
    features = [normed(channels, width, 3, 2, epsilon=epsilon)]
    table = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    for expansion, count, blocks, stride in table:
        for i in range(blocks):
            out = config.channels(count)
            features.append(InvertedResidual(width, out, stride if i == 0 else 1, expansion, epsilon))
            width = out
    features.append(normed(width, config.last_channels, 1, epsilon=epsilon))
    head = [nn.Dropout(config.dropout), nn.Linear(config.last_channels, classes)]
    return Classifying(features, nn.AdaptiveAvgPool2d(1), head)


def realistic(reference: nn.Module, image: torch.Tensor) -> nn.Module:
    """Gives a network weights through which images are told apart, and norms whose values all differ; returns it."""
    momenta = {}
    for module in reference.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            momenta[module] = module.momentum
            module.momentum = 1.0
    with torch.no_grad():
        reference.train()(image)
    for module, momentum in momenta.items():
        module.momentum = momentum
    return reference


def outputs_of(reference: nn.Module, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Returns a dict that fills with what each of these modules returned last."""
    seen: dict[str, torch.Tensor] = {}
    for name in names:
        module = reference.get_submodule(name)
        module.register_forward_hook(lambda m, inputs, y, name=name: seen.update({name: y.clone()}))
    return seen


def filled(make: Any, size: Any, naming: Naming, channels: int, tensors: Mapping[str, Any], classes: int = CLASSES):
    """Returns our network with copies of their tensors, which go in by name."""
    settings = {"input_shape": (64, 64, channels), "num_classes": classes, "dtype": jnp.float32}
    model = nnx.eval_shape(lambda: make(size, **settings, rngs=nnx.Rngs(0)))
    return fill(model, naming, size, {name: np.asarray(tensor).copy() for name, tensor in tensors.items()})


def in_inference(model: nnx.Module) -> nnx.Module:
    """Returns a view that uses the running statistics and drops nothing out."""
    return nnx.view(model, use_running_average=True, deterministic=True, raise_if_not_found=False)


def run(module: Any, x: jax.Array) -> jax.Array:
    """Runs a module compiled; its statistics move as in training where they do."""
    return nnx.jit(lambda m, x: m(x))(module, x)


def nhwc(tensor: torch.Tensor) -> jax.Array:
    """Returns activations in our order of axes; those of other ranks as they are."""
    array = tensor.detach().numpy()
    return jnp.asarray(array.transpose(0, 2, 3, 1) if array.ndim == 4 else array)


def assert_near(actual: Any, expected: Any, tolerance: float, what: str = "") -> None:
    """Fails where the largest difference is more than `tolerance` of the largest value; flattening is no difference."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    error = np.abs(actual - expected.reshape(actual.shape)).max() / np.abs(expected).max()
    assert error <= tolerance, f"{what}: relative difference {error:.2e}"
