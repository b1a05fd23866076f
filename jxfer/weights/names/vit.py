"""The names under which timm, torchvision and transformers publish vision transformers."""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jxfer.models.vit import CONFIGS, ViTConfig
from jxfer.typing import InputError
from jxfer.weights.names.convolutional import IMAGENET, require
from jxfer.weights.names.parts import conv, labels, linear, nearest, norm
from jxfer.weights.naming import LINEAR, Naming, Rule, Squeezed
from jxfer.weights.resize import Grid, PatchKernel, Positions, Shape
from jxfer.weights.tensors import Tensor, in_memory

_HALVES: Mapping[str, Any] = {**IMAGENET, "mean": (0.5,) * 3, "std": (0.5,) * 3}
_QKV = ("query", "key", "value")
_FAMILIES = {"vit": "ViT", "deit": "DeiT", "dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters"}


@dataclasses.dataclass(frozen=True)
class TokenPositions:
    """Positions of tokens and patches to another grid; the tokens before the patches are those the grid leaves."""

    def __call__(self, array: np.ndarray, shape: Shape, *, grid: Grid | None = None) -> np.ndarray:
        """Returns [prefix + rows · columns, D]; without a grid it is square, which leaves no doubt up to two tokens."""
        tokens = shape[-2]
        rows, columns = grid or (int(tokens**0.5),) * 2
        return Positions(prefix=tokens - rows * columns)(array, shape, grid=(rows, columns))


RESIZES = (("embed/position", TokenPositions()), ("embed/patch/kernel", PatchKernel()))
"""What can be loaded for another resolution, patch size or number of channels."""


def _timm(size: ViTConfig) -> tuple[Rule, ...]:
    if size.num_registers:
        return ()  # timm has no position for the class token there
    block = "blocks/{i}"
    rules = [*_embed(size, "cls_token", "dist_token", "pos_embed", "patch_embed.proj")]
    rules += _joined("blocks.{i}.attn.qkv.weight", "blocks.{i}.attn.qkv.bias", size)
    for theirs, ours in (("attn.proj", "attention/out"), ("mlp.fc1", "mlp/up"), ("mlp.fc2", "mlp/down")):
        rules += linear(f"blocks.{{i}}.{theirs}", f"{block}/{ours}")
    for k in (1, 2):
        rules += norm(f"blocks.{{i}}.norm{k}", f"{block}/norm{k}")
        rules += [Rule(f"blocks.{{i}}.ls{k}.gamma", f"{block}/scale{k}/scale")] if size.layer_scale is not None else []
    return (*rules, *norm("norm", "norm"), *linear("head", "head", optional=True))


def _torchvision(size: ViTConfig) -> tuple[Rule, ...]:
    if size.num_registers or size.distilled or size.layer_scale is not None:
        return ()
    layer, block = "encoder.layers.encoder_layer_{i}", "blocks/{i}"
    rules = [*_embed(size, "class_token", "", "encoder.pos_embedding", "conv_proj")]
    rules += _joined(f"{layer}.self_attention.in_proj_weight", f"{layer}.self_attention.in_proj_bias", size)
    rules += linear(f"{layer}.self_attention.out_proj", f"{block}/attention/out")
    # The files say linear_1 and linear_2, the modules that read them 0 and 3.
    for names, ours in ((("mlp.linear_1", "mlp.0"), "mlp/up"), (("mlp.linear_2", "mlp.3"), "mlp/down")):
        rules += (rule for name in names for rule in linear(f"{layer}.{name}", f"{block}/{ours}", optional=True))
    rules += (*norm(f"{layer}.ln_1", f"{block}/norm1"), *norm(f"{layer}.ln_2", f"{block}/norm2"))
    return (*rules, *norm("encoder.ln", "norm"), *linear("heads.head", "head", optional=True))


def _transformers(size: ViTConfig, *, families: tuple[str, ...], prefix: bool) -> tuple[Rule, ...]:
    family = _family(size)
    if family not in families:
        return ()
    before = f"{family}." if prefix else ""
    layer, block = f"{before}encoder.layer.{{i}}", "blocks/{i}"
    embed = f"{before}embeddings"
    names = ("cls_token", "distillation_token", "position_embeddings", "patch_embeddings.projection")
    rules = [*_embed(size, *(f"{embed}.{name}" for name in names))]
    if size.num_registers:
        rules.append(Rule(f"{embed}.register_tokens", "embed/registers", Squeezed(1)))
    for part in _QKV:
        rules += linear(f"{layer}.attention.attention.{part}", f"{block}/attention/{part}", use_bias=size.qkv_bias)
    rules += linear(f"{layer}.attention.output.dense", f"{block}/attention/out")
    rules += _dino_layer(layer, block) if family.startswith("dinov2") else _vit_layer(layer, block)
    return (*rules, *norm(f"{before}layernorm", "norm"), *linear("classifier", "head", optional=True))


def _vit_layer(layer: str, block: str) -> tuple[Rule, ...]:
    mlp = (
        *linear(f"{layer}.intermediate.dense", f"{block}/mlp/up"),
        *linear(f"{layer}.output.dense", f"{block}/mlp/down"),
    )
    return (
        *mlp,
        *norm(f"{layer}.layernorm_before", f"{block}/norm1"),
        *norm(f"{layer}.layernorm_after", f"{block}/norm2"),
    )


def _dino_layer(layer: str, block: str) -> tuple[Rule, ...]:
    rules = [*linear(f"{layer}.mlp.fc1", f"{block}/mlp/up"), *linear(f"{layer}.mlp.fc2", f"{block}/mlp/down")]
    for k in (1, 2):
        rules += norm(f"{layer}.norm{k}", f"{block}/norm{k}")
        rules.append(Rule(f"{layer}.layer_scale{k}.lambda1", f"{block}/scale{k}/scale"))
    return tuple(rules)


def _embed(size: ViTConfig, cls: str, dist: str, position: str, patch: str) -> tuple[Rule, ...]:
    rules = [*conv(patch, "embed/patch"), Rule(position, "embed/position", Squeezed(1))]
    rules += [Rule(cls, "embed/class_token", Squeezed(2))] if size.class_token else []
    rules += [Rule(dist, "embed/distillation_token", Squeezed(2))] if size.distilled else []
    return tuple(rules)


def _joined(weight: str, bias: str, size: ViTConfig) -> tuple[Rule, ...]:
    """Returns the rules of queries, keys and values in one tensor."""
    kernel = Rule(weight, tuple(f"blocks/{{i}}/attention/{part}/kernel" for part in _QKV), LINEAR)
    biases = Rule(bias, tuple(f"blocks/{{i}}/attention/{part}/bias" for part in _QKV))
    return (kernel, biases) if size.qkv_bias else (kernel,)


def join_heads(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of a distilled DeiT with its two heads made one, under the name of a single head.

    The published logits are the mean of one head on the class token and one on the distillation token. That is exactly
    one head on both in one vector, its kernel theirs side by side and halved, its bias their mean. Tensors without two
    heads come back as they are.
    """
    joined = dict(tensors)
    for one, other, head in (
        ("head", "head_dist", "head"),
        ("cls_classifier", "distillation_classifier", "classifier"),
    ):
        names = [f"{name}.{leaf}" for leaf in ("weight", "bias") for name in (one, other)]
        if not all(name in tensors for name in names):
            continue
        kernel, kernel_dist, bias, bias_dist = (joined.pop(name).read() for name in names)
        both = {
            f"{head}.weight": np.concatenate([kernel, kernel_dist], axis=1) / 2,
            f"{head}.bias": (bias + bias_dist) / 2,
        }
        joined |= in_memory(both, what=str(tensors[names[0]].file))
    return joined


def _family(size: ViTConfig) -> str:
    """Returns the `model_type` under which transformers has such a network."""
    if size.num_registers:
        return "dinov2_with_registers"
    return "dinov2" if size.layer_scale is not None else "deit" if size.distilled else "vit"


def _read_transformers(config: Mapping[str, Any], *, families: tuple[str, ...]) -> tuple[str, dict[str, Any]] | None:
    family = config.get("model_type")
    if family not in families:
        return None
    require(config, hidden_act="gelu", use_swiglu_ffn=False)
    dino = family.startswith("dinov2")
    dim = config["hidden_size"]
    size = ViTConfig(
        patch_size=config["patch_size"],
        hidden_dim=dim,
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        mlp_dim=int(dim * config.get("mlp_ratio", 4)) if dino else config["intermediate_size"],
        norm_eps=config.get("layer_norm_eps", 1e-6 if dino else 1e-12),
        qkv_bias=config.get("qkv_bias", True),
        layer_scale=float(config.get("layerscale_value", 1.0)) if dino else None,
        distilled=family == "deit",
        num_registers=config.get("num_register_tokens", 4) if family == "dinov2_with_registers" else 0,
        pooling=_pooling(config),
    )
    return nearest(size, CONFIGS)


def _pooling(config: Mapping[str, Any]) -> Any:
    heads = set(config.get("architectures") or ())
    if heads & {"Dinov2ForImageClassification", "Dinov2WithRegistersForImageClassification"}:
        return "cls_mean"
    return "cls_dist" if "DeiTForImageClassificationWithTeacher" in heads else "cls"


def _write_transformers(size: ViTConfig, classes: tuple[str, ...], input_shape: tuple[int, ...]) -> dict[str, Any]:
    """Raises InputError for networks that transformers cannot build."""
    family = _family(size)
    pooling = "cls_mean" if family.startswith("dinov2") else "cls"
    if size.pooling != pooling or not size.class_token:
        raise InputError(f"transformers has no {family} that pools by `{size.pooling}`; it pools by `{pooling}`")
    rows, columns, channels = input_shape
    config = {
        "model_type": family,
        "architectures": [f"{_FAMILIES[family]}ForImageClassification"],
        "image_size": rows if rows == columns else [rows, columns],
        "num_channels": channels,
        "patch_size": size.patch_size,
        "hidden_size": size.hidden_dim,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.num_heads,
        "layer_norm_eps": size.norm_eps,
        "qkv_bias": size.qkv_bias,
        "hidden_act": "gelu",
        **labels(classes),
    }
    if not family.startswith("dinov2"):
        return config | {"intermediate_size": size.mlp_dim}
    if size.mlp_dim % size.hidden_dim:
        raise InputError(f"transformers' {family} needs an `mlp_dim` that is a multiple of {size.hidden_dim}")
    if rows != columns:
        raise InputError(f"transformers' {family} has positions for square images only, not for {rows}×{columns}")
    registers = {"num_register_tokens": size.num_registers} if size.num_registers else {}
    scale = {"layerscale_value": size.layer_scale, "use_swiglu_ffn": False, "use_mask_token": False}
    return config | {"mlp_ratio": size.mlp_dim // size.hidden_dim} | scale | registers


# timm's words for what our names abbreviate.
_TIMM_SIZES = {"tiny": "ti", "small": "s", "base": "b", "large": "l"}


def _read_timm(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Only networks that differ in size: others of timm's have further norms, or positions of other kinds."""
    pattern = rf"(vit|deit)_({'|'.join(_TIMM_SIZES)})_(distilled_)?patch(\d+)(_\d+|_dinov2)?"
    found = re.fullmatch(pattern, config.get("architecture", ""))
    if found is None:
        return None
    kind, word, distilled, patch, _ = found.groups()
    name = f"{'deit' if distilled else 'vit'}_{_TIMM_SIZES[word]}_{patch}{'_distilled' if distilled else ''}"
    if name not in CONFIGS or (kind == "vit" and distilled):
        return None
    if config.get("global_pool", "token") != "token":
        raise InputError(f"`global_pool` of this {name} is `{config['global_pool']}`; only `token` is built")
    return name, {}


def _write_timm(size: ViTConfig, classes: tuple[str, ...], input_shape: tuple[int, ...]) -> dict[str, Any]:
    """Raises InputError for networks that timm has no name for."""
    built = dataclasses.replace(size, scan=False, dropout=0.0)  # neither shows in the weights
    name = next((name for name, named in CONFIGS.items() if named == built and not size.distilled), None)
    if name is None:
        raise InputError(f"timm has no name for {size}; export it under transformers' names")
    _, short, patch = name.split("_")
    word = next(word for word, each in _TIMM_SIZES.items() if each == short)
    rows, columns, channels = input_shape
    return {
        "architecture": f"vit_{word}_patch{patch}{'_dinov2' if size.layer_scale is not None else '_224'}",
        "num_classes": len(classes),
        "label_names": list(classes),
        "model_args": {"img_size": [rows, columns], "in_chans": channels},
        "pretrained_cfg": {
            "input_size": [channels, rows, columns],
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def _transformers_naming(
    name: str, families: tuple[str, ...], preprocessing: Mapping[str, Any], *, prefix: bool
) -> Naming:
    return Naming(
        name,
        functools.partial(_transformers, families=families, prefix=prefix),
        ignored=("*mask_token", "*pooler.dense.*"),
        preprocessing=preprocessing,
        read_config=functools.partial(_read_transformers, families=families),
        write_config=_write_transformers,
    )


_BICUBIC = {**IMAGENET, "resample": "bicubic"}
_DINO = ("dinov2", "dinov2_with_registers")

NAMINGS = (
    Naming(
        "timm",
        _timm,
        ignored=("mask_token",),
        preprocessing={**_HALVES, "crop_fraction": 0.9, "resample": "bicubic"},
        read_config=_read_timm,
        write_config=_write_timm,
    ),
    Naming("torchvision", _torchvision, preprocessing=IMAGENET),
    _transformers_naming("transformers", ("vit",), {**_HALVES, "crop_fraction": 1.0}, prefix=True),
    _transformers_naming("transformers-deit", ("deit",), _BICUBIC, prefix=True),
    _transformers_naming("transformers-dinov2", _DINO, _BICUBIC, prefix=True),
    _transformers_naming("transformers-encoder", ("vit",), {**_HALVES, "crop_fraction": 1.0}, prefix=False),
    _transformers_naming("transformers-deit-encoder", ("deit",), _BICUBIC, prefix=False),
    _transformers_naming("transformers-dinov2-encoder", _DINO, _BICUBIC, prefix=False),
)
"""transformers puts the network's name before its tensors where there is a head, and leaves it out where there is none.
A naming without rules for a size does not have such networks."""
