"""Every architecture against a plain PyTorch reference: outputs, statistics, each block, and published weights."""

import io
import re
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from jxfer import data, known, pretrained
from jxfer.config import DataConfig, ModelConfig, SourceConfig
from jxfer.models.cifar_resnet import CifarResNet, CifarResNetConfig
from jxfer.models.convnet import ConvNet, ConvNetConfig
from jxfer.models.resnet import ResNet, ResNetConfig

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")

# Float32 has 24 bits; sums over up to a few thousand products in another order differ by about 1e-6 of their size,
# and tens of layers pass that on.
BLOCK_TOLERANCE = 1e-5
WHOLE_TOLERANCE = 1e-4
CLASSES = 7

CASES = {
    "convnet": (ConvNetConfig(widths=(4, 6, 8)), (9, 14, 1)),
    "resnet20": (CifarResNetConfig(num_blocks=3), (32, 32, 3)),
    "resnet18": (ResNetConfig((2, 2, 2, 2), widths=(8, 12, 16, 24)), (64, 48, 3)),
    "resnet18_32": (ResNetConfig((2, 2, 2, 2), small_images=True, widths=(8, 12, 16, 24)), (32, 27, 3)),
    "resnet50": (ResNetConfig((3, 4, 6, 3), block="bottleneck", widths=(4, 6, 8, 12)), (64, 48, 3)),
}


class TorchBasic(torch.nn.Module):
    def __init__(self, in_features: int, out_features: int, stride: int, downsample: torch.nn.Module | None):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(in_features, out_features, 3, stride, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(out_features)
        self.conv2 = torch.nn.Conv2d(out_features, out_features, 3, 1, 1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(out_features)
        self.downsample = downsample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(x)) + shortcut)


class TorchBottleneck(torch.nn.Module):
    def __init__(self, in_features: int, out_features: int, stride: int, downsample: torch.nn.Module | None):
        super().__init__()
        width = out_features // 4
        self.conv1 = torch.nn.Conv2d(in_features, width, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(width)
        self.conv2 = torch.nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(width)
        self.conv3 = torch.nn.Conv2d(width, out_features, 1, bias=False)
        self.bn3 = torch.nn.BatchNorm2d(out_features)
        self.downsample = downsample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return torch.relu(self.bn3(self.conv3(x)) + shortcut)


class TorchPadded(torch.nn.Module):
    def __init__(self, new_channels: int):
        super().__init__()
        self.new_channels = new_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half = self.new_channels // 2
        return torch.nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, self.new_channels - half))


def torch_projection(in_features: int, out_features: int, stride: int) -> torch.nn.Module | None:
    if stride == 1 and in_features == out_features:
        return None
    conv = torch.nn.Conv2d(in_features, out_features, 1, stride, bias=False)
    return torch.nn.Sequential(conv, torch.nn.BatchNorm2d(out_features))


def torch_padded(in_features: int, out_features: int, stride: int) -> torch.nn.Module | None:
    return None if stride == 1 else TorchPadded(out_features - in_features)


class TorchStaged(torch.nn.Module):
    """Stem, layers, mean over the pixels, and a linear head, under torchvision's names."""

    def __init__(self, stem: list[torch.nn.Module], layers: list[torch.nn.Module], features: int, classes: int):
        super().__init__()
        self.conv1, self.bn1, *rest = stem
        self.after_stem = torch.nn.Sequential(*rest)
        for number, layer in enumerate(layers, start=1):
            setattr(self, f"layer{number}", layer)
        self.num_layers = len(layers)
        self.fc = torch.nn.Linear(features, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.after_stem(torch.relu(self.bn1(self.conv1(x))))
        for number in range(1, self.num_layers + 1):
            x = getattr(self, f"layer{number}")(x)
        return self.fc(x.mean((2, 3)))


def torch_layer(
    block: Callable[..., torch.nn.Module],
    shortcut: Callable[..., Any],
    widths: tuple[int, int],
    count: int,
    stride: int,
) -> torch.nn.Module:
    first = block(*widths, stride, shortcut(*widths, stride))
    return torch.nn.Sequential(first, *[block(widths[1], widths[1], 1, None) for _ in range(count - 1)])


def torch_cifar(config: CifarResNetConfig, channels: int, classes: int) -> TorchStaged:
    narrow = config.widths[0]
    stem = [torch.nn.Conv2d(channels, narrow, 3, 1, 1, bias=False), torch.nn.BatchNorm2d(narrow)]
    pairs = zip((narrow, *config.widths), config.widths, (1, 2, 2), strict=False)
    layers = [torch_layer(TorchBasic, torch_padded, (a, b), config.num_blocks, s) for a, b, s in pairs]
    return TorchStaged(stem, layers, config.widths[-1], classes)


def torch_resnet(config: ResNetConfig, channels: int, classes: int) -> TorchStaged:
    narrow = config.widths[0]
    size, stride = (3, 1) if config.small_images else (7, 2)
    stem = [torch.nn.Conv2d(channels, narrow, size, stride, size // 2, bias=False), torch.nn.BatchNorm2d(narrow)]
    if not config.small_images:
        stem.append(torch.nn.MaxPool2d(3, 2, 1))
    block, expansion = (TorchBasic, 1) if config.block == "basic" else (TorchBottleneck, 4)
    outputs = [width * expansion for width in config.widths]
    steps = zip((narrow, *outputs), outputs, config.num_blocks, (1, 2, 2, 2), strict=False)
    layers = [torch_layer(block, torch_projection, (a, b), count, s) for a, b, count, s in steps]
    return TorchStaged(stem, layers, outputs[-1], classes)


def torch_convnet(config: ConvNetConfig, channels: int, classes: int) -> TorchStaged:
    def conv(in_features: int, out_features: int) -> list[torch.nn.Module]:
        return [torch.nn.Conv2d(in_features, out_features, 3, 1, 1, bias=False), torch.nn.BatchNorm2d(out_features)]

    narrow, middle, wide = config.widths
    layer1 = torch.nn.Sequential(*conv(narrow, middle), torch.nn.ReLU())
    layer2 = torch.nn.Sequential(*conv(middle, wide), torch.nn.ReLU(), torch.nn.MaxPool2d(2))
    stem = [*conv(channels, narrow), torch.nn.MaxPool2d(2)]
    return TorchStaged(stem, [layer1, layer2], wide, classes)


KINDS: dict[type, tuple[Any, Any]] = {
    ConvNetConfig: (ConvNet, torch_convnet),
    CifarResNetConfig: (CifarResNet, torch_cifar),
    ResNetConfig: (ResNet, torch_resnet),
}

NAMES = (
    (r"^(module\.)?", ""),
    (r"^(conv1|bn1)\.", r"stem.\1."),
    (r"^stem\.(conv|bn)1", r"stem.\1"),
    (r"^(layer\d)\.0\.(?=weight)", r"\1.conv."),  # layers of the ConvNet: a convolution and a norm, no blocks
    (r"^(layer\d)\.1\.(?=weight|bias|running)", r"\1.bn."),
    (r"downsample\.0", "downsample.conv"),
    (r"downsample\.1", "downsample.bn"),
    (r"^(fc|linear)\.", "head."),
    (r"running_mean$", "mean"),
    (r"running_var$", "var"),
    (r"(bn\d?)\.weight$", r"\1.scale"),
    (r"weight$", "kernel"),
    (r"\.", "/"),
)


def converted(state: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Returns PyTorch's tensors under our paths and in our order of axes."""
    arrays = {}
    for name, tensor in state.items():
        if name.endswith("num_batches_tracked"):
            continue
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        axes = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[tensor.ndim]  # OIHW -> HWIO, OI -> IO
        arrays[name] = tensor.detach().numpy().transpose(axes)
    return arrays


def filled(make: Any, config: Any, channels: int, classes: int, arrays: Mapping[str, np.ndarray]) -> nnx.Module:
    """Returns a model with these weights and statistics, every one of them used and of the model's own shape."""
    settings = {"input_shape": (32, 32, channels), "num_classes": classes, "dtype": jnp.float32}
    model = nnx.eval_shape(lambda: make(config, **settings, rngs=nnx.Rngs(0)))
    shapes = {keys: variable.get_value().shape for keys, variable in nnx.to_flat_state(nnx.state(model))}
    paths = {keys: "/".join(map(str, keys)) for keys in shapes}
    assert {paths[keys]: shape for keys, shape in shapes.items()} == {path: a.shape for path, a in arrays.items()}
    values = {keys: jnp.asarray(arrays[path]) for keys, path in paths.items()}
    return nnx.merge(nnx.graphdef(model), nnx.from_flat_state(values))


def statistics(model: nnx.Module) -> dict[str, np.ndarray]:
    flat = nnx.to_flat_state(nnx.state(model, nnx.BatchStat))
    return {"/".join(map(str, keys)): np.asarray(variable.get_value()) for keys, variable in flat}


def nhwc(tensor: torch.Tensor) -> jax.Array:
    return jnp.asarray(tensor.detach().numpy().transpose(0, 2, 3, 1))


def assert_near(actual: Any, expected: Any, tolerance: float, what: str = "") -> None:
    actual, expected = np.asarray(actual), np.asarray(expected)
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error <= tolerance, f"{what}: relative difference {error:.2e}"


def randomise_norms(reference: torch.nn.Module) -> None:
    """Gives norms values that a mistake would show up in: none is 0 or 1, all are different."""
    for module in reference.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.2)
            torch.nn.init.normal_(module.running_mean, std=0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)


@pytest.fixture(params=CASES, name="pair")
def _pair(request: pytest.FixtureRequest) -> tuple[nnx.Module, torch.nn.Module, torch.Tensor]:
    config, (rows, columns, channels) = CASES[request.param]
    make, make_reference = KINDS[type(config)]
    torch.manual_seed(0)
    reference = make_reference(config, channels, CLASSES)
    randomise_norms(reference)
    model = filled(make, config, channels, CLASSES, converted(reference.state_dict()))
    return model, reference, torch.randn(6, channels, rows, columns)


def test_logits_in_inference_equal_the_reference(pair):
    model, reference, image = pair
    with torch.no_grad():
        expected = reference.eval()(image).numpy()
    model = nnx.view(model, use_running_average=True)
    assert_near(nnx.jit(lambda m, x: m(x))(model, nhwc(image)), expected, WHOLE_TOLERANCE)


def test_logits_and_new_statistics_in_training_equal_the_reference(pair):
    model, reference, image = pair
    before = statistics(model)
    counts: dict[str, int] = {}
    for name, module in reference.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(lambda m, inputs, y, name=name: counts.update({name: y[:, 0].numel()}))
    with torch.no_grad():
        expected = reference.train()(image).numpy()
    assert_near(nnx.jit(lambda m, x: m(x))(model, nhwc(image)), expected, WHOLE_TOLERANCE)
    moved = {name: tensor for name, tensor in reference.state_dict().items() if "running" in name}
    values = converted(moved)
    sizes = converted({f"{name}.running_var": torch.full((1,), float(count)) for name, count in counts.items()})
    for path, value in statistics(model).items():
        if path.endswith("var"):  # PyTorch stores n / (n - 1) times the variance of the batch
            n = sizes[path].item()
            values[path] = 0.9 * before[path] + (values[path] - 0.9 * before[path]) * (n - 1) / n
        assert_near(value, values[path], WHOLE_TOLERANCE, path)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_each_block_equals_the_reference_on_the_same_input(pair, training):
    model, reference, image = pair
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, module in reference.named_modules():
        if re.fullmatch(r"layer\d(\.\d+)?", name):
            module.register_forward_hook(lambda m, inputs, y, name=name: seen.update({name: (inputs[0], y)}))
    with torch.no_grad():
        reference.train(training)(image)
    model = nnx.view(model, use_running_average=not training)
    checked = 0
    for name, (x, y) in seen.items():
        layer, *index = name.split(".")
        stage = getattr(model, layer)
        if isinstance(stage, nnx.List) == bool(index):  # a stage of several blocks is checked block by block
            block = stage[int(index[0])] if index else stage
            assert_near(nnx.jit(lambda m, x: m(x))(block, nhwc(x)), nhwc(y), BLOCK_TOLERANCE, name)
            checked += 1
    assert checked >= len(model.stages) - 3


def cifar_test_images(archive: Path, *, limit: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first images [N 32 32 3] uint8 of `test/CLASS/NNNN.jpg`, spread over the classes, and labels [N]."""
    with tarfile.open(archive) as tar:
        files = [member for member in tar if member.name.endswith(".jpg")]
        classes = sorted({member.name.split("/")[1] for member in files})
        files = sorted(files, key=lambda member: (member.name.split("/")[2], member.name))[:limit]
        files.sort(key=lambda member: member.offset)  # a gzip archive can only be read forwards
        images = [np.asarray(Image.open(io.BytesIO(tar.extractfile(member).read()))) for member in files]
    return np.stack(images), np.asarray([classes.index(member.name.split("/")[1]) for member in files])


@pytest.mark.parametrize(("weights", "blocks"), [("resnet20-12fca82f.th", 3), ("resnet32-d509ac18.th", 5)])
def test_published_cifar_weights_give_the_logits_of_the_reference(real_data, weights, blocks):
    file = real_data / "weights_resnet_cifar10" / weights
    state = torch.load(file, weights_only=True, map_location="cpu")["state_dict"]
    config = CifarResNetConfig(num_blocks=blocks)
    reference = torch_cifar(config, 3, 10).eval()
    names = {name: name.removeprefix("module.").replace("linear.", "fc.") for name in state}
    reference.load_state_dict({names[name]: tensor for name, tensor in state.items()})
    model = filled(CifarResNet, config, 3, 10, converted(state))
    pixels, labels = cifar_test_images(real_data / "cifar10_jpeg" / "cifar10_test_jpeg.tar.gz", limit=1000)
    images = (pixels / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    with torch.no_grad():
        expected = reference(torch.tensor(images.transpose(0, 3, 1, 2), dtype=torch.float32)).numpy()
    model = nnx.view(model, use_running_average=True)
    logits = nnx.jit(lambda m, x: m(x))(model, jnp.asarray(images, jnp.float32))
    assert_near(logits, expected, WHOLE_TOLERANCE)
    assert (np.asarray(logits).argmax(1) == labels).mean() > 0.78  # 0.81 and 0.83 on all 10,000


@pytest.mark.parametrize(
    ("weights", "name", "accuracy"),
    [("resnet20-12fca82f.th", "resnet20", 0.8103), ("resnet32-d509ac18.th", "resnet32", 0.8256)],
)
def test_published_cifar_weights_are_as_accurate_as_measured_elsewhere(real_data, weights, name, accuracy):
    origin = f"file:{real_data / 'weights_resnet_cifar10' / weights}"
    found = known.known_of(SourceConfig(weights=origin), ModelConfig(name))
    prepare = data.Prepare(config=DataConfig(**found.preprocessing), num_classes=10, train=False)
    model = nnx.view(pretrained.load(origin, model=name, input_shape=(32, 32, 3)), use_running_average=True)
    pixels, labels = cifar_test_images(real_data / "cifar10_jpeg" / "cifar10_test_jpeg.tar.gz", limit=None)
    logits = nnx.jit(lambda m, x: m(prepare(jax.random.key(0), {"image": x})["image"]))
    batches = np.split(pixels, 10)
    predicted = np.concatenate([np.asarray(logits(model, batch)).argmax(1) for batch in batches])
    assert (predicted == labels).mean() == pytest.approx(accuracy, abs=0.001)
