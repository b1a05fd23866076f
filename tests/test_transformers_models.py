"""Transformers and ConvNeXt without a reference: published sizes, masks, prefixes of tokens, scanning, and names."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jxfer.models import attention, bert, convnext, vit
from jxfer.models.bert import Bert, BertConfig
from jxfer.models.convnext import ConvNeXt, ConvNeXtConfig
from jxfer.models.stages import run_stages
from jxfer.models.vit import ViT, ViTConfig
from jxfer.partition import Audit, Partition, arrays_of, eval_graphdef, fingerprint
from jxfer.typing import InputError
from jxfer.weights.names import bert as bert_names
from jxfer.weights.names import convnext as convnext_names
from jxfer.weights.names import vit as vit_names
from jxfer.weights.tensors import in_memory

CLASSES = 3
TINY_BERT = BertConfig(8, 2, 2, 16, vocab_size=20, max_positions=12)
TINY_VIT = ViTConfig(4, 8, 2, 2, 16)
TINY = {
    "bert": (Bert, TINY_BERT, (6,)),
    "bert pooler": (Bert, dataclasses.replace(TINY_BERT, pooling="pooler"), (6,)),
    "distilbert": (Bert, dataclasses.replace(TINY_BERT, num_token_types=0, pooling="cls"), (6,)),
    "roberta": (Bert, dataclasses.replace(TINY_BERT, num_token_types=1, pad_id=1, position_offset=2), (6,)),
    "convnext": (ConvNeXt, ConvNeXtConfig((1, 2, 1, 1), (4, 6, 8, 12)), (32, 64, 3)),
    "vit": (ViT, TINY_VIT, (8, 12, 3)),
    "vit mean": (ViT, dataclasses.replace(TINY_VIT, class_token=False, pooling="mean", qkv_bias=False), (8, 8, 1)),
    "deit": (ViT, dataclasses.replace(TINY_VIT, distilled=True, pooling="cls_dist"), (8, 8, 3)),
    "dinov2": (ViT, dataclasses.replace(TINY_VIT, layer_scale=0.5, pooling="cls_mean"), (12, 8, 3)),
    "registers": (ViT, dataclasses.replace(TINY_VIT, layer_scale=1.0, num_registers=3, dropout=0.5), (8, 8, 3)),
}


def build(name, **changes):
    """Returns the model with random weights, all made by one compiled program."""
    return nnx.jit(lambda: make(name, **changes))()


def abstract(name, **changes):
    return nnx.eval_shape(lambda: make(name, **changes))


def make(name, dtype=jnp.float32, **changes):
    kind, config, shape = TINY[name]
    config = dataclasses.replace(config, **changes)
    return kind(config, input_shape=shape, num_classes=CLASSES, dtype=dtype, rngs=nnx.Rngs(0))


def example(name, batch=2):
    shape = (batch, *TINY[name][2])
    if len(shape) == 2:
        return jax.random.randint(jax.random.key(1), shape, 2, 20)
    return jax.random.normal(jax.random.key(1), shape)


def inference(model):
    return nnx.merge(eval_graphdef(model), nnx.state(model))


@nnx.jit
def run(model, x):
    return model(x)


def count(kind, config, shape, num_classes, *, without=()):
    settings = {"input_shape": shape, "num_classes": num_classes, "dtype": jnp.float32}
    arrays = arrays_of(nnx.eval_shape(lambda: kind(config, **settings, rngs=nnx.Rngs(0))))
    paths = [path for path in arrays if not path.startswith(without) and "rngs" not in path]
    return sum(arrays[path].size for path in paths)


@pytest.mark.parametrize(
    ("name", "pooling", "expected"),
    [
        ("bert_base", "pooler", 109_482_240),
        ("bert_tiny", "pooler", 4_385_920),
        ("distilbert_base", "mean", 66_362_880),
        ("roberta_base", "pooler", 124_645_632),
        ("minilm_l6", "pooler", 22_713_216),
    ],
)
def test_text_encoders_have_the_published_number_of_parameters(name, pooling, expected):
    config = dataclasses.replace(bert.CONFIGS[name], pooling=pooling)
    assert count(Bert, config, (128,), 2, without=("head",)) == expected


@pytest.mark.parametrize(
    ("name", "shape", "num_classes", "expected"),
    [
        ("vit_ti_16", (224, 224, 3), 1000, 5_717_416),
        ("vit_s_16", (224, 224, 3), 1000, 22_050_664),
        ("vit_b_16", (224, 224, 3), 1000, 86_567_656),
        pytest.param("vit_b_32", (224, 224, 3), 1000, 88_224_232, marks=pytest.mark.slow),
        pytest.param("vit_l_16", (224, 224, 3), 1000, 304_326_632, marks=pytest.mark.slow),
        ("deit_s_16_distilled", (224, 224, 3), 1000, 22_436_432 - 1000),  # two heads made one have one bias
    ],
)
def test_vision_transformers_have_the_published_number_of_parameters(name, shape, num_classes, expected):
    assert count(ViT, vit.CONFIGS[name], shape, num_classes) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("convnext_tiny", 28_589_128),
        pytest.param("convnext_small", 50_223_688, marks=pytest.mark.slow),
        pytest.param("convnext_base", 88_591_464, marks=pytest.mark.slow),
    ],
)
def test_convnexts_have_the_published_number_of_parameters(name, expected):
    assert count(ConvNeXt, convnext.CONFIGS[name], (224, 224, 3), 1000) == expected


def test_dinov2_has_the_published_number_of_parameters():
    """The sums of `facebook/dinov2-small` and `-base` without the mask token."""
    for name, expected in (("vit_s_14", 22_056_192), ("vit_b_14", 86_579_712)):
        assert count(ViT, vit.CONFIGS[name], (518, 518, 3), 2, without=("head",)) == expected


@pytest.mark.parametrize("name", TINY)
def test_all_stages_together_are_the_model_and_the_features_are_what_the_head_sees(name):
    model, x = inference(abstract(name)), example(name)
    logits = nnx.eval_shape(lambda model, x: model(x), model, x)
    assert logits.shape == (2, CLASSES)
    for start, stop in itertools.pairwise(model.stages):
        x = nnx.eval_shape(functools.partial(run_stages, start=start, stop=stop), model, x)
    features = nnx.eval_shape(lambda model, x: model.features(x), model, example(name))
    assert x.shape == features.shape == (2, model.head.in_features)


@pytest.mark.parametrize("name", TINY)
def test_activations_have_the_type_the_model_computes_in_and_parameters_stay_float32(name):
    model = inference(abstract(name, dtype=jnp.bfloat16))
    params = nnx.to_flat_state(nnx.state(model, nnx.Param))
    assert {variable.get_value().dtype for _, variable in params} == {jnp.dtype("float32")}
    assert nnx.eval_shape(lambda model, x: model.features(x), model, example(name)).dtype == jnp.bfloat16
    assert nnx.eval_shape(lambda model, x: model(x), model, example(name)).dtype == jnp.float32


@pytest.mark.parametrize("name", [pytest.param("bert pooler", marks=pytest.mark.slow), "registers"])
def test_scanned_and_looped_models_have_the_same_paths_and_outputs(name):
    looped, scanned = build(name), abstract(name, scan=True)
    assert list(arrays_of(scanned)) == list(arrays_of(looped))
    scanned = nnx.merge(nnx.graphdef(scanned), jax.tree.map(jnp.copy, nnx.state(looped)))
    for _ in range(2):  # what dropout draws depends on what it drew before
        expected = run(looped, example(name))
        np.testing.assert_allclose(run(scanned, example(name)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["bert", pytest.param("bert pooler", marks=pytest.mark.slow), "roberta"])
def test_padding_changes_nothing(name):
    model, ids = inference(build(name)), example(name)
    padded = jnp.concatenate([ids, jnp.full((2, 4), TINY[name][1].pad_id)], axis=1)
    np.testing.assert_allclose(run(model, padded), run(model, ids), rtol=1e-5, atol=1e-6)


def test_a_text_of_padding_alone_has_finite_logits_and_gradients():
    value_and_grad = nnx.jit(nnx.value_and_grad(lambda model, ids: model(ids).sum()))
    result = value_and_grad(inference(build("bert")), jnp.zeros((1, 6), jnp.int32))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(result))


def test_dropout_draws_in_training_and_needs_no_keys_at_rate_zero():
    model = build("bert")
    assert not np.array_equal(run(model, example("bert")), run(model, example("bert")))
    assert not nnx.to_flat_state(nnx.state(abstract("bert", dropout=0.0), nnx.RngState))


def test_texts_longer_than_the_positions_are_refused():
    config = dataclasses.replace(TINY_BERT, position_offset=2)
    with pytest.raises(InputError, match="11 tokens are longer than the 10 positions"):
        Bert(config, input_shape=(11,), num_classes=2, dtype=jnp.float32, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", bert.CONFIGS)
@pytest.mark.parametrize("pooling", ["mean", "pooler"])
def test_text_configs_are_read_back_as_written(name, pooling):
    size = dataclasses.replace(bert.CONFIGS[name], pooling=pooling)
    named, fields = bert_names.read_config(bert_names.write_config(size, ("no", "yes"), (128,)))
    assert named == name
    assert fields == ({} if pooling == "mean" else {"pooling": "pooler"})


def test_a_text_config_of_another_kind_is_passed_over_or_refused():
    assert bert_names.read_config({"model_type": "gpt2"}) is None
    config = bert_names.write_config(TINY_BERT, (), (6,))
    with pytest.raises(InputError, match="`hidden_act` of this bert is `relu`"):
        bert_names.read_config({**config, "hidden_act": "relu"})


@pytest.mark.parametrize("name", ["bert pooler", "distilbert", "roberta"])
def test_names_of_published_texts_go_both_ways(name):
    model, size = abstract(name), TINY[name][1]
    weights = [path for path in arrays_of(model) if "rngs" not in path]
    for naming in bert_names.NAMINGS:
        rules = naming.rules(size)
        for path in weights:
            rule, theirs = next((rule, found) for rule in rules if (found := rule.theirs_of(path)))
            assert rule.ours_of(theirs) == (path,)
            assert next(rule for rule in rules if rule.ours_of(theirs)) is rule


def test_images_must_be_made_of_whole_patches():
    with pytest.raises(InputError, match="9×8 are not made of patches of 4×4; set `image_size` to 8"):
        ViT(TINY_VIT, input_shape=(9, 8, 3), num_classes=2, dtype=jnp.float32, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"class_token": False}, "needs the class token"), ({"pooling": "cls_dist"}, "needs the distillation token")],
)
def test_pooling_a_token_that_is_not_there_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        abstract("vit", **changes)


@pytest.mark.parametrize("name", ["vit_s_16", "vit_b_32", "vit_b_14"])
def test_image_configs_are_read_back_as_written(name):
    pooling = "cls_mean" if name == "vit_b_14" else "cls"
    size = dataclasses.replace(vit.CONFIGS[name], norm_eps=1e-12, pooling=pooling)
    namings = [naming for naming in vit_names.NAMINGS if naming.name.startswith("transformers") and naming.rules(size)]
    config = namings[0].write_config(size, ("a", "b"), (224, 224, 3))
    named, fields = next(found for naming in vit_names.NAMINGS if (found := naming.read_config(config)) is not None)
    assert dataclasses.replace(vit.CONFIGS[named], **fields) == size
    assert named == name


@pytest.mark.parametrize("name", ["vit_ti_16", "vit_s_16", "vit_b_32", "vit_b_14"])
def test_timm_configs_are_read_back_as_written(name):
    timm = vit_names.NAMINGS[0]
    assert timm.read_config(timm.write_config(vit.CONFIGS[name], ("a",), (224, 224, 3))) == (name, {})


@pytest.mark.parametrize("name", ["vit_base_patch16_clip_224", "vit_base_r50_s16_224", "resnet50", "vit_giant_patch14"])
def test_vision_transformers_of_other_kinds_are_passed_over(name):
    assert all(naming.read_config({"architecture": name}) is None for naming in vit_names.NAMINGS)


@pytest.mark.parametrize("name", ["vit", "vit mean", "deit", "dinov2", "registers"])
def test_names_of_published_vision_transformers_go_both_ways(name):
    weights = [path for path in arrays_of(abstract(name)) if "rngs" not in path]
    namings = [(naming, rules) for naming in vit_names.NAMINGS if (rules := naming.rules(TINY[name][1]))]
    assert len(namings) == {"vit": 4, "vit mean": 4, "deit": 3, "dinov2": 3, "registers": 2}[name]
    for _, rules in namings:
        for path in weights:
            rule, theirs = next((rule, found) for rule in rules if (found := rule.theirs_of(path)))
            assert path in rule.ours_of(theirs)


@pytest.mark.parametrize(("old", "new", "prefix"), [((2, 2), (2, 3), 1), ((2, 3), (4, 2), 1), ((3, 3), (2, 2), 2)])
def test_positions_are_resized_and_those_of_tokens_before_the_patches_kept(old, new, prefix):
    (pattern, resize), *_ = vit_names.RESIZES
    assert pattern == "embed/position"
    array = np.ones((prefix + old[0] * old[1], 4), np.float32)
    array[:prefix] = 7
    if old[0] != old[1]:
        with pytest.raises(InputError, match="no square"):
            resize(array, (prefix + new[0] * new[1], 4), grid=new)
        return
    result = resize(array, (prefix + new[0] * new[1], 4), grid=None if new[0] == new[1] else new)
    np.testing.assert_allclose(result[:prefix], 7)
    np.testing.assert_allclose(result[prefix:], 1, rtol=1e-6)


def test_joined_heads_are_the_mean_of_two():
    rng = np.random.default_rng(0)
    shapes = {"head.weight": (3, 4), "head.bias": (3,), "head_dist.weight": (3, 4), "head_dist.bias": (3,), "x": (2,)}
    theirs = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    joined = {name: tensor.read() for name, tensor in vit_names.join_heads(in_memory(theirs)).items()}
    assert set(joined) == {"head.weight", "head.bias", "x"}
    one, two = rng.normal(size=(2, 5, 4))
    logits = one @ theirs["head.weight"].T + theirs["head.bias"]
    distilled = two @ theirs["head_dist.weight"].T + theirs["head_dist.bias"]
    actual = np.concatenate([one, two], axis=1) @ joined["head.weight"].T + joined["head.bias"]
    np.testing.assert_allclose(actual, (logits + distilled) / 2, rtol=1e-12)


@pytest.mark.parametrize("naming", convnext_names.NAMINGS, ids=lambda naming: naming.name)
def test_names_of_published_convnexts_go_both_ways(naming):
    rules = naming.rules(TINY["convnext"][1])
    names = set()
    leaves = arrays_of(abstract("convnext"))
    for path, leaf in leaves.items():
        rule, theirs = next((rule, found) for rule in rules if (found := rule.theirs_of(path)))
        assert rule.ours_of(theirs) == (path,)
        value = np.arange(leaf.size).reshape(leaf.shape)
        np.testing.assert_array_equal(rule.layout.to_ours(rule.layout.to_theirs(value)), value)
        names.add(theirs)
    assert len(names) == len(leaves)
    assert naming.read_config({"model_type": "resnet", "architecture": "resnet50"}) is None
    if naming.write_config is not None:
        for name, size in convnext.CONFIGS.items():
            assert naming.read_config(naming.write_config(size, ("a",), (224, 224, 3))) == (name, {})


def test_torchvision_has_a_convnext_in_one_row_of_features():
    torchvision = convnext_names.NAMINGS[1]
    rules = torchvision.rules(convnext.CONFIGS["convnext_tiny"])

    def ours(name):
        return next(found for rule in rules if (found := rule.ours_of(name)))

    assert ours("features.1.2.block.5.weight") == ("layer1/2/mlp/down/kernel",)
    assert ours("features.4.1.bias") == ("layer3/0/downsample/conv/bias",)
    assert ours("features.7.0.layer_scale") == ("layer4/0/scale/scale",)
    assert ours("classifier.0.weight") == ("norm/scale",)


def test_stochastic_depth_drops_whole_branches_and_rises_with_depth():
    model = abstract("convnext", drop_path=0.4)
    rates = [
        getattr(block.drop_path, "rate", 0.0) for layer in range(1, 5) for block in getattr(model, f"layer{layer}")
    ]
    np.testing.assert_allclose(rates, [0.0, 0.1, 0.2, 0.3, 0.4])
    assert model.layer4[0].drop_path.broadcast_dims == (1, 2, 3)
    drop_path = attention.dropout(0.4, per_example=(1, 2, 3), rngs=nnx.Rngs(0))
    dropped = np.asarray(drop_path(jnp.ones((100, 2, 3, 4))))
    assert all(len(np.unique(each)) == 1 for each in dropped)
    np.testing.assert_allclose(np.unique(dropped), [0, 1 / 0.6], rtol=1e-6)


def test_a_parameter_without_effect_need_not_move_and_has_none():
    model = ViT(TINY_VIT, input_shape=(8, 8, 3), num_classes=3, dtype=jnp.float32, rngs=nnx.Rngs(0))
    partition, before = Partition.of(model, [("**", "all")]), arrays_of(model)
    graphdef = partition.train_graphdef(model)
    start = fingerprint(before)

    def audit(still: str) -> Audit:
        return partition.audit(start, dict.fromkeys(start, "moved") | {still: start[still]}, graphdef)

    assert audit("blocks/1/attention/key/bias").ok
    assert audit("blocks/1/attention/query/bias").stuck == ("blocks/1/attention/query/bias",)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    expected = model(x)
    model.blocks[1].attention.key.bias.set_value(jnp.arange(8.0))
    np.testing.assert_allclose(model(x), expected, rtol=1e-4, atol=1e-5)
    model.blocks[1].attention.query.bias.set_value(jnp.arange(8.0))
    assert np.max(np.abs(model(x) - expected)) > 1e-3
