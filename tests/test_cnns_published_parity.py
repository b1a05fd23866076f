"""Published weights of convolutional networks, by name into ours and out again, and what their features are worth."""

import io
import tarfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from weights import exported

from jxfer.data.images import ImageShape, decode
from jxfer.models import cifar_resnet, squeezenet
from jxfer.weights.files import open_tensors
from jxfer.weights.names import cifar_resnet as cifar_names
from jxfer.weights.names import squeezenet as squeezenet_names

pytestmark = pytest.mark.parity
pytest.importorskip("torch")
from torch_cnns import filled  # noqa: E402


def ants_and_bees(archive: Path, size: int, fraction: float) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns images [N size size 3] uint8 and whether each shows bees, of `train` and `val`."""
    images: dict[str, list[np.ndarray]] = {"train": [], "val": []}
    bees: dict[str, list[bool]] = {"train": [], "val": []}
    shape = ImageShape(size, 3, crop_fraction=fraction)
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name.endswith(".jpg"):
                _, split, kind, _ = member.name.split("/")
                images[split].append(decode(io.BytesIO(tar.extractfile(member).read()), shape))
                bees[split].append(kind == "bees")
    return {split: np.stack(each) for split, each in images.items()}, {k: np.asarray(v) for k, v in bees.items()}


def test_published_squeezenet_features_tell_ants_from_bees(real_data):
    from sklearn.linear_model import LogisticRegression

    naming = squeezenet_names.NAMINGS[1]
    size = squeezenet.CONFIGS["squeezenet1_1"]
    folder = real_data / "weights_squeezenet11_imagenet"
    tensors = {name: tensor.read() for name, tensor in open_tensors(sorted(folder.glob("*.h5"))).items()}
    head = {"head/head_W": np.zeros((512, 2), np.float32), "head/head_b": np.zeros(2, np.float32)}
    model = filled(squeezenet.SqueezeNet, size, naming, 3, {**tensors, **head}, classes=2)
    back = exported(model, naming, size)
    assert set(back) == {*tensors, *head}
    assert all(np.array_equal(back[name], array) for name, array in tensors.items())

    how = naming.preprocessing
    images, bees = ants_and_bees(
        real_data / "hymenoptera" / "hymenoptera_short256_q88.tar", how["image_size"], how["crop_fraction"]
    )
    mean, std = (np.asarray(how[name], np.float32) for name in ("mean", "std"))
    features_of = nnx.jit(lambda m, x: m.features((x[..., ::-1] / 255 - mean) / std))
    features = {
        split: np.concatenate([features_of(model, jnp.asarray(part, jnp.float32)) for part in np.split(each, cuts)])
        for split, each in images.items()
        for cuts in [range(64, len(each), 64)]
    }
    probe = LogisticRegression(max_iter=5000).fit(features["train"], bees["train"])
    assert len(bees["val"]) == 153
    assert probe.score(features["val"], bees["val"]) >= 0.889  # 0.915; in RGB 0.863, with random weights 0.608


@pytest.mark.parametrize(("file", "name"), [("resnet20-12fca82f.th", "resnet20"), ("resnet32-d509ac18.th", "resnet32")])
def test_published_cifar_weights_fill_their_networks_by_name_and_come_back(real_data, file, name):
    naming, size = cifar_names.NAMINGS[0], cifar_resnet.CONFIGS[name]
    (prefix,) = naming.prefixes
    tensors = {
        each.removeprefix(prefix): tensor.read()
        for each, tensor in open_tensors([real_data / "weights_resnet_cifar10" / file]).items()
    }
    model = filled(cifar_resnet.CifarResNet, size, naming, 3, tensors, classes=10)
    back = exported(model, naming, size)
    assert set(back) == {each for each in tensors if "num_batches" not in each}
    assert all(np.array_equal(back[each], tensors[each]) for each in back)
