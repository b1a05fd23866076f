"""Names of recurrent classifiers: those of PyTorch's `nn.LSTM` and `nn.GRU`, and of given word vectors."""

from jxfer.models.rnn import RnnConfig
from jxfer.weights.names.parts import linear
from jxfer.weights.naming import LINEAR, Naming, Rule


def _classifier(size: RnnConfig) -> tuple[Rule, ...]:
    """Names a module with the parts `embedding`, `lstm` or `gru`, and `fc`."""
    embed = Rule("embedding.weight", "embed/embedding")
    return (embed, *_recurrent(size, f"{size.cell}."), *linear("fc", "head"))


def _recurrent_alone(size: RnnConfig) -> tuple[Rule, ...]:
    embed = Rule("embedding.weight", "embed/embedding", optional=True)
    return (embed, *_recurrent(size, ""), *linear("fc", "head", optional=True))


def _vectors(size: RnnConfig) -> tuple[Rule, ...]:
    """Names a table of word vectors, all else being optional."""
    rest = (*_recurrent(size, f"{size.cell}.", optional=True), *linear("fc", "head", optional=True))
    return (Rule("vectors", "embed/embedding"), *rest)


def _recurrent(size: RnnConfig, before: str, *, optional: bool = False) -> tuple[Rule, ...]:
    """Names all layers; gates are stacked in the same order on both sides."""
    rules: tuple[Rule, ...] = ()
    for direction, end in (("forward", ""), ("backward", "_reverse"))[: 2 if size.bidirectional else 1]:
        for theirs, part in (("ih", "input"), ("hh", "hidden")):
            ours = f"layers/{{i}}/{direction}/{part}"
            rules += (
                Rule(f"{before}weight_{theirs}_l{{i}}{end}", f"{ours}/kernel", LINEAR, optional=optional),
                Rule(f"{before}bias_{theirs}_l{{i}}{end}", f"{ours}/bias", optional=optional),
            )
    return rules


NAMINGS = (
    Naming("torch", rules=_classifier),
    Naming("torch_layers", rules=_recurrent_alone),
    Naming("vectors", rules=_vectors),
)
