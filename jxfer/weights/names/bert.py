"""The names under which transformers publishes BERT, MiniLM, DistilBERT and RoBERTa."""

import functools
from collections.abc import Mapping
from typing import Any

from jxfer.models.bert import CONFIGS, BertConfig
from jxfer.typing import InputError
from jxfer.weights.names.parts import labels, linear, nearest, norm
from jxfer.weights.naming import Naming, Rule

_BERT_BLOCK = {
    "attention.self.query": "attention/query",
    "attention.self.key": "attention/key",
    "attention.self.value": "attention/value",
    "attention.output.dense": "attention/out",
    "intermediate.dense": "mlp/up",
    "output.dense": "mlp/down",
}
_DISTILBERT_BLOCK = {
    "attention.q_lin": "attention/query",
    "attention.k_lin": "attention/key",
    "attention.v_lin": "attention/value",
    "attention.out_lin": "attention/out",
    "ffn.lin1": "mlp/up",
    "ffn.lin2": "mlp/down",
}


def _rules(size: BertConfig, *, prefix: bool) -> tuple[Rule, ...]:
    """Returns the rules of a model with a head, whose encoder is called by its family, or of an encoder alone."""
    family = _family(size)
    before = f"{family}." if prefix else ""
    encoder = _distilbert_blocks(before) if family == "distilbert" else _bert_blocks(before)
    tables = [("word_embeddings", "token"), ("position_embeddings", "position")]
    tables += [("token_type_embeddings", "token_type")] if size.num_token_types else []
    embed = [Rule(f"{before}embeddings.{theirs}.weight", f"embed/{ours}/embedding") for theirs, ours in tables]
    return (*embed, *_norm(f"{before}embeddings.LayerNorm", "embed/norm"), *encoder, *_top(size, family, before))


def _bert_blocks(before: str) -> tuple[Rule, ...]:
    layer = f"{before}encoder.layer.{{i}}"
    return (
        *_linears(layer, _BERT_BLOCK),
        *_norm(f"{layer}.attention.output.LayerNorm", "blocks/{i}/norm1"),
        *_norm(f"{layer}.output.LayerNorm", "blocks/{i}/norm2"),
    )


def _distilbert_blocks(before: str) -> tuple[Rule, ...]:
    layer, block = f"{before}transformer.layer.{{i}}", "blocks/{i}"
    return (
        *(
            rule
            for theirs, ours in _DISTILBERT_BLOCK.items()
            for rule in linear(f"{layer}.{theirs}", f"{block}/{ours}")
        ),
        *norm(f"{layer}.sa_layer_norm", "blocks/{i}/norm1"),
        *norm(f"{layer}.output_layer_norm", "blocks/{i}/norm2"),
    )


def _linears(layer: str, names: Mapping[str, str]) -> tuple[Rule, ...]:
    return tuple(rule for theirs, ours in names.items() for rule in linear(f"{layer}.{theirs}", f"blocks/{{i}}/{ours}"))


def _norm(theirs: str, ours: str) -> tuple[Rule, ...]:
    """Files from before 2019, such as `bert-base-uncased`, call a norm's arrays gamma and beta, as TensorFlow does."""
    old = (
        Rule(f"{theirs}.gamma", f"{ours}/scale", optional=True),
        Rule(f"{theirs}.beta", f"{ours}/bias", optional=True),
    )
    return (*norm(theirs, ours), *old)


def _top(size: BertConfig, family: str, before: str) -> tuple[Rule, ...]:
    """Returns the rules of pooler and head; files of a language model have no head, and often no pooler."""
    pooler = {"bert": f"{before}pooler.dense", "distilbert": "pre_classifier", "roberta": "classifier.dense"}[family]
    head = linear("classifier.out_proj" if family == "roberta" else "classifier", "head", optional=True)
    return (*linear(pooler, "pool/dense", optional=True), *head) if size.pooling == "pooler" else head


def _family(size: BertConfig) -> str:
    if size.num_token_types == 0:
        return "distilbert"
    return "roberta" if size.position_offset else "bert"


def read_config(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Returns the named size nearest to a transformers `config.json` and the fields that differ; None for others.

    Raises:
      InputError: another activation than gelu, or positions that are not a table.
    """
    family = config.get("model_type")
    if family not in ("bert", "distilbert", "roberta"):
        return None
    for key, known in (("hidden_act", "gelu"), ("activation", "gelu"), ("position_embedding_type", "absolute")):
        if config.get(key, known) != known:
            raise InputError(f"`{key}` of this {family} is `{config[key]}`; only `{known}` is built")
    size = _read_distilbert(config) if family == "distilbert" else _read_bert(config, family)
    return nearest(size, {name: named for name, named in CONFIGS.items() if _family(named) == family})


def _read_bert(config: Mapping[str, Any], family: str) -> BertConfig:
    roberta = family == "roberta"
    pad_id = config.get("pad_token_id", 1 if roberta else 0)
    return BertConfig(
        hidden_dim=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        mlp_dim=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        max_positions=config.get("max_position_embeddings", 512),
        num_token_types=config.get("type_vocab_size", 2),
        position_offset=pad_id + 1 if roberta else 0,
        pad_id=pad_id,
        norm_eps=config.get("layer_norm_eps", 1e-12),
        dropout=float(config.get("hidden_dropout_prob", 0.1)),
        pooling=_pooling(config),
    )


def _read_distilbert(config: Mapping[str, Any]) -> BertConfig:
    return BertConfig(
        hidden_dim=config["dim"],
        num_layers=config["n_layers"],
        num_heads=config["n_heads"],
        mlp_dim=config["hidden_dim"],
        vocab_size=config["vocab_size"],
        max_positions=config.get("max_position_embeddings", 512),
        num_token_types=0,
        pad_id=config.get("pad_token_id", 0),
        dropout=float(config.get("dropout", 0.1)),
        pooling=_pooling(config),
        pooler_activation="relu",
    )


def _pooling(config: Mapping[str, Any]) -> Any:
    """A published classifier saw the pooler's output; the mean is the better feature of an encoder alone."""
    classifies = any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or ())
    return "pooler" if classifies else "mean"


def write_config(size: BertConfig, classes: tuple[str, ...], input_shape: tuple[int, ...]) -> dict[str, Any]:
    """Returns the `config.json` with which transformers builds the same encoder and, with a pooler, the same head."""
    del input_shape  # the table of positions decides how long texts may be
    family = _family(size)
    kind = "ForSequenceClassification" if size.pooling == "pooler" else "Model"
    name = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert"}[family]
    shared = {
        "architectures": [f"{name}{kind}"],
        "model_type": family,
        "vocab_size": size.vocab_size,
        "max_position_embeddings": size.max_positions,
        "pad_token_id": size.pad_id,
        "initializer_range": 0.02,
        **labels(classes),
    }
    return shared | (_distilbert_fields(size) if family == "distilbert" else _bert_fields(size))


def _bert_fields(size: BertConfig) -> dict[str, Any]:
    return {
        "hidden_size": size.hidden_dim,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.num_heads,
        "intermediate_size": size.mlp_dim,
        "type_vocab_size": size.num_token_types,
        "layer_norm_eps": size.norm_eps,
        "hidden_dropout_prob": size.dropout,
        "attention_probs_dropout_prob": size.dropout,
        "hidden_act": "gelu",
    }


def _distilbert_fields(size: BertConfig) -> dict[str, Any]:
    return {
        "dim": size.hidden_dim,
        "n_layers": size.num_layers,
        "n_heads": size.num_heads,
        "hidden_dim": size.mlp_dim,
        "dropout": size.dropout,
        "seq_classif_dropout": size.dropout,
        "attention_dropout": size.dropout,
        "activation": "gelu",
    }


# Rules come first: a pooler is ignored only where `_rules` gives it no place.
_IGNORED = (
    *("*position_ids", "*pooler.dense.*", "pre_classifier.*", "classifier.dense.*"),
    *("cls.*", "lm_head.*", "vocab_*"),
)

NAMINGS = tuple(
    Naming(
        name,
        functools.partial(_rules, prefix=prefix),
        ignored=_IGNORED,
        read_config=read_config,
        write_config=write_config,
    )
    for name, prefix in (("transformers", True), ("transformers-encoder", False))
)
"""With the encoder's name before its tensors, as models with a head are published, and without, as encoders are."""
