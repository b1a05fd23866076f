"""What transformers writes to disk: in by one call, in several files or without a head, and out again by our export."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jxfer import models, pretrained
from jxfer.config import DataConfig
from jxfer.export import export
from jxfer.partition import arrays_of, eval_graphdef
from jxfer.source import FinishedRun
from jxfer.weights.names import identify
from jxfer.weights.open import open_published

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4  # of a whole network in float32
CLASSES = ("no", "maybe", "yes")
TOKENS = 12

TEXT = {"vocab_size": 50, "max_position_embeddings": 20}
BERT = {**TEXT, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
DISTIL = {**TEXT, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
PATCHES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "image_size": 32}
VIT = {**PATCHES, "intermediate_size": 24}
DINO = {**PATCHES, "mlp_ratio": 2}
CONVS = {"depths": [1, 1, 2, 1], "hidden_sizes": [8, 12, 16, 24]}

# A family: its config, the part before its classifier's name, and the shape of one input.
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "bert": ("Bert", BERT, (TOKENS,)),
    "roberta": ("Roberta", BERT, (TOKENS,)),
    "distilbert": ("DistilBert", DISTIL, (TOKENS,)),
    "vit": ("ViT", {**VIT, "image_size": [32, 48], "num_channels": 1}, (32, 48, 1)),
    "deit": ("DeiT", VIT, (32, 32, 3)),
    "dinov2": ("Dinov2", DINO, (32, 32, 3)),
    "registers": ("Dinov2WithRegisters", DINO, (32, 32, 3)),
    "convnext": ("ConvNext", {**CONVS, "num_channels": 1}, (64, 40, 1)),
    "resnet": ("ResNet", {**CONVS, "embedding_size": 8, "layer_type": "basic", "num_channels": 1}, (64, 72, 1)),
    "mobilenet": ("MobileNetV2", {"depth_multiplier": 0.35, "num_channels": 1}, (64, 40, 1)),
}


def random_reference(family: str, kind: str) -> Any:
    """Returns a network of transformers with weights and statistics that a mistake would show up in."""
    name, fields, _ = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**fields, num_labels=len(CLASSES))
    reference = getattr(transformers, f"{name}{kind}")(config)
    for path, parameter in reference.named_parameters():
        factor = ("norm" in path.lower() or "scale" in path) and not path.endswith("bias")
        if parameter.ndim == 4:
            torch.nn.init.kaiming_normal_(parameter)
        else:
            torch.nn.init.normal_(parameter, mean=1.0 if factor else 0.0, std=0.2)
    for path, statistic in reference.named_buffers():
        if path.endswith("running_mean"):
            torch.nn.init.uniform_(statistic, -0.2, 0.2)
        elif path.endswith("running_var"):
            torch.nn.init.uniform_(statistic, 0.5, 1.5)
    return reference.eval()


def examples(family: str, pad_id: int | None) -> tuple[jax.Array, dict[str, Any]]:
    """Returns three inputs of ours, texts with padding among them, and the same as transformers takes them."""
    shape, rng = FAMILIES[family][2], np.random.default_rng(0)
    if len(shape) == 1:
        ids = rng.integers(4, 50, (3, *shape)).astype(np.int32)
        ids[1, 5:] = pad_id
        mask = torch.tensor(ids != pad_id).long()
        return jnp.asarray(ids), {"input_ids": torch.tensor(ids).long(), "attention_mask": mask}
    images = rng.normal(size=(3, *shape)).astype(np.float32)
    return jnp.asarray(images), {"pixel_values": torch.tensor(images.transpose(0, 3, 1, 2))}


def assert_near(actual: Any, expected: Any) -> None:
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert np.abs(actual - expected).max() <= TOLERANCE * np.abs(expected).max()


def inference(model: nnx.Module) -> Any:
    return nnx.merge(eval_graphdef(model), nnx.state(model))


def classifier_of(family: str) -> str:
    return "ForSequenceClassification" if FAMILIES[family][2] == (TOKENS,) else "ForImageClassification"


def written_again(model: nnx.Module, origin: str, family: str, folder: Path) -> Path:
    """Writes a loaded model as the export of a run writes it."""
    arrays = {path: value for path, value in arrays_of(model).items() if path.rsplit("/", 1)[-1] != "key"}
    config, shape = identify(open_published(origin).config), FAMILIES[family][2]
    kind = models.reads(config)
    run = FinishedRun({p: np.asarray(v) for p, v in arrays.items()}, config, CLASSES, kind, shape, DataConfig(), folder)
    names = {"deit": "transformers-deit", "dinov2": "transformers-dinov2", "registers": "transformers-dinov2"}
    export(run, folder, names=names.get(family, "transformers"))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_classifier_comes_in_by_one_call_and_goes_out_by_one(family, tmp_path):
    reference = random_reference(family, classifier_of(family))
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="12KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists(), "in several files"
    origin = f"file:{tmp_path / 'theirs'}"
    model = pretrained.load(origin, input_shape=FAMILIES[family][2])
    ours, theirs = examples(family, getattr(reference.config, "pad_token_id", None))
    with torch.no_grad():
        expected = reference(**theirs).logits.numpy()
    assert np.ptp(expected, axis=0).max() > 0.01 * np.abs(expected).max(), "they depend on the input"
    assert_near(nnx.jit(lambda model, x: model(x))(inference(model), ours), expected)
    again, report = type(reference).from_pretrained(
        written_again(model, origin, family, tmp_path / "ours"), output_loading_info=True
    )
    assert not {name for name in report["missing_keys"] if not name.endswith("mask_token")}  # only training masks
    assert not report["unexpected_keys"]
    with torch.no_grad():
        assert_near(again.eval()(**theirs).logits.numpy(), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_saved_without_a_head_has_the_same_hidden_states(family, tmp_path):
    reference = random_reference(family, "Model")
    reference.save_pretrained(tmp_path)
    model = pretrained.load(f"file:{tmp_path}", num_classes=2, input_shape=FAMILIES[family][2])
    ours, theirs = examples(family, getattr(reference.config, "pad_token_id", None))
    with torch.no_grad():
        outputs = reference(**theirs)
    if "hidden_sizes" in FAMILIES[family][1] or family == "mobilenet":  # convolutions: what a head would see
        found = nnx.jit(lambda model, x: model.features(x))(inference(model), ours)
        assert_near(found, outputs.pooler_output.numpy().reshape(found.shape))
        return
    found = nnx.jit(lambda model, x: models.run_stages(model, x, stop="pool"))(inference(model), ours)
    expected = outputs.last_hidden_state.numpy()
    if family in ("bert", "roberta", "distilbert"):
        real = np.asarray(found["mask"])
        found, expected = np.asarray(found["hidden"])[real], expected[real]
    assert_near(found, expected)
