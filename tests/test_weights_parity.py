"""Reading and resizing weights against PyTorch, and the real files of other people."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jxfer
from jxfer.weights.files import open_tensors
from jxfer.weights.resize import Positions, resample

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
functional = torch.nn.functional

FORMATS = {"zip": True, "legacy": False}
formats = pytest.mark.parametrize("kind", FORMATS)


def saved(content: Any, file: Path, kind: str) -> dict[str, np.ndarray]:
    """Returns what we read of what PyTorch wrote."""
    torch.save(content, file, _use_new_zipfile_serialization=FORMATS[kind])
    return {name: tensor.read() for name, tensor in open_tensors([file]).items()}


def numpy_of(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach()
    return tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def assert_read(found: dict[str, np.ndarray], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert str(found[name].dtype) == str(tensor.dtype).removeprefix("torch.")
        assert found[name].shape == tuple(tensor.shape)
        np.testing.assert_array_equal(found[name].astype(numpy_of(tensor).dtype), numpy_of(tensor), err_msg=name)


TYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64")


@formats
def test_tensors_of_every_type_are_read_as_pytorch_wrote_them(kind, tmp_path):
    tensors = {name: (torch.arange(12).reshape(3, 4) % 5).to(getattr(torch, name)) for name in TYPES}
    assert_read(saved(tensors, tmp_path / "model.pt", kind), tensors)


@formats
def test_views_of_shared_storages_are_read_as_pytorch_sees_them(kind, tmp_path):
    base = torch.randn(6, 8)
    tensors = {
        "whole": base,
        "turned": base.T,
        "some": base[1:5:2, 3:],
        "scalar": base[2, 3],
        "expanded": base[:, :1].expand(6, 4),
        "empty": base[:0],
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }
    assert_read(saved(tensors, tmp_path / "model.pt", kind), tensors)


@formats
def test_the_weights_of_a_training_scripts_checkpoint_are_found(kind, tmp_path):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.randn(2, 3, 6, 6)[:, :, :, :].contiguous().movedim(1, 1)[:, :, :6, :6]).sum().backward()
    optimizer.step()
    content = {"epoch": 3, "state_dict": module.state_dict(), "optimizer": optimizer.state_dict(), "best": 0.5}
    assert_read(saved(content, tmp_path / "model.pth", kind), dict(module.state_dict()))
    parameters = {"weight": torch.nn.Parameter(torch.randn(2)), "device": torch.device("cpu"), "size": torch.Size([2])}
    assert_read(saved(parameters, tmp_path / "model.pth", kind), {"weight": parameters["weight"]})


@formats
def test_a_whole_module_is_refused_by_the_name_of_its_class(kind, tmp_path):
    with pytest.raises(jxfer.InputError, match=r"its pickle calls `torch\.nn\.modules\.linear\.Linear`, which is not"):
        saved(torch.nn.Linear(2, 2), tmp_path / "model.pt", kind)


@pytest.mark.parametrize(("name", "layers"), [("resnet20-12fca82f", 20), ("resnet32-d509ac18", 32)])
def test_real_legacy_files_are_read_as_pytorch_reads_them(name, layers, real_data):
    file = real_data / "weights_resnet_cifar10" / f"{name}.th"
    expected = torch.load(file, map_location="cpu", weights_only=False)["state_dict"]
    tensors = {key: tensor.read() for key, tensor in open_tensors([file]).items()}
    assert_read(tensors, dict(expected.items()))
    model = jxfer.load(f"file:{file}", model=f"resnet{layers}")
    np.testing.assert_array_equal(model.head.kernel[...], expected["module.linear.weight"].numpy().T)


def test_a_real_keras_file_is_read_as_h5py_reads_it(real_data):
    h5py = pytest.importorskip("h5py")
    (file,) = (real_data / "weights_squeezenet11_imagenet").glob("*.h5")
    tensors = open_tensors([file])
    assert sum(int(np.prod(tensor.shape)) for tensor in tensors.values()) == 722_496
    with h5py.File(file) as archive:
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(tensor.read(), archive[name][()])
    model = jxfer.load(f"file:{file}", model="squeezenet1_1", num_classes=2)
    np.testing.assert_array_equal(model.stem.conv.kernel[...], tensors["conv1/uniform1"].read())


def test_a_real_npz_is_read_as_numpy_reads_it(real_data):
    file = real_data / "weights_google_speech_embedding" / "google_speech_embedding.npz"
    tensors = open_tensors([file])
    assert sum(int(np.prod(tensor.shape)) for tensor in tensors.values()) == 328_217
    with np.load(file) as archive:
        assert set(archive.files) == set(tensors)
        for name in archive.files:
            np.testing.assert_array_equal(tensors[name].read(), archive[name])


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("size", [(3, 9), (14, 5), (7, 7), (1, 2), (20, 31)])
def test_images_are_resampled_as_pytorch_does(size, antialias):
    image = torch.randn(7, 6, 4, dtype=torch.float64)
    kwargs = {"mode": "bicubic", "align_corners": False, "antialias": antialias}
    expected = functional.interpolate(image.permute(2, 0, 1)[None], size, **kwargs)[0].permute(1, 2, 0)
    actual = resample(image.numpy(), size[0], axis=0, antialias=antialias)
    actual = resample(actual, size[1], axis=1, antialias=antialias)
    np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-9, atol=1e-9)  # float64 throughout


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_positions_are_resized_as_timm_does_with_pytorch(prefix, antialias):
    table = torch.randn(1, prefix + 16, 8)
    front, patches = table[:, :prefix], table[:, prefix:].reshape(1, 4, 4, 8).permute(0, 3, 1, 2)
    resized = functional.interpolate(patches, (6, 5), mode="bicubic", align_corners=False, antialias=antialias)
    expected = torch.cat([front, resized.permute(0, 2, 3, 1).reshape(1, 30, 8)], 1)
    actual = Positions(prefix, antialias=antialias)(table.numpy(), (1, prefix + 30, 8), grid=(6, 5))
    np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-5, atol=1e-6)  # float32


@pytest.mark.parametrize("channels", [1, 4, 6])
def test_other_channels_get_the_kernel_that_timm_gives_them(channels):
    from jxfer.weights.resize import InputChannels

    weight = torch.randn(8, 3, 5, 5)
    if channels == 1:
        expected = weight.sum(1, keepdim=True)
    else:
        repeats = -(-channels // 3)
        expected = weight.repeat(1, repeats, 1, 1)[:, :channels] * (3 / channels)
    actual = InputChannels()(weight.numpy().transpose(2, 3, 1, 0), (5, 5, channels, 8))
    np.testing.assert_allclose(actual.transpose(3, 2, 0, 1), expected.numpy(), rtol=1e-6, atol=1e-6)  # float32


def test_a_vit_for_square_images_reads_oblong_ones_as_transformers_does(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, patch_size=8, image_size=32
    )
    torch.manual_seed(0)
    reference = transformers.ViTForImageClassification(config).eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    reference.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 48, 32)
    with torch.no_grad():
        expected = reference(images, interpolate_pos_encoding=True).logits
    model = jxfer.load(f"file:{tmp_path}", input_shape=(48, 32, 3), rules=[("embed/position", "resize")])
    model.eval()
    actual = nnx.jit(lambda model, x: model(x))(model, jnp.asarray(images.numpy().transpose(0, 2, 3, 1)))
    scale = np.abs(expected.numpy()).max()
    np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-4, atol=1e-4 * scale)
