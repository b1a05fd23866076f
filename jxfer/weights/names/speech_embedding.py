"""Names of Google's speech embedding as an export to ONNX left them, with `__` for `/`, in an npz file."""

from collections.abc import Iterator

from jxfer.models.speech_embedding import LAYERS, SpeechEmbeddingConfig
from jxfer.weights.names.parts import linear
from jxfer.weights.naming import CONV, Naming, Rule

_STEM = "model__conv2d__StatefulPartitionedCall__StatefulPartitionedCall__Conv2D__ReadVariableOp:0"
_NORM = "model__batch_normalization__"
_STEM_NORM = {
    "ReadVariableOp:0": "scale",
    "ReadVariableOp_1:0": "bias",
    "FusedBatchNormV3__ReadVariableOp:0": "mean",
    "FusedBatchNormV3__ReadVariableOp_1:0": "var",
}


def _rules(config: SpeechEmbeddingConfig) -> tuple[Rule, ...]:
    stem = (Rule(_STEM, "stem/conv/kernel", CONV), *_stem_norm())
    embed = Rule("model__conv2d_19__Conv2D__ReadVariableOp:0", "embed/conv/kernel", CONV)
    return (*stem, *_convolutions(), embed, *linear("head", "head", optional=True))


def _stem_norm() -> Iterator[Rule]:
    return (Rule(f"{_NORM}{theirs}", f"stem/bn/{ours}") for theirs, ours in _STEM_NORM.items())


def _convolutions() -> Iterator[Rule]:
    """Names the convolutions of the layers, which are numbered through; batch norms are folded into them."""
    number = 0
    for layer, (num_pairs, _) in enumerate(LAYERS, start=1):
        for pair in range(num_pairs):
            for part in ("mels", "time"):
                number += 1
                theirs, ours = f"model__conv2d_{number}__Conv2D", f"layer{layer}/pairs/{pair}/{part}"
                yield Rule(f"{theirs}_weights_fused_bn", f"{ours}/kernel", CONV)
                yield Rule(f"{theirs}_bias_fused_bn", f"{ours}/bias")


NAMINGS = (
    Naming(
        "google",
        rules=_rules,
        ignored=("pad_const__*", "new_shape__*", "const_fold_opt__*"),  # constants of the graph
        preprocessing={"sample_rate": 16000},
    ),
)
