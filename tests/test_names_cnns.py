"""Names of the convolutional networks' weights: every tensor has one, both ways, and configs are read and written."""

import dataclasses
import functools
import json
import re
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jxfer.models import alexnet, cifar_resnet, mobilenet, resnet, squeezenet, vgg
from jxfer.typing import InputError
from jxfer.weights.names import alexnet as alexnet_names
from jxfer.weights.names import cifar_resnet as cifar_names
from jxfer.weights.names import mobilenet as mobilenet_names
from jxfer.weights.names import resnet as resnet_names
from jxfer.weights.names import squeezenet as squeezenet_names
from jxfer.weights.names import vgg as vgg_names
from jxfer.weights.naming import Naming, Rule

# A named size: its network, its fields and its namings.
SIZES: dict[str, tuple[Any, Any, tuple[Naming, ...]]] = {
    "alexnet": (alexnet.AlexNet, alexnet.CONFIGS["alexnet"], alexnet_names.NAMINGS),
    "vgg11": (vgg.VGG, vgg.CONFIGS["vgg11"], vgg_names.NAMINGS),
    "vgg16_bn": (vgg.VGG, vgg.CONFIGS["vgg16_bn"], vgg_names.NAMINGS),
    "squeezenet1_1": (squeezenet.SqueezeNet, squeezenet.CONFIGS["squeezenet1_1"], squeezenet_names.NAMINGS),
    "mobilenet_v2": (mobilenet.MobileNetV2, mobilenet.CONFIGS["mobilenet_v2"], mobilenet_names.NAMINGS),
    "resnet18": (resnet.ResNet, resnet.CONFIGS["resnet18"], resnet_names.NAMINGS),
    "resnet50": (resnet.ResNet, resnet.CONFIGS["resnet50"], resnet_names.NAMINGS),
    "resnet20": (cifar_resnet.CifarResNet, cifar_resnet.CONFIGS["resnet20"], cifar_names.NAMINGS),
}
CASES = [(name, naming) for name, (_, _, namings) in SIZES.items() for naming in namings]
IDS = [f"{name}-{naming.name}" for name, naming in CASES]
EXAMPLES = {
    "alexnet-torchvision": {"features.10.weight": "conv5/conv/kernel", "classifier.4.bias": "hidden2/linear/bias"},
    "vgg11-torchvision": {"features.18.weight": "layer5/1/conv/kernel", "classifier.0.bias": "hidden1/linear/bias"},
    "vgg16_bn-torchvision": {
        "features.40.bias": "layer5/2/conv/bias",
        "features.41.running_var": "layer5/2/bn/var",
        "classifier.6.weight": "head/kernel",
    },
    "vgg11-timm": {"features.18.weight": "layer5/1/conv/kernel", "pre_logits.fc1.weight": "hidden1/linear/kernel"},
    "vgg16_bn-timm": {"features.41.running_var": "layer5/2/bn/var", "head.fc.bias": "head/bias"},
    "squeezenet1_1-torchvision": {"features.12.expand3x3.bias": "layer3/3/expand3/bias"},
    "squeezenet1_1-keras": {
        "fire9/expand3x3/uniform25": "layer3/3/expand3/kernel",
        "fire4/squeeze1x1/fire4/squeeze1x1_b": "layer2/0/squeeze/bias",
    },
    "mobilenet_v2-torchvision": {
        "features.1.conv.0.1.weight": "layer1/0/depthwise/bn/scale",
        "features.1.conv.1.weight": "layer1/0/project/conv/kernel",
        "features.17.conv.1.0.weight": "layer7/0/depthwise/conv/kernel",
        "features.17.conv.3.bias": "layer7/0/project/bn/bias",
        "features.18.0.weight": "top/layer/conv/kernel",
    },
    "mobilenet_v2-transformers": {
        "mobilenet_v2.conv_stem.reduce_1x1.normalization.weight": "layer1/0/project/bn/scale",
        "mobilenet_v2.layer.0.expand_1x1.convolution.weight": "layer2/0/expand/conv/kernel",
        "mobilenet_v2.layer.15.reduce_1x1.convolution.weight": "layer7/0/project/conv/kernel",
    },
    "mobilenet_v2-transformers-encoder": {
        "layer.15.reduce_1x1.convolution.weight": "layer7/0/project/conv/kernel",
    },
    "mobilenet_v2-timm": {
        "blocks.0.0.conv_dw.weight": "layer1/0/depthwise/conv/kernel",
        "blocks.0.0.bn2.running_mean": "layer1/0/project/bn/mean",
        "blocks.6.0.conv_pwl.weight": "layer7/0/project/conv/kernel",
        "bn2.weight": "top/layer/bn/scale",
    },
    "resnet18-torchvision": {"layer4.0.downsample.1.running_mean": "layer4/0/downsample/bn/mean"},
    "resnet18-transformers": {"resnet.encoder.stages.3.layers.1.layer.1.convolution.weight": "layer4/1/conv2/kernel"},
    "resnet18-transformers-encoder": {"encoder.stages.3.layers.1.layer.1.convolution.weight": "layer4/1/conv2/kernel"},
    "resnet18-timm": {"bn1.weight": "stem/bn/scale"},
    "resnet50-torchvision": {"layer1.2.conv3.weight": "layer1/2/conv3/kernel", "fc.bias": "head/bias"},
    "resnet50-transformers": {
        "resnet.embedder.embedder.convolution.weight": "stem/conv/kernel",
        "resnet.encoder.stages.0.layers.0.shortcut.normalization.bias": "layer1/0/downsample/bn/bias",
        "classifier.1.weight": "head/kernel",
    },
    "resnet50-transformers-encoder": {"embedder.embedder.convolution.weight": "stem/conv/kernel"},
    "resnet50-timm": {"layer2.3.bn3.running_var": "layer2/3/bn3/var"},
    "resnet20-akamaster": {"layer3.0.conv1.weight": "layer3/0/conv1/kernel", "linear.weight": "head/kernel"},
}


@functools.cache
def shapes(name: str) -> dict[str, tuple[int, ...]]:
    make, size, _ = SIZES[name]
    settings = {"input_shape": (64, 64, 3), "num_classes": 5, "dtype": jnp.float32}
    model = nnx.eval_shape(lambda: make(size, **settings, rngs=nnx.Rngs(0)))
    flat = nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    return {"/".join(map(str, keys)): variable.get_value().shape for keys, variable in flat}


@functools.cache
def rules_of(name: str, publisher: str) -> dict[str, list[tuple[Rule, str]]]:
    """Returns for each of our paths the rules that name it, and how."""
    _, size, namings = SIZES[name]
    rules = next(naming.rules(size) for naming in namings if naming.name == publisher)
    return {path: [(rule, t) for rule in rules if (t := rule.theirs_of(path)) is not None] for path in shapes(name)}


@pytest.mark.parametrize(("name", "naming"), CASES, ids=IDS)
def test_every_parameter_has_one_name_which_leads_back_to_it(name, naming):
    rules, named = naming.rules(SIZES[name][1]), rules_of(name, naming.name)
    assert all(len(found) == 1 for found in named.values())
    back = {theirs: [ours for rule in rules if (ours := rule.ours_of(theirs))] for [(_, theirs)] in named.values()}
    assert back == {theirs: [(path,)] for path, [(_, theirs)] in named.items()}
    assert len(back) == len(named)
    assert {rule for [(rule, _)] in named.values()} == set(rules)


@pytest.mark.parametrize(("name", "naming"), CASES, ids=IDS)
def test_published_names_lead_to_our_paths(name, naming):
    for theirs, ours in EXAMPLES[f"{name}-{naming.name}"].items():
        assert [found for rule in naming.rules(SIZES[name][1]) if (found := rule.ours_of(theirs))] == [(ours,)]
        assert ours in shapes(name)


@pytest.mark.parametrize(("name", "naming"), CASES, ids=IDS)
def test_layouts_of_all_tensors_are_undone_by_their_inverse(name, naming):
    for path, [(rule, _)] in rules_of(name, naming.name).items():
        shape = shapes(name)[path]
        if np.prod(shape) > 1e6:
            continue
        array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        np.testing.assert_array_equal(rule.layout.to_ours(rule.layout.to_theirs(array)), array)


@pytest.mark.parametrize(("name", "names"), [("alexnet", alexnet_names), ("vgg11", vgg_names)])
def test_the_first_kernel_can_be_changed_to_grey_images(name, names):
    ((path, resize),) = names.RESIZES
    rows, columns, channels, width = shapes(name)[path]
    assert channels == 3
    kernel = np.random.default_rng(0).normal(size=(rows, columns, channels, width)).astype(np.float32)
    grey = resize(kernel, (rows, columns, 1, width))
    np.testing.assert_allclose(grey[:, :, 0], kernel.sum(axis=2), rtol=1e-6)


def test_the_first_hidden_layer_reads_rows_columns_channels_where_pytorch_reads_channels_first():
    (rule,) = [
        rule for rule in alexnet_names.NAMINGS[0].rules(alexnet.AlexNetConfig()) if "classifier.1.w" in rule.theirs
    ]
    image = np.random.default_rng(0).normal(size=(6, 6, 4))
    kernel = np.random.default_rng(1).normal(size=(3, 4 * 6 * 6))
    theirs = kernel @ image.transpose(2, 0, 1).reshape(-1)
    np.testing.assert_allclose(image.reshape(-1) @ rule.layout.to_ours(kernel), theirs)


def test_weights_for_caffe_see_pixels_of_255_backwards_less_the_mean():
    keras = squeezenet_names.NAMINGS[1].preprocessing
    pixel = np.asarray([10.0, 20.0, 30.0])  # red, green, blue
    prepared = (pixel[::-1] / 255 - keras["mean"]) / keras["std"]
    assert keras["channel_order"] == "bgr"
    np.testing.assert_allclose(prepared, [30 - 103.939, 20 - 116.779, 10 - 123.68])
    assert round(keras["image_size"] / keras["crop_fraction"]) == 256


RESNET_CONFIGS = [
    ({}, ("resnet50", {})),
    ({"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]}, ("resnet18", {})),
    ({"depths": [3, 4, 23, 3]}, ("resnet101", {})),
    ({"depths": [3, 8, 36, 3]}, ("resnet50", {"num_blocks": (3, 8, 36, 3)})),
    (
        {"embedding_size": 16, "hidden_sizes": [64, 128, 128, 256], "depths": [3, 4, 6, 3]},
        ("resnet50", {"widths": (16, 32, 32, 64)}),
    ),
]


@pytest.mark.parametrize(("fields", "expected"), RESNET_CONFIGS)
def test_resnet_configs_of_transformers_name_the_nearest_size(fields, expected):
    read = resnet_names.NAMINGS[1].read_config
    assert read({"model_type": "resnet", **fields}) == expected
    assert read({"model_type": "bert", **fields}) is None


def test_mobilenet_configs_of_transformers_differ_from_torchvision_in_epsilon_padding_and_dropout():
    read = mobilenet_names.NAMINGS[1].read_config
    google = {"dropout": 0.8, "epsilon": 1e-3, "tf_padding": True}
    assert read({"model_type": "mobilenet_v2"}) == ("mobilenet_v2", google)
    assert read({"model_type": "mobilenet_v2", "depth_multiplier": 1.4})[1] == {**google, "width": 1.4}
    assert read({"model_type": "mobilenet_v1"}) is None


@pytest.mark.parametrize(
    ("naming", "fields", "message"),
    [
        (resnet_names.NAMINGS[1], {"downsample_in_bottleneck": True}, "`downsample_in_bottleneck`"),
        (resnet_names.NAMINGS[1], {"embedding_size": 32}, "`embedding_size` is 32; .* 64"),
        (resnet_names.NAMINGS[1], {"hidden_act": "gelu"}, "`hidden_act` is 'gelu'; .* 'relu'"),
        (mobilenet_names.NAMINGS[1], {"output_stride": 16}, "`output_stride` is 16; .* 32"),
    ],
)
def test_a_config_of_a_network_we_do_not_build_is_an_error_that_names_the_field(naming, fields, message):
    model_type = "resnet" if naming in resnet_names.NAMINGS else "mobilenet_v2"
    with pytest.raises(InputError, match=message):
        naming.read_config({"model_type": model_type, **fields})


@pytest.mark.parametrize("size", [resnet.CONFIGS["resnet18"], resnet.ResNetConfig((1, 1, 1, 1), "bottleneck")])
def test_resnet_configs_written_for_transformers_read_back(size):
    naming = resnet_names.NAMINGS[1]
    written = json.loads(json.dumps(naming.write_config(size, ("ant", "bee"), (224, 224, 3))))
    assert written["id2label"] == {"0": "ant", "1": "bee"}
    name, fields = naming.read_config(written)
    assert dataclasses.replace(resnet.CONFIGS[name], **fields) == size


def test_mobilenet_configs_written_for_transformers_read_back():
    naming = mobilenet_names.NAMINGS[1]
    size = mobilenet.MobileNetV2Config(width=0.5, epsilon=1e-3, tf_padding=True)
    written = json.loads(json.dumps(naming.write_config(size, ("ant", "bee"), (96, 96, 1))))
    assert (written["num_channels"], written["image_size"]) == (1, 96)
    name, fields = naming.read_config(written)
    assert dataclasses.replace(mobilenet.CONFIGS[name], **fields) == size


def test_timm_configs_name_its_plain_resnets_only():
    timm = resnet_names.NAMINGS[2]
    assert timm.read_config({"architecture": "resnet50", "num_classes": 1000}) == ("resnet50", {})
    assert timm.read_config({"architecture": "resnet50d"}) is None
    assert timm.read_config({"model_type": "resnet"}) is None
    written = timm.write_config(resnet.CONFIGS["resnet101"], ("ant", "bee"), (160, 128, 3))
    assert (written["architecture"], written["num_classes"]) == ("resnet101", 2)
    assert written["pretrained_cfg"]["input_size"] == [3, 160, 128]


@pytest.mark.parametrize("naming", resnet_names.NAMINGS[1:3], ids=lambda naming: naming.name)
def test_a_stem_for_small_images_cannot_be_written_for_publishers_that_have_none(naming):
    message = re.escape(f"{naming.name} has no ResNet with the stem for small images")
    with pytest.raises(InputError, match=message):
        naming.write_config(resnet.CONFIGS["resnet18_32"], ("ant", "bee"), (32, 32, 3))


def test_a_size_timm_has_no_name_for_is_an_error():
    with pytest.raises(InputError, match="timm has no name for ResNetConfig"):
        resnet_names.NAMINGS[2].write_config(resnet.ResNetConfig((1, 1, 1, 1)), ("ant", "bee"), (64, 64, 3))


def test_timm_configs_name_its_vggs_and_mobilenets():
    vggs, mobilenets = (next(each for each in n.NAMINGS if each.name == "timm") for n in (vgg_names, mobilenet_names))
    assert vggs.read_config({"architecture": "vgg16_bn"}) == ("vgg16_bn", {})
    assert vggs.read_config({"architecture": "vgg13"}) is None
    assert vggs.write_config(vgg.CONFIGS["vgg11"], ("ant", "bee"), (224, 224, 3))["architecture"] == "vgg11"
    with pytest.raises(InputError, match="timm has no name for VGGConfig"):
        vggs.write_config(vgg.VGGConfig((1, 1, 1, 1, 1)), ("ant", "bee"), (224, 224, 3))
    assert mobilenets.read_config({"architecture": "mobilenetv2_140"}) == ("mobilenet_v2", {"width": 1.4})
    assert mobilenets.read_config({"architecture": "mobilenetv2_110d"}) is None
    size = mobilenet.MobileNetV2Config(width=0.35)
    assert mobilenets.write_config(size, ("ant", "bee"), (96, 96, 3))["architecture"] == "mobilenetv2_035"
    with pytest.raises(InputError, match="timm has no name for MobileNetV2Config"):
        mobilenets.write_config(dataclasses.replace(size, tf_padding=True), ("ant", "bee"), (96, 96, 3))


def test_a_kernel_that_covers_the_whole_image_is_a_linear_layer_on_it():
    layout = vgg_names.WholeImageConv(7)
    image, kernel = (
        np.random.default_rng(seed).normal(size=shape) for seed, shape in ((0, (4, 7, 7)), (1, (3, 4, 7, 7)))
    )
    theirs = np.einsum("chw,ochw->o", image, kernel)
    np.testing.assert_allclose(image.transpose(1, 2, 0).reshape(-1) @ layout.to_ours(kernel), theirs)
    np.testing.assert_array_equal(layout.to_theirs(layout.to_ours(kernel)), kernel)
