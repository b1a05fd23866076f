"""Finished runs in somebody else's hands: transformers loads what `jxfer export` writes and says the same."""

import numpy as np
import pytest
from flax import nnx

from jxfer import models
from jxfer.config import DataConfig, ModelConfig
from jxfer.export import export
from jxfer.partition import arrays_of
from jxfer.predict import classifier
from jxfer.source import FinishedRun
from jxfer.weights.load import weights_of

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CLASSES = ("ant", "bee", "wasp")

NARROW = (("hidden_dim", "32"), ("num_layers", "2"), ("num_heads", "4"), ("mlp_dim", "48"))
TEXT = (*NARROW, ("vocab_size", "99"), ("max_positions", "40"), ("dropout", "0.1"), ("pooling", "pooler"))

CASES = {
    "bert_tiny": (TEXT, (12,), "text", "AutoModelForSequenceClassification"),
    "roberta_base": (TEXT, (12,), "text", "AutoModelForSequenceClassification"),
    "distilbert_base": (TEXT, (12,), "text", "AutoModelForSequenceClassification"),
    "vit_ti_16": ((*NARROW, ("patch_size", "8")), (32, 32, 3), "image", "AutoModelForImageClassification"),
    "resnet18": ((("widths", "8,12,16,24"),), (64, 64, 3), "image", "AutoModelForImageClassification"),
    "convnext_tiny": (
        (("num_blocks", "1,1,2,1"), ("widths", "8,12,16,24")),
        (64, 64, 3),
        "image",
        "AutoModelForImageClassification",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_transformers_says_what_we_say(name, tmp_path):
    size, input_shape, kind, auto = CASES[name]
    config = ModelConfig(name, size=size)
    model = models.build(config, num_classes=3, input_shape=input_shape, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    counters = {path: np.asarray(value) for path, value in arrays_of(model).items() if path.endswith("rngs/count")}
    assert bool(counters) == (kind == "text"), "a run keeps those of dropout"
    arrays = counters | {
        path: np.asarray(value + 0.1 * rng.uniform(size=value.shape), np.float32)
        for path, value in weights_of(model).items()
    }
    run = FinishedRun(arrays, config, CLASSES, kind, input_shape, DataConfig(mean=(0.4,), std=(0.3,)), tmp_path)
    export(run, tmp_path / "export", names="transformers")
    theirs, report = getattr(transformers, auto).from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert tuple(theirs.config.id2label.values()) == CLASSES
    if kind == "text":
        examples = rng.integers(5, 99, (4, *input_shape)).astype(np.int32)
        pad = theirs.config.pad_token_id
        examples[1, 7:] = pad
        inputs = {"input_ids": torch.tensor(examples), "attention_mask": torch.tensor(examples != pad)}
    else:
        examples = rng.integers(0, 256, (4, *input_shape)).astype(np.uint8)
        pixels = (examples.astype(np.float32) / 255 - 0.4) / 0.3
        inputs = {"pixel_values": torch.tensor(pixels.transpose(0, 3, 1, 2))}
    with torch.no_grad():
        expected = theirs.eval()(**inputs).logits.numpy()
    logits = classifier(run)(examples)
    assert np.ptp(expected, axis=0).min() > 0, "the logits depend on the input"
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
