"""Google's speech embedding against ONNX Runtime on the published graph, and what it is worth on spoken digits."""

import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from weights import exported, fill

from jxfer.data.audio import AudioShape, decode
from jxfer.models.speech_embedding import CONFIGS, SpeechEmbedding
from jxfer.models.stages import run_stages
from jxfer.weights.names.speech_embedding import NAMINGS

pytestmark = pytest.mark.parity
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

TOLERANCE = 1e-4  # of a whole network in float32
SIZE = CONFIGS["speech_embedding"]
SAMPLES = 12_000
"""0.75 s, longer than 19 of 20 digits."""


@pytest.fixture(scope="module")
def tensors(real_data: Path) -> dict[str, np.ndarray]:
    with np.load(real_data / "weights_google_speech_embedding" / "google_speech_embedding.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def model(tensors: dict[str, np.ndarray]) -> SpeechEmbedding:
    rngs = nnx.Rngs(0)
    network = SpeechEmbedding(SIZE, input_shape=(SAMPLES,), num_classes=10, dtype=jnp.float32, rngs=rngs)
    head = {"head.weight": np.zeros((10, 96), np.float32), "head.bias": np.zeros(10, np.float32)}
    return nnx.view(fill(network, NAMINGS[0], SIZE, tensors | head), use_running_average=True)


def session(graph: list[Any], tensors: Mapping[str, np.ndarray]) -> Any:
    """Rebuilds the ONNX model from its operations, `[kind, inputs, outputs, attributes]`, and its constants."""
    inputs = {name.replace("/", "__"): name for _, names, _, _ in graph for name in names}
    float32 = onnx.TensorProto.FLOAT
    built = onnx.helper.make_graph(
        [onnx.helper.make_node(kind, names, outputs, **attributes) for kind, names, outputs, attributes in graph],
        "speech_embedding",
        [onnx.helper.make_tensor_value_info("input_1", float32, ["B", 76, 32, 1])],
        [onnx.helper.make_tensor_value_info(graph[-1][2][0], float32, None)],
        [onnx.numpy_helper.from_array(array, inputs[name]) for name, array in tensors.items()],
    )
    whole = onnx.helper.make_model(built, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    return onnxruntime.InferenceSession(whole.SerializeToString(), providers=["CPUExecutionProvider"])


def test_windows_give_what_onnx_runtime_gives(real_data, tensors, model):
    folder = real_data / "weights_google_speech_embedding"
    graph = json.loads((folder / "google_speech_embedding_graph.json").read_text())
    windows = np.random.default_rng(0).normal(1, 2, (5, 76, 32, 1)).astype(np.float32)
    expected = session(graph, tensors).run(None, {"input_1": windows})[0].reshape(5, 96)
    x = {"hidden": jnp.asarray(windows), "mask": jnp.ones((5, 1), bool)}
    found = run_stages(model, x, start="stem", stop="head")
    assert np.abs(found - expected).max() < TOLERANCE * np.abs(expected).max()


def test_weights_come_back_under_their_names(tensors, model):
    back = exported(model, NAMINGS[0], SIZE)
    constants = {name for name in tensors if name.startswith(("pad_const", "new_shape", "const_fold"))}
    assert set(back) - {"head.weight", "head.bias"} == set(tensors) - constants
    for name in set(tensors) - constants:
        np.testing.assert_array_equal(back[name], tensors[name])


def test_a_probe_on_the_embedding_knows_spoken_digits(real_data, model, tmp_path):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    with tarfile.open(real_data / "fsdd" / "fsdd_recordings_wav.tar.xz") as tar:
        tar.extractall(tmp_path, filter="data")
    # Of each speaker and digit the official test examples, 0 to 4, and ten others to train on.
    files = [path for path in sorted(tmp_path.rglob("*.wav")) if int(path.stem.split("_")[2]) < 15]
    digits = np.array([int(path.stem.split("_")[0]) for path in files])
    speakers = np.array([path.stem.split("_")[1] for path in files])
    test = np.array([int(path.stem.split("_")[2]) < 5 for path in files])
    audio = np.stack([decode(path, AudioShape(16000, SAMPLES)) for path in files])
    embed = jax.jit(lambda model, x: model.features(x.astype(jnp.float32) / 2**15))
    features = np.concatenate([embed(model, part) for part in np.split(audio, 9)])

    def accuracy(train: np.ndarray, held_out: np.ndarray) -> float:
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        return probe.fit(features[train], digits[train]).score(features[held_out], digits[held_out])

    assert accuracy(~test, test) >= 0.985
    assert accuracy(speakers != "theo", speakers == "theo") >= 0.97
