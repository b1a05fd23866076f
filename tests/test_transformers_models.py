"""Transformers and ConvNeXt without a reference: published sizes, masks, prefixes of tokens, scanning, and names."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jxfer.models import bert
from jxfer.models.bert import Bert, BertConfig
from jxfer.models.stages import run_stages
from jxfer.partition import arrays_of, eval_graphdef
from jxfer.typing import InputError
from jxfer.weights.names import bert as bert_names

pytestmark = pytest.mark.usefixtures("quick_compiles")

CLASSES = 3
TINY_BERT = BertConfig(8, 2, 2, 16, vocab_size=20, max_positions=12)
TINY = {
    "bert": (Bert, TINY_BERT, (6,)),
    "bert pooler": (Bert, dataclasses.replace(TINY_BERT, pooling="pooler"), (6,)),
    "distilbert": (Bert, dataclasses.replace(TINY_BERT, num_token_types=0, pooling="cls"), (6,)),
    "roberta": (Bert, dataclasses.replace(TINY_BERT, num_token_types=1, pad_id=1, position_offset=2), (6,)),
}


def build(name, **changes):
    make, config, shape = TINY[name]
    config = dataclasses.replace(config, **changes)
    return make(config, input_shape=shape, num_classes=CLASSES, dtype=jnp.float32, rngs=nnx.Rngs(0))


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


@nnx.jit
def features(model, x):
    return model.features(x)


def count(make, config, shape, num_classes, *, without=()):
    settings = {"input_shape": shape, "num_classes": num_classes, "dtype": jnp.float32}
    arrays = arrays_of(nnx.eval_shape(lambda: make(config, **settings, rngs=nnx.Rngs(0))))
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


@pytest.mark.parametrize("name", TINY)
def test_all_stages_together_are_the_model_and_the_features_are_what_the_head_sees(name):
    model, x = inference(build(name)), example(name)
    logits = run(model, x)
    assert logits.shape == (2, CLASSES)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(model.head(features(model, x)), logits, rtol=1e-5, atol=1e-6)
    for start, stop in itertools.pairwise(model.stages):
        x = jax.eval_shape(functools.partial(run_stages, model, start=start, stop=stop), x)
    assert x.shape == (2, model.head.in_features)


@pytest.mark.parametrize("name", TINY)
def test_activations_have_the_type_the_model_computes_in_and_parameters_stay_float32(name):
    make, config, shape = TINY[name]
    model = inference(make(config, input_shape=shape, num_classes=CLASSES, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    params = nnx.to_flat_state(nnx.state(model, nnx.Param))
    assert {variable.get_value().dtype for _, variable in params} == {jnp.dtype("float32")}
    assert jax.eval_shape(model.features, example(name)).dtype == jnp.bfloat16
    assert jax.eval_shape(model, example(name)).dtype == jnp.float32


@pytest.mark.parametrize("name", [name for name, (_, config, _) in TINY.items() if hasattr(config, "scan")])
def test_scanned_and_looped_models_have_the_same_paths_and_outputs(name):
    looped, scanned = build(name), build(name, scan=True)
    assert list(arrays_of(scanned)) == list(arrays_of(looped))
    for _ in range(2):  # what dropout draws depends on what it drew before
        expected = run(looped, example(name))
        np.testing.assert_allclose(run(scanned, example(name)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["bert", "bert pooler", "roberta"])
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
    assert not nnx.to_flat_state(nnx.state(build("bert", dropout=0.0), nnx.RngState))


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
    model, size = build(name), TINY[name][1]
    weights = [path for path in arrays_of(model) if "rngs" not in path]
    for naming in bert_names.NAMINGS:
        rules = naming.rules(size)
        for path in weights:
            rule, theirs = next((rule, found) for rule in rules if (found := rule.theirs_of(path)))
            assert rule.ours_of(theirs) == (path,)
            assert next(rule for rule in rules if rule.ours_of(theirs)) is rule
