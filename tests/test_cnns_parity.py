"""Convolutional networks against PyTorch, through their namings and back: blocks, logits and statistics."""

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
from flax import nnx
from weights import exported

from jxfer.models import alexnet, mobilenet, resnet, squeezenet, vgg
from jxfer.models.stages import stage
from jxfer.weights.names import alexnet as alexnet_names
from jxfer.weights.names import mobilenet as mobilenet_names
from jxfer.weights.names import resnet as resnet_names
from jxfer.weights.names import squeezenet as squeezenet_names
from jxfer.weights.names import vgg as vgg_names
from jxfer.weights.naming import Naming

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
import torch_cnns  # noqa: E402 - needs torch
from torch_cnns import (  # noqa: E402
    BLOCK_TOLERANCE,
    CLASSES,
    WHOLE_TOLERANCE,
    assert_near,
    filled,
    in_inference,
    nhwc,
    outputs_of,
    realistic,
    run,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A small size of a network, the reference's maker, and which of its modules end the same parts as ours."""

    make: Any
    size: Any
    reference: Any
    naming: Naming
    shape: tuple[int, int, int]
    parts: dict[str, str]
    """Name of their module -> the part of ours, in order, that gives the same output from the same input."""


def vgg_parts(size: vgg.VGGConfig) -> dict[str, str]:
    parts, index = {}, -1
    for layer, count in enumerate(size.num_convs, start=1):
        for i in range(count):
            index += 3 if size.batch_norm else 2
            parts[f"features.{index}"] = f"layer{layer}/{i}"
        index += 1
        parts[f"features.{index}"] = f"layer{layer}/{count}"
    return {**parts, "avgpool": "pool", "classifier.2": "hidden1", "classifier.5": "hidden2", "classifier.6": "head"}


ALEX_PARTS = {f"features.{index}": f"conv{i}" for i, index in enumerate((2, 5, 7, 9, 12), start=1)}
ALEX_PARTS |= {"avgpool": "pool", "classifier.2": "hidden1", "classifier.5": "hidden2", "classifier.6": "head"}
FIRES = {3: "1/0", 4: "1/1", 5: "1/2", 6: "2/0", 7: "2/1", 8: "2/2", 9: "3/0", 10: "3/1", 11: "3/2", 12: "3/3"}
SQUEEZE_PARTS = {"features.2": "stem", **{f"features.{index}": f"layer{part}" for index, part in FIRES.items()}}
SQUEEZE_PARTS |= {"pool": "pool", "head": "head"}
RESIDUALS = [f"layer{n}/{i}" for n, count in enumerate(mobilenet.NUM_BLOCKS, start=1) for i in range(count)]
MOBILE_PARTS = {"features.0": "stem", **{f"features.{k}": part for k, part in enumerate(RESIDUALS, start=1)}}
MOBILE_PARTS |= {"avgpool": "top", "classifier.1": "head"}

WIDTHS = (4, 5, 6, 7, 8)
PLAIN = vgg.VGGConfig((1, 1, 2, 2, 2), widths=WIDTHS, hidden_dim=16, dropout=0.0)
NORMED = vgg.VGGConfig((2, 2, 3, 3, 3), batch_norm=True, widths=WIDTHS, hidden_dim=16, dropout=0.0)
ALEX = alexnet.AlexNetConfig(widths=WIDTHS, hidden_dim=16, dropout=0.0)
SQUEEZE = squeezenet.SqueezeNetConfig(8, (6, 6, 7, 7, 8, 8, 9, 9), (8, 8, 9, 9, 10, 10, 11, 11))
MOBILE = mobilenet.MobileNetV2Config(width=0.2, dropout=0.0)

CASES = {
    "alexnet": Case(alexnet.AlexNet, ALEX, torch_cnns.alexnet, alexnet_names.NAMINGS[0], (131, 227, 1), ALEX_PARTS),
    "vgg11": Case(vgg.VGG, PLAIN, torch_cnns.vgg, vgg_names.NAMINGS[0], (67, 160, 3), vgg_parts(PLAIN)),
    "vgg16_bn": Case(vgg.VGG, NORMED, torch_cnns.vgg, vgg_names.NAMINGS[0], (64, 97, 3), vgg_parts(NORMED)),
    "squeezenet1_1": Case(
        squeezenet.SqueezeNet, SQUEEZE, torch_cnns.SqueezeNet, squeezenet_names.NAMINGS[0], (61, 80, 3), SQUEEZE_PARTS
    ),
    "mobilenet_v2": Case(
        mobilenet.MobileNetV2, MOBILE, torch_cnns.mobilenet_v2, mobilenet_names.NAMINGS[0], (64, 51, 3), MOBILE_PARTS
    ),
}


@pytest.fixture(scope="module", params=CASES, name="pair")
def _pair(request: pytest.FixtureRequest) -> tuple[Case, nnx.Module, Any, Any]:
    case = CASES[request.param]
    rows, columns, channels = case.shape
    torch.manual_seed(0)
    reference = realistic(case.reference(case.size, channels, CLASSES), torch.randn(8, channels, rows, columns))
    model = filled(case.make, case.size, case.naming, channels, reference.state_dict())
    return case, model, reference, torch.randn(4, channels, rows, columns)


def test_tensors_come_back_as_they_were_under_the_same_names(pair):
    case, model, reference, _ = pair
    theirs = {name: tensor for name, tensor in reference.state_dict().items() if "num_batches" not in name}
    ours = exported(model, case.naming, case.size)
    assert set(ours) == set(theirs)
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name].numpy(), err_msg=name)


def test_logits_in_inference_equal_the_reference(pair):
    _, model, reference, image = pair
    with torch.no_grad():
        expected = reference.eval()(image)
    assert expected.std(0).max() > 0.01 * expected.abs().max()  # logits that depend on the image
    assert_near(run(in_inference(model), nhwc(image)), expected, WHOLE_TOLERANCE)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_each_part_equals_the_reference_on_the_same_input(pair, training):
    case, model, reference, image = pair
    reference = copy.deepcopy(reference)
    seen = outputs_of(reference, case.parts)
    with torch.no_grad():
        reference.train(training)(image)
    x = nhwc(image)
    model = nnx.clone(model) if training else in_inference(model)
    for name, part in case.parts.items():
        y = nhwc(seen[name])
        assert_near(run(stage(model, part), x), y, BLOCK_TOLERANCE, part)
        # What they flatten or average after the part, we do in it: the next one's input is as the part gives it.
        x = y.reshape(y.shape[0], -1) if part in ("pool", "top") else y


@pytest.mark.parametrize("name", ["vgg16_bn", "mobilenet_v2"])
def test_logits_and_new_statistics_in_training_equal_the_reference(name):
    case = CASES[name]
    torch.manual_seed(1)
    reference = realistic(case.reference(case.size, 3, CLASSES), torch.randn(8, 3, 64, 97))
    model = filled(case.make, case.size, case.naming, 3, reference.state_dict())
    before = {key: tensor.clone() for key, tensor in reference.state_dict().items()}
    counts: dict[str, int] = {}
    for path, module in reference.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(lambda m, inputs, y, path=path: counts.update({path: y[:, 0].numel()}))
    image = torch.randn(6, 3, 64, 97)
    with torch.no_grad():
        expected = reference.train()(image)
    assert_near(run(model, nhwc(image)), expected, WHOLE_TOLERANCE)
    ours = exported(model, case.naming, case.size)
    for path, n in counts.items():
        after = reference.state_dict()
        old, new = (state[f"{path}.running_var"] for state in (before, after))
        # PyTorch stores n / (n - 1) times the variance of the batch.
        biased = 0.9 * old + (new - 0.9 * old) * (n - 1) / n
        assert_near(ours[f"{path}.running_var"], biased, WHOLE_TOLERANCE, path)
        assert_near(ours[f"{path}.running_mean"], after[f"{path}.running_mean"], WHOLE_TOLERANCE, path)


RESNETS = {
    "basic": {"layer_type": "basic", "embedding_size": 8, "hidden_sizes": [8, 12, 16, 24], "depths": [2, 1, 1, 2]},
    "bottleneck": {"embedding_size": 8, "hidden_sizes": [32, 48, 64, 96], "depths": [1, 2, 1, 1]},
}


def random_resnet(fields: dict[str, Any]) -> tuple[Any, Any, Naming]:
    transformers = pytest.importorskip("transformers")
    reference = transformers.ResNetForImageClassification(transformers.ResNetConfig(**fields, num_labels=CLASSES))
    return reference, resnet.ResNet, resnet_names.NAMINGS[1]


def random_mobilenet(fields: dict[str, Any]) -> tuple[Any, Any, Naming]:
    transformers = pytest.importorskip("transformers")
    settings = {"depth_multiplier": 0.35, "classifier_dropout_prob": 0.0, "num_labels": CLASSES}
    config = transformers.MobileNetV2Config(**settings, **fields)
    reference = transformers.MobileNetV2ForImageClassification(config)
    return reference, mobilenet.MobileNetV2, mobilenet_names.NAMINGS[1]


def parts_of_resnet(size: resnet.ResNetConfig) -> dict[str, str]:
    parts = {"resnet.embedder": "stem"}
    for layer, count in enumerate(size.num_blocks):
        for i in range(count):
            parts[f"resnet.encoder.stages.{layer}.layers.{i}"] = f"layer{layer + 1}/{i}"
    return {**parts, "resnet.pooler": "pool", "classifier.1": "head"}


def parts_of_mobilenet(size: mobilenet.MobileNetV2Config) -> dict[str, str]:
    parts = {"mobilenet_v2.conv_stem.first_conv": "stem", "mobilenet_v2.conv_stem": "layer1/0"}
    parts |= {f"mobilenet_v2.layer.{k}": part for k, part in enumerate(RESIDUALS[1:])}
    return {**parts, "mobilenet_v2.pooler": "top", "classifier": "head"}


PUBLISHED = {
    "resnet-basic": (random_resnet, RESNETS["basic"], resnet.CONFIGS, parts_of_resnet),
    "resnet-bottleneck": (random_resnet, RESNETS["bottleneck"], resnet.CONFIGS, parts_of_resnet),
    "mobilenet-tensorflow": (random_mobilenet, {}, mobilenet.CONFIGS, parts_of_mobilenet),
    "mobilenet-pytorch": (random_mobilenet, {"tf_padding": False}, mobilenet.CONFIGS, parts_of_mobilenet),
}


@pytest.mark.parametrize("case", PUBLISHED)
@pytest.mark.parametrize("shape", [(64, 96), (75, 51)], ids=["even", "odd"])
def test_networks_of_transformers_give_the_same_by_config_and_names(case, shape):
    make_reference, fields, named, parts_of = PUBLISHED[case]
    torch.manual_seed(0)
    reference, make, naming = make_reference(fields)
    realistic(reference, torch.randn(8, 3, 75, 96))
    name, changes = naming.read_config(reference.config.to_dict())
    size = dataclasses.replace(named[name], **changes)
    model = in_inference(filled(make, size, naming, 3, reference.state_dict()))
    parts = parts_of(size)
    seen = outputs_of(reference, parts)
    image = torch.randn(2, 3, *shape)
    with torch.no_grad():
        expected = reference.eval()(image).logits
    assert expected.std(0).max() > 0.01 * expected.abs().max()  # logits that depend on the image
    x = nhwc(image)
    assert_near(run(model, x), expected, WHOLE_TOLERANCE)
    for theirs, ours in parts.items():
        y = nhwc(seen[theirs])
        assert_near(run(stage(model, ours), x), y, BLOCK_TOLERANCE, ours)
        x = y.reshape(y.shape[0], -1) if ours in ("pool", "top") else y


@pytest.mark.parametrize("case", PUBLISHED)
def test_what_we_export_is_a_network_of_transformers(case):
    make_reference, fields, named, _ = PUBLISHED[case]
    torch.manual_seed(0)
    reference, make, naming = make_reference(fields)
    realistic(reference, torch.randn(8, 3, 75, 96))
    name, changes = naming.read_config(reference.config.to_dict())
    size = dataclasses.replace(named[name], **changes)
    tensors = exported(filled(make, size, naming, 3, reference.state_dict()), naming, size)
    config = naming.write_config(size, tuple(f"class {index}" for index in range(CLASSES)), (64, 96, 3))
    again = type(reference)(type(reference.config).from_dict(config))
    missing, unexpected = again.load_state_dict(
        {k: torch.from_numpy(v.copy()) for k, v in tensors.items()}, strict=False
    )
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(again.eval()(image).logits, reference.eval()(image).logits)
