"""The frozen boundary for every model kind and rule, and training on stored features equal to training online."""

import contextlib
import dataclasses
import functools
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
import tiny
from flax import nnx

from jxfer import data, models, store
from jxfer.checks import check
from jxfer.chunks import SUFFIX, open_chunk
from jxfer.config import AugmentConfig, DataConfig, Experiment, MeshConfig, Method, ModelConfig, Phase, TrainConfig
from jxfer.data import augment
from jxfer.data.pipeline import batch_indices
from jxfer.extract import make_feature_step
from jxfer.features import Extractor, stored_splits
from jxfer.models.alexnet import AlexNetConfig
from jxfer.models.audio_cnn import AudioCnnConfig
from jxfer.models.bert import BertConfig
from jxfer.models.convnext import ConvNeXtConfig
from jxfer.models.mobilenet import MobileNetV2Config
from jxfer.models.rnn import RnnConfig
from jxfer.models.speech_embedding import SpeechEmbeddingConfig
from jxfer.models.squeezenet import SqueezeNetConfig
from jxfer.models.stages import run_stages, stage_of
from jxfer.models.vgg import VGGConfig
from jxfer.models.vit import ViTConfig
from jxfer.partition import Partition, arrays_of, frozen_boundary
from jxfer.plan import PlannedPhase, phase_steps, plan_phases, prepare_images, start_phase
from jxfer.sharding import make_mesh, put_batch
from jxfer.state import merge_state
from jxfer.typing import InputError, InterruptedRun

OTHERS = {
    "alexnet": AlexNetConfig(widths=(4, 5, 6, 7, 8), hidden_dim=10),
    "vit": ViTConfig(4, 8, 2, 2, 16),
    "vit_scan": ViTConfig(4, 8, 3, 2, 16, scan=True),
    "bert": BertConfig(8, 2, 2, 16, vocab_size=20, max_positions=12),
    "rnn": RnnConfig(vocab_size=20, embedding_dim=4, hidden_dim=3, num_layers=2),
    "audio_cnn": AudioCnnConfig(num_mels=16, widths=(4, 4, 6)),
    "vgg": VGGConfig((1, 1, 1, 1, 1), batch_norm=True, widths=(4, 4, 5, 5, 6), hidden_dim=8),
    "squeezenet": SqueezeNetConfig(6, squeezed=(2,) * 8, expanded=(3,) * 8),
    "mobilenet": MobileNetV2Config(width=0.1),
    "convnext": ConvNeXtConfig((1, 1, 2, 1), widths=(4, 5, 6, 7), layer_scale=0.1, drop_path=0.2),
    "speech": SpeechEmbeddingConfig(widths=(4, 4, 5, 5, 6)),
}
"""More kinds of models, some of which read something else or hand several arrays from stage to stage."""

SHAPES = {"image": tiny.IMAGE_SHAPE, "text": (12,), "audio": (4000,), "alexnet": (63, 63, 1)}
SHAPES |= dict.fromkeys(("vgg", "squeezenet", "mobilenet", "convnext"), (32, 32, 1))


@pytest.fixture(autouse=True)
def _tiny_models_and_a_store_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "_CONFIGS", {**tiny.CONFIGS, **OTHERS})
    monkeypatch.setenv("JXFER_CACHE", str(tmp_path))


@functools.cache
def abstract(name: str) -> nnx.Module:
    return nnx.eval_shape(lambda: tiny.build(name))


def boundary(name: str, *patterns: str) -> str | None:
    """Returns the boundary where what the patterns match trains and the rest is frozen."""
    model = abstract(name)
    rules = [(pattern, "moving") for pattern in patterns] + ([] if "**" in patterns else [("**", "frozen")])
    return frozen_boundary(Partition.of(model, rules), model.stages)


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_the_boundary_is_the_first_stage_that_moves(name):
    last = tiny.LAST_STAGE[name]
    assert boundary(name, "head/**") == "head"
    assert boundary(name, "head/**", f"{last}/**") == last
    assert boundary(name, f"{last}/**") == last, "a frozen head behind what moves"
    assert boundary(name, "**/bn/scale" if name.startswith("convnet") else "layer1/**/bn1/scale") == (
        None if name.startswith("convnet") else "layer1"
    )
    assert boundary(name, "stem/bn/scale") is None, "one norm in the first stage"
    assert boundary(name, "head/**", "stem/bn/*") is None
    assert boundary(name, "**") is None
    assert boundary(name) is None, "nothing moves, so there is nothing to store for"


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_nothing_before_the_boundary_moves_for_any_choice_of_stages(name):
    model = abstract(name)
    with_parameters = [stage for stage in model.stages if any(p.startswith(stage + "/") for p in arrays_of(model))]
    for count in range(1, len(with_parameters)):
        for chosen in itertools.combinations(with_parameters, count):
            expected = None if "stem" in chosen else chosen[0]
            assert boundary(name, *(f"{stage}/**" for stage in chosen)) == expected


def test_dropout_is_random_where_any_of_its_layer_trains():
    assert boundary("convnet_dropout", "layer1/bn/bias") == "layer1"
    assert boundary("convnet_dropout", "layer2/conv/kernel", "head/**") == "layer2"
    assert boundary("convnet_dropout", "head/**") == "head", "frozen layers drop nothing out"


class DropBetween(nnx.Module):
    """A stage without parameters that is random."""

    def __init__(self, rngs: nnx.Rngs):
        self.stages = ("body", "drop", "top", "head")
        self.body = nnx.Linear(3, 4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.top = nnx.Linear(4, 4, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)


def test_a_random_stage_without_parameters_ends_the_frozen_prefix():
    model = DropBetween(nnx.Rngs(0))
    partition = Partition.of(model, [("head/**", "head"), ("**", "frozen")])
    assert frozen_boundary(partition, model.stages) == "drop"


class Shared(nnx.Module):
    """A trainable parameter that no stage owns."""

    def __init__(self, rngs: nnx.Rngs):
        self.stages = ("body", "head")
        self.scale = nnx.Param(rngs.params.normal((3,)))
        self.body = nnx.Linear(3, 4, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)


def test_what_moves_outside_all_stages_leaves_nothing_to_store():
    model = Shared(nnx.Rngs(0))
    rules = [("head/**", "head"), ("scale", "scale"), ("**", "frozen")]
    assert frozen_boundary(Partition.of(model, rules), model.stages) is None


def test_a_model_without_stages_has_no_boundary():
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    assert frozen_boundary(Partition.of(model, [("kernel", "head"), ("**", "frozen")]), ()) is None


def shape_of(name: str) -> tuple[int, ...]:
    return SHAPES.get(name) or SHAPES[models.reads(ModelConfig(name))]


def build(name: str) -> nnx.Module:
    return models.build(ModelConfig(name), num_classes=3, input_shape=shape_of(name), rngs=nnx.Rngs(0))


def make_split(name: str, num_examples: int = 13) -> data.ArraySplit:
    """Returns examples of what a model reads."""
    split, kind = tiny.make_split(num_examples), models.reads(ModelConfig(name))
    rng, shape = np.random.default_rng(0), (num_examples, *shape_of(name))
    if kind == "text":
        tokens = rng.integers(1, 20, shape) * (np.arange(shape[1]) < rng.integers(3, 13, (num_examples, 1)))
        return dataclasses.replace(split, arrays={"text": tokens.astype(np.int32)})
    if kind == "audio":
        return dataclasses.replace(split, arrays={"audio": rng.integers(-9999, 9999, shape).astype(np.int16)})
    return dataclasses.replace(split, arrays={"image": rng.integers(0, 256, shape).astype(np.uint8)})


def phase_of(name: str, first: str, *, model: nnx.Module, **settings):
    """Returns what trains the stages from `first` on: experiment, method, planned phase."""
    moving = model.stages[model.stages.index(first) :]
    rules = [(f"{s}/**", "moving") for s in moving if any(stage_of(p, (s,)) for p in arrays_of(model))]
    if not all(stage_of(path, moving) for path in arrays_of(model)):
        rules.append(("**", "frozen"))
    method = Method("some", rules=tuple(rules), phases=(Phase("train", train=("moving",)),))
    train = TrainConfig(num_steps=3, batch_size=6, learning_rate=0.01, clip_norm=1.0, schedule="constant")
    experiment = Experiment("test", model=ModelConfig(name), train=train, **settings)
    (planned,) = plan_phases(experiment, method, model)
    return experiment, method, planned


def extractor_of(experiment: Experiment, method: Method, planned: PlannedPhase, model: nnx.Module, **changes):
    """Returns what makes the features of a phase, on one device; `changes` are of its fields."""
    state, fixed = start_phase(experiment, method, planned, model, key=jax.random.key(1))
    dataset = data.Dataset("tiny", "1", tuple("abc"), {"train": tiny.make_split(13)}, tiny.IMAGE_SHAPE)
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    values = {"session": runs.QUIET, "title": "test", "batch_size": 8} | changes
    return Extractor(experiment, dataset, planned.boundary, state, fixed, mesh, **values)


def train_phase(name: str, first: str, *, features: str):
    """Trains three steps and returns the evaluated logits, what moved, and the metrics of each step."""
    model = build(name)
    experiment, method, planned = phase_of(name, first, features=features, model=model)
    assert planned.stored == (features == "auto")
    assert planned.boundary == first
    extractor = extractor_of(experiment, method, planned, model)
    state, fixed, mesh = extractor.state, extractor.fixed, extractor.mesh
    split = make_split(name)
    if planned.stored:
        split, _, _ = stored_splits(extractor, split, split, num_steps=3)
    train_step, eval_step = phase_steps(experiment, method, planned, 3)
    history = []
    for batch in itertools.islice(data.batches(split, batch_size=6, seed=0), 3):
        state, metrics = train_step(state, fixed, put_batch(batch, mesh))
        history.append(jax.device_get(metrics))
    batch = next(data.eval_batches(split, batch_size=16))
    _, logits = eval_step(state, fixed, put_batch(batch, mesh))
    return logits, {**state.params, **state.variables}, history


QUICK = [("convnet_dropout", "layer2"), ("resnet20", "head"), ("bert", "blocks/1")]
ALL = [
    *itertools.product(("convnet", "convnet_dropout"), ("layer1", "layer2", "head")),
    *itertools.product(("resnet20",), ("layer1", "layer2", "layer3", "head")),
    *itertools.product(("resnet18_32",), ("layer1", "layer2", "layer3", "layer4", "head")),
    *itertools.product(("alexnet",), ("conv2", "conv3", "conv4", "conv5", "hidden1", "hidden2", "head")),
    *itertools.product(("vit",), ("blocks/0", "blocks/1", "norm", "head")),
    *itertools.product(("vit_scan",), ("blocks/0", "blocks/1", "blocks/2", "norm", "head")),
    *itertools.product(("bert",), ("blocks/0", "blocks/1", "head")),
    *itertools.product(("rnn",), ("layers/0", "layers/1", "head")),
    *itertools.product(("audio_cnn",), ("layer1", "layer2", "layer3", "head")),
    *itertools.product(("vgg",), ("layer2", "layer3", "layer4", "layer5", "hidden1", "hidden2", "head")),
    *itertools.product(("squeezenet",), ("layer1", "layer2", "layer3", "head")),
    *itertools.product(("mobilenet",), (*(f"layer{number}" for number in range(1, 8)), "top", "head")),
    *itertools.product(("convnext",), ("layer1", "layer2", "layer3", "layer4", "norm", "head")),
    *itertools.product(("speech",), ("stem", *(f"layer{number}" for number in range(1, 6)), "embed", "head")),
]
CUTS = [*QUICK, *(pytest.param(*cut, marks=pytest.mark.slow) for cut in ALL if cut not in QUICK)]


@pytest.mark.parametrize("name", [*tiny.CONFIGS, *OTHERS])
def test_every_boundary_of_every_kind_is_among_the_cuts(name):
    model = nnx.eval_shape(lambda: build(name))
    parts = {stage for stage in model.stages[1:] if any(stage_of(path, (stage,)) for path in arrays_of(model))}
    assert {first for kind, first in ALL if kind == name} == parts


def assert_equal_training(name: str, first: str) -> None:
    logits, moved, history = train_phase(name, first, features="auto")
    online_logits, online_moved, online_history = train_phase(name, first, features="off")
    # float32: the same operations in two programs, which XLA may fuse differently.
    np.testing.assert_allclose(logits, online_logits, rtol=1e-5, atol=1e-5 * float(np.abs(online_logits).max()))
    for step, (one, other) in enumerate(zip(history, online_history, strict=True)):
        for key in other:
            np.testing.assert_allclose(one[key], other[key], rtol=1e-4, err_msg=f"{key} of step {step + 1}")
    for path, value in online_moved.items():
        if jax.numpy.issubdtype(value.dtype, jax.numpy.floating):
            np.testing.assert_allclose(moved[path], value, rtol=1e-3, atol=1e-5, err_msg=path)
        else:
            assert path in moved


@pytest.mark.parametrize(("name", "first"), CUTS)
def test_training_on_stored_features_equals_training_online(name, first):
    assert_equal_training(name, first)


def prepared(experiment: Experiment, images: np.ndarray) -> jax.Array:
    batch = {"image": jax.numpy.asarray(images)}
    return prepare_images(experiment, 3, train=False)(jax.random.key(0), batch)["image"]


def run_prefix(extractor: Extractor, images: jax.Array) -> np.ndarray:
    """Runs the frozen stages without jit or store."""
    definition, arrays = extractor.fixed.definition, merge_state(extractor.state, extractor.fixed)
    whole = definition.partition.assemble(definition.eval_graphdef, arrays)
    return np.asarray(run_stages(whole, images, stop=extractor.boundary))


def test_features_are_those_of_each_example_in_order():
    model = tiny.build("convnet_dropout")
    experiment, method, planned = phase_of("convnet_dropout", "layer2", model=model)
    extractor = extractor_of(experiment, method, planned, model)
    examples = tiny.make_split(16)
    train, validation = data.Subset(examples, np.arange(13)), data.Subset(examples, np.array([15, 3, 14]))
    stored, checked, took = stored_splits(extractor, train, validation, num_steps=3)
    expected = run_prefix(extractor, prepared(experiment, examples.arrays["image"][:13]))
    np.testing.assert_allclose(stored.arrays["features"], expected, rtol=1e-4, atol=1e-6)
    expected = run_prefix(extractor, prepared(experiment, examples.arrays["image"][[15, 3, 14]]))
    np.testing.assert_allclose(checked.arrays["features"], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(stored.labels, train.labels)
    np.testing.assert_array_equal(checked.ids, validation.ids)
    assert set(stored.arrays) == {"features"}, "the images are not kept"
    assert (took.examples, took.bytes) == (16, 16 * expected[0].nbytes)
    assert took.computed == 15, "one example is in both splits"


@functools.cache
def probe(name: str = "convnet", first: str = "head", **settings):
    """Returns the phase that trains a head, and its model."""
    model = tiny.build(name)
    return *phase_of(name, first, model=model, **settings), model


def test_runs_compute_what_is_missing_and_share_the_rest():
    examples = tiny.make_split(40)
    splits = [data.Subset(examples, np.arange(*bounds)) for bounds in ((0, 10), (10, 14), (5, 20), (12, 18))]
    stored, _, first = stored_splits(extractor_of(*probe()), *splits[:2], num_steps=3)
    assert (first.examples, first.computed, first.views, first.boundary) == (14, 14, 1, "head")
    again, _, second = stored_splits(extractor_of(*probe()), *splits[:2], num_steps=3)
    assert second == dataclasses.replace(first, computed=0), "what it costs does not depend on who computed it"
    assert again.arrays["features"].tobytes() == stored.arrays["features"].tobytes()
    more, _, third = stored_splits(extractor_of(*probe()), *splits[2:], num_steps=3)
    assert (third.examples, third.computed) == (21, 6)
    assert third.flops == first.flops / 10 * 15
    assert more.arrays["features"][:5].tobytes() == stored.arrays["features"][5:].tobytes()


def test_every_field_of_the_key_counts():
    experiment, *_ = probe()
    base = extractor_of(*probe()).fields()

    def changed(**changes) -> set[str]:
        other = dataclasses.replace(extractor_of(*probe()), **changes)
        fields = other.fields()
        assert fields.keys() == base.keys()
        return {name for name in fields if fields[name] != base[name]}

    def target(**values) -> Experiment:
        return dataclasses.replace(experiment, target=dataclasses.replace(experiment.target, **values))

    def of_model(**values) -> Experiment:
        return dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, **values))

    dataset = extractor_of(*probe()).dataset
    for name, value in {
        "image_size": 8, "channels": 1, "crop_fraction": 0.9, "resample": "bicubic", "mean": (0.4,), "std": (0.2,),
        "channel_order": "bgr", "tokenizer": "words:9", "max_tokens": 5, "sample_rate": 8000, "seconds": 1.0,
    }.items():  # fmt: skip
        assert changed(experiment=target(**{name: value})) == {name}
    assert changed(experiment=target(name="folder:elsewhere")) == {"data place"}
    assert changed(dataset=dataclasses.replace(dataset, version="2")) == {"data version"}
    assert changed(dataset=dataclasses.replace(dataset, name="other")) == {"data"}
    assert changed(experiment=of_model(dtype="bfloat16")) == {"dtype"}
    assert changed(experiment=of_model(size=(("widths", "4,6,9"),))) == {"size"}
    assert changed(boundary="layer2") == {"boundary", "weights"}, "layer2 does not count before itself"
    assert changed(experiment=target(test_fraction=0.1, validation_fraction=0.2)) == set(), "rows go by example"
    assert changed(experiment=dataclasses.replace(experiment, seeds=9, shots=(3,))) == set()
    kept = set(extractor_of(*probe()).fields()) - {"format", "code", "jax", "backend", "augment", "mode", "tokens"}
    assert kept >= {"weights", "model", "text_columns"}


def test_the_weights_of_the_key_are_those_before_the_boundary():
    experiment, method, planned, model = probe("resnet20", "layer3")
    before = extractor_of(*probe("resnet20", "layer3"))
    hashed = before.fields()["weights"]
    for path, counts in {"layer2/0/conv1/kernel": True, "stem/bn/mean": True, "layer3/0/conv1/kernel": False}.items():
        arrays = arrays_of(model)
        arrays[path] = arrays[path] + 1e-3
        other = planned.partition.assemble(nnx.graphdef(model), arrays)
        assert (extractor_of(experiment, method, planned, other).fields()["weights"] != hashed) == counts, path


def test_texts_count_as_tokens_whatever_the_tokeniser_is_called():
    tokens = np.arange(12, dtype=np.int32).reshape(3, 4)

    def fields(tokens: np.ndarray) -> dict:
        split = data.ArraySplit(np.array(list("xyz")), np.arange(3, dtype=np.int32), {"text": tokens})
        dataset = data.Dataset("texts", "1", tuple("abc"), {"train": split}, (4,), input="text")
        return dataclasses.replace(extractor_of(*probe()), dataset=dataset).fields()

    assert fields(tokens) == fields(tokens.copy())
    assert fields(tokens)["tokens"] != fields(tokens + 1)["tokens"]


def test_a_damaged_row_is_computed_anew_and_no_other():
    split, notes = tiny.make_split(30), []
    stored, _, _ = stored_splits(extractor_of(*probe()), split, split, num_steps=3)
    (file,) = store.root().rglob(f"*{SUFFIX}")
    content = file.read_bytes()
    place = content.index(stored.arrays["features"][7].tobytes())
    file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    open_chunk.cache_clear()
    session = dataclasses.replace(runs.QUIET, note=notes.append)
    again, _, took = stored_splits(extractor_of(*probe(), session=session), split, split, num_steps=3)
    assert took.computed == 1
    assert "features of 'train/00007'" in notes[0]
    assert again.arrays["features"].tobytes() == stored.arrays["features"].tobytes()


def test_features_larger_than_memory_are_read_as_they_are_asked_for(monkeypatch):
    split = tiny.make_split(30)
    whole, _, _ = stored_splits(extractor_of(*probe()), split, split, num_steps=3)
    monkeypatch.setattr("jxfer.features.MEMORY_BYTES", 100)
    lazy, checked, took = stored_splits(extractor_of(*probe()), split, split, num_steps=3)
    assert took.computed == 0
    assert not isinstance(lazy, data.ArraySplit)
    for one, other in zip(
        data.eval_batches(checked, batch_size=7), data.eval_batches(whole, batch_size=7), strict=True
    ):
        np.testing.assert_array_equal(one["features"], other["features"])
    streams = [itertools.islice(data.batches(each, batch_size=8, seed=1), 9) for each in (lazy, whole)]
    for one, other in zip(*streams, strict=True):
        assert all((one[name] == other[name]).all() for name in other)
    (known,) = store.list_keys()
    assert not store.remove(known.key), "in use"
    file = next(store.root().rglob(f"*{SUFFIX}"))
    file.write_bytes(bytes(file.stat().st_size))
    for _ in range(2):
        with pytest.raises(InputError, match="damaged while a run used them; start it again"):
            lazy.read(np.arange(3))


def test_stopped_in_the_middle_what_was_computed_stays(monkeypatch):
    monkeypatch.setattr("jxfer.extract.CHUNK_SECS", 0.0)
    split = tiny.make_split(40)
    with pytest.raises(InterruptedRun, match="features of 24 of 40 examples"):
        stored_splits(extractor_of(*probe(), session=runs.stop_after(2)), split, split, num_steps=3)
    _, _, took = stored_splits(extractor_of(*probe()), split, split, num_steps=3)
    assert (took.examples, took.computed) == (80, 16)


def test_rows_that_another_worker_computes_are_waited_for_and_read():
    split = tiny.make_split(20)
    _, _, took = stored_splits(extractor_of(*probe()), split, split, num_steps=3)
    (known,) = store.list_keys()
    opened = store.open_store(known.fields, lambda: pytest.fail("it is known"))
    (chunk,) = store.root().rglob(f"*{SUFFIX}")
    hidden = chunk.rename(chunk.with_suffix(".hidden"))
    other = contextlib.ExitStack()
    other.enter_context(opened.alone(lambda holder: pytest.fail("nobody else has it")))
    stop = [True]

    def progress(what: str, done: int, total: int) -> None:
        assert "features before head: waiting for" in what
        hidden.rename(chunk)
        other.close()

    session = runs.Session(progress=progress, should_stop=lambda: bool(stop))
    with pytest.raises(InterruptedRun, match=f"waiting for features from .*, pid {os.getpid()}"):
        stored_splits(extractor_of(*probe(), session=session), split, split, num_steps=3)
    stop.clear()
    _, _, again = stored_splits(extractor_of(*probe(), session=session), split, split, num_steps=3)
    assert (took.computed, again.computed, again.examples) == (20, 0, 40)


KILLED = """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    import runs, test_features, tiny
    from jxfer import extract, models
    models._CONFIGS = tiny.CONFIGS
    extract.CHUNK_SECS = 0.0
    seen = []
    def progress(what, done, total):
        seen.append(done)
        if len(seen) == {kill_after}:
            os.kill(os.getpid(), signal.SIGKILL)
    session = runs.Session(progress=progress, should_stop=lambda: False)
    split = tiny.make_split(40)
    extractor = test_features.extractor_of(*test_features.probe(), session=session)
    print(test_features.stored_splits(extractor, split, split, num_steps=3)[2].computed)
"""


def test_killed_in_the_middle_what_was_computed_stays():
    # Both in processes of their own: here other tests may have compiled the making of the weights otherwise.
    def child(kill_after: int) -> subprocess.CompletedProcess:
        code = textwrap.dedent(KILLED).format(tests=str(Path(__file__).parent), kill_after=kill_after)
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert child(3).returncode == -signal.SIGKILL
    again = child(0)
    assert again.stdout == "16\n", again.stderr


def test_more_than_the_limit_is_refused_before_anything_is_computed(monkeypatch):
    monkeypatch.setenv(store.LIMIT, "1e-9")
    split = tiny.make_split(13)
    with pytest.raises(InputError, match=r"features are to be stored, .* raise it, or set features=off"):
        stored_splits(extractor_of(*probe()), split, split, num_steps=3)
    assert not list(store.root().rglob(f"*{SUFFIX}"))


AUGMENTED = DataConfig(augment=AugmentConfig(crop_padding=1, flip=True, brightness=0.2))


def view_of(image: np.ndarray, name: str, view: int) -> jax.Array:
    """Returns one example as a view of it is prepared, [1 H W C]."""
    key = jax.random.fold_in(jax.random.key(data.VIEW_SEED), zlib.crc32(name.encode()))
    changed = augment._change(jax.random.fold_in(key, view), jax.numpy.asarray(image) / 255, AUGMENTED.augment)
    return augment.normalise(changed[None], AUGMENTED)


def test_views_are_the_features_of_augmented_images_and_epochs_take_turns():
    experiment, method, planned, model = probe("convnet", "layer2", views=3, target=AUGMENTED)
    assert planned.stored
    assert "views=3" in planned.why
    split, checked = tiny.make_split(6), tiny.make_split(4, seed=1)
    extractor = extractor_of(experiment, method, planned, model)
    stored, validation, took = stored_splits(extractor, split, checked, num_steps=12)
    assert (len(stored), took.views, took.examples, took.computed) == (6, 3, 22, 22)
    for epoch, batch in enumerate(itertools.islice(data.batches(stored, batch_size=6, seed=5), 5)):
        order = batch_indices(num_examples=6, batch_size=6, seed=5, batch=epoch)
        np.testing.assert_array_equal(batch["label"], split.labels[order])
        names, images = split.ids[order].tolist(), split.arrays["image"][order]
        views = [view_of(image, name, epoch % 3) for image, name in zip(images, names, strict=True)]
        expected = run_prefix(extractor, jax.numpy.concatenate(views))
        np.testing.assert_allclose(batch["features"], expected, rtol=1e-4, atol=1e-6)
    plain = run_prefix(extractor, prepared(experiment, checked.arrays["image"]))
    np.testing.assert_allclose(validation.arrays["features"], plain, rtol=1e-4, atol=1e-6, err_msg="never augmented")


def test_no_more_views_are_stored_than_there_are_epochs_and_more_views_share_the_first():
    split = tiny.make_split(6)
    phase = functools.partial(probe, "convnet", "layer2", target=AUGMENTED)
    _, _, took = stored_splits(extractor_of(*phase(views=8)), split, split, num_steps=2)
    assert (took.views, took.computed) == (2, 18), "2 steps of 6, and once without augmentation"
    _, _, took = stored_splits(extractor_of(*phase(views=3)), split, split, num_steps=12)
    assert (took.views, took.computed) == (3, 6)


def test_batches_that_cross_into_the_next_epoch_read_both_views():
    base = data.ArraySplit(np.array(list("abcabc")), np.arange(6, dtype=np.int32) % 3, {"features": np.arange(6)})
    stream = data.batches(data.Views(base, 2), batch_size=2, seed=0)
    seen = np.concatenate([batch["features"] for batch in itertools.islice(stream, 6)]).reshape(4, 3)
    assert [sorted(epoch) for epoch in seen.tolist()] == [[0, 1, 2], [3, 4, 5], [0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": DataConfig()}, "no image changes"),
        ({"target": AUGMENTED, "features": "off"}, "features=off stores none"),
        ({"target": DataConfig(augment=AugmentConfig(mixup=0.2))}, "mixup mixes the examples of each batch"),
        ({"target": AUGMENTED, "views": 0}, "at least 1"),
    ],
)
def test_views_that_cannot_be_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        check(Experiment("test", **{"views": 2} | settings))


def test_equal_phases_share_their_steps():
    model = tiny.build("convnet")
    experiment, method, planned = phase_of("convnet", "head", model=model)
    other = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, learning_rate=1.0))
    assert phase_steps(experiment, method, planned, 3) == phase_steps(other, method, planned, 3)
    prepare = prepare_images(experiment, 3, train=False)
    again = prepare_images(other, 3, train=False)
    assert make_feature_step(prepare, stop="head") is make_feature_step(again, stop="head")
