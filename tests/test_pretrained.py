"""`jxfer.load`: published weights or those of a run as a model, in one call."""

import json
import logging
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jxfer
from jxfer import checkpoint, models
from jxfer.config import DataConfig, MeshConfig, ModelConfig, to_dict
from jxfer.sharding import make_mesh
from jxfer.typing import InputError
from jxfer.weights.load import load_into, weights_of
from jxfer.weights.names import namings_of
from jxfer.weights.naming import Naming
from jxfer.weights.save import export_tensors, write_safetensors

RESNET = ModelConfig("resnet18", size=(("num_blocks", "1,1,1,1"), ("widths", "8,8,8,16")))
BERT = ModelConfig("bert_base", size=(("num_layers", "1"), ("hidden_dim", "8"), ("num_heads", "2"), ("mlp_dim", "16")))
CLASSES = ("ant", "bee", "wasp")


def random_model(config: ModelConfig, shape: tuple[int, ...], *, classes: int = 3) -> Any:
    model = models.build(config, num_classes=classes, input_shape=shape, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    shapes = {path: value.shape for path, value in weights_of(model).items()}
    load_into(model, {p: rng.normal(size=shape).astype(np.float32) for p, shape in shapes.items()}, what="test")
    return model


def publish(folder: Path, config: ModelConfig, shape: tuple[int, ...], **settings: Any) -> Any:
    """Writes a model as transformers does, and returns it."""
    size = models.size_of(config)
    naming: Naming = next(each for each in namings_of(size) if each.name == "transformers")
    model = random_model(config, shape, **settings)
    folder.mkdir(exist_ok=True)
    write_safetensors(folder / "model.safetensors", export_tensors(weights_of(model), naming, size), {"format": "pt"})
    assert naming.write_config is not None
    (folder / "config.json").write_text(json.dumps(naming.write_config(size, CLASSES, shape)))
    processor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"shortest_edge": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    folder = tmp_path_factory.mktemp("resnet")
    return f"file:{folder}", publish(folder, RESNET, (32, 32, 3))


def weights(model: Any, but: str = "none/") -> dict[str, np.ndarray]:
    return {path: np.asarray(value) for path, value in weights_of(model).items() if not path.startswith(but)}


def assert_same(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert set(actual) == set(expected)
    for path, value in expected.items():
        np.testing.assert_array_equal(actual[path], value, err_msg=path)


def test_a_published_model_is_loaded_as_it_is(resnet, caplog):
    origin, published = resnet
    with caplog.at_level(logging.INFO, logger="jxfer"):
        model = jxfer.load(origin)
    assert_same(weights(model), weights(published))
    assert "100 % of" in caplog.text
    assert "used" in caplog.text


def test_a_head_for_another_number_of_classes_starts_anew(resnet):
    origin, published = resnet
    model = jxfer.load(origin, num_classes=10)
    assert model.head.kernel.shape == (16, 10)
    assert_same(weights(model, but="head/"), weights(published, but="head/"))
    model.eval()
    assert nnx.jit(lambda model, x: model(x))(model, jnp.zeros((1, 32, 32, 3))).shape == (1, 10)
    assert_same(weights(jxfer.load(origin, num_classes=3)), weights(published))


def test_a_rule_of_ones_own_for_the_head_is_enough(resnet):
    origin, published = resnet
    model = jxfer.load(origin, num_classes=5, rules=[("head/*", "reinitialise")])
    assert_same(weights(model, but="head/"), weights(published, but="head/"))
    again = jxfer.load(origin, rules=[("head/**", "reinitialise")])
    assert again.head.kernel.shape == (16, 3)
    assert (np.asarray(again.head.kernel[...]) != np.asarray(published.head.kernel[...])).all()


def test_other_channels_are_read_after_a_rule(resnet):
    origin, published = resnet
    with pytest.raises(InputError, match=r"add the rule \('stem/conv/kernel', 'resize'\)"):
        jxfer.load(origin, input_shape=(32, 32, 1))
    model = jxfer.load(origin, input_shape=(32, 32, 1), rules=[("stem/conv/kernel", "resize")], dtype="bfloat16")
    kernel = published.stem.conv.kernel[...]
    np.testing.assert_allclose(model.stem.conv.kernel[...], kernel.sum(2, keepdims=True), rtol=1e-5, atol=1e-6)
    assert model.stem.conv.kernel.dtype == np.float32
    assert model.stem.conv.dtype == jnp.bfloat16


def test_parameters_go_where_the_mesh_has_its_shards(resnet):
    origin, published = resnet
    mesh = make_mesh(MeshConfig(fsdp=4))
    model = jxfer.load(origin, mesh=mesh, num_classes=10)
    assert_same(weights(model, but="head/"), weights(published, but="head/"))
    assert {value.sharding.mesh for value in weights_of(model).values()} == {mesh}
    large = model.layer4[0].conv1.kernel[...]
    assert large.sharding.shard_shape(large.shape) != large.shape
    assert model.stem.bn.scale[...].sharding.is_fully_replicated


def test_a_network_of_texts_takes_their_usual_length(tmp_path):
    published = publish(tmp_path, BERT, (128,))
    (tmp_path / "preprocessor_config.json").unlink()
    model = jxfer.load(f"file:{tmp_path}", num_classes=2)
    assert_same(weights(model, but="head/"), weights(published, but="head/"))


def test_weights_alone_need_the_name_of_their_network(resnet, tmp_path):
    _, published = resnet
    size = models.size_of(RESNET)
    naming = namings_of(size)[0]
    write_safetensors(tmp_path / "some.safetensors", export_tensors(weights_of(published), naming, size), {})
    with pytest.raises(InputError, match="does not say of which network it is; give model"):
        jxfer.load(f"file:{tmp_path / 'some.safetensors'}")
    with pytest.raises(InputError, match="a checkpoint of another architecture, it has 4 of the model's"):
        jxfer.load(f"file:{tmp_path / 'some.safetensors'}", model="mobilenet_v2", num_classes=3)
    with pytest.raises(InputError, match=r"some\.safetensors' has no head for `mobilenet_v2`; give num_classes"):
        jxfer.load(f"file:{tmp_path / 'some.safetensors'}", model="mobilenet_v2")
    with pytest.raises(InputError, match=r"gives `stem/bn/bias` the shape \(8,\), the model needs \(64,\)"):
        jxfer.load(f"file:{tmp_path / 'some.safetensors'}", model="resnet18")


def test_a_finished_run_is_loaded_like_published_weights(tmp_path):
    run = ModelConfig("resnet18_32", size=RESNET.size)
    trained = random_model(run, (16, 12, 1))
    metadata = {
        "classes": CLASSES,
        "model": to_dict(run),
        "input_shape": (16, 12, 1),
        "data": to_dict(DataConfig()),
    }
    checkpoint.save_arrays(tmp_path / "checkpoints" / "final", weights(trained), metadata=metadata)
    assert_same(weights(jxfer.load(f"run:{tmp_path}")), weights(trained))
    other = jxfer.load(f"run:{tmp_path}", num_classes=7, dtype="bfloat16")
    assert_same(weights(other, but="head/"), weights(trained, but="head/"))
    assert other.head.kernel.shape == (16, 7)
    assert other.stem.conv.dtype == jnp.bfloat16
    with pytest.raises(InputError, match="no finished run in"):
        jxfer.load(f"run:{tmp_path / 'elsewhere'}")
