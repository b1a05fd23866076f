"""Recurrent classifiers: padding changes nothing, poolings, settings, and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from weights import exported, fill

from jxfer.models.rnn import CONFIGS, Pool, Rnn, RnnConfig
from jxfer.models.stages import run_stages
from jxfer.partition import arrays_of
from jxfer.typing import InputError
from jxfer.weights.names.rnn import NAMINGS

TINY = RnnConfig(vocab_size=11, embedding_dim=4, hidden_dim=3, num_layers=2)
HIDDEN = nnx.jit(lambda model, x: run_stages(model, x, stop="pool"))
LOGITS = nnx.jit(lambda model, x: model(x))
POOLINGS = ("last", "mean", "max")


def pooled(pooling, x):
    return Pool(dataclasses.replace(TINY, pooling=pooling))(x)


def network(config=TINY, *, dtype=jnp.float32, seed=0):
    return Rnn(config, input_shape=(6,), num_classes=3, dtype=dtype, rngs=nnx.Rngs(seed))


def ids(*rows):
    return jnp.asarray(rows, jnp.int32)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_padding_changes_nothing(cell):
    model = network(dataclasses.replace(TINY, cell=cell))
    short = HIDDEN(model, ids([5, 3, 8], [7, 2, 0]))
    long = HIDDEN(model, ids([5, 3, 8, 0, 0, 0], [7, 2, 0, 0, 0, 0]))
    assert not long["hidden"][:, 3:].any()
    for pooling in POOLINGS:
        np.testing.assert_allclose(pooled(pooling, short), pooled(pooling, long), rtol=1e-6, atol=1e-6)


def test_a_text_without_tokens_gives_zeros():
    hidden = HIDDEN(network(), ids([0, 0, 0], [1, 2, 3]))
    for pooling in POOLINGS:
        features = pooled(pooling, hidden)
        assert not features[0].any()
        assert features[1].any()


def test_poolings_are_their_definitions():
    x = ids([5, 3, 8, 0], [7, 2, 6, 9])
    activations = HIDDEN(network(), x)
    hidden = np.asarray(activations["hidden"])
    expected = {
        "max": np.stack([hidden[0, :3].max(0), hidden[1].max(0)]),
        "mean": np.stack([hidden[0, :3].mean(0), hidden[1].mean(0)]),
        "last": np.stack([np.r_[hidden[0, 2, :3], hidden[0, 0, 3:]], np.r_[hidden[1, 3, :3], hidden[1, 0, 3:]]]),
    }
    for pooling, values in expected.items():
        np.testing.assert_allclose(pooled(pooling, activations), values, rtol=1e-6, atol=1e-6)


def test_one_direction_never_looks_ahead():
    model = network(dataclasses.replace(TINY, bidirectional=False))
    first, second = (HIDDEN(model, ids([4, 5, last]))["hidden"] for last in (6, 7))
    np.testing.assert_array_equal(first[:, :2], second[:, :2])
    assert first.shape == (1, 3, 3)


def test_stages_and_paths():
    model = network()
    assert model.stages == ("embed", "layers/0", "layers/1", "pool", "head")
    assert {"embed/embedding", "layers/1/backward/hidden/bias", "head/kernel"} < set(arrays_of(model))
    logits = jax.eval_shape(network(dtype=jnp.bfloat16), ids([1, 2, 3]))
    assert (logits.shape, logits.dtype) == ((1, 3), jnp.float32)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_gradients_reach_every_parameter(cell):
    model = network(dataclasses.replace(TINY, cell=cell, pooling="mean"))
    grads = nnx.jit(nnx.grad(lambda model, x: (model(x) ** 2).sum()))(model, ids([5, 3, 8, 0], [7, 2, 6, 9]))
    for path, grad in nnx.to_flat_state(grads):
        assert np.abs(grad.get_value()).max() > 0, path


def test_dropout_is_only_where_it_is_asked_for():
    x = ids([5, 3, 8])
    model = network(dataclasses.replace(TINY, dropout=0.5))
    assert not np.array_equal(LOGITS(model, x), LOGITS(model, x))
    quiet = nnx.view(model, deterministic=True)
    np.testing.assert_array_equal(LOGITS(quiet, x), LOGITS(quiet, x))
    assert not any("dropout" in path for path in arrays_of(network()))


def test_word_vectors_fill_the_embedding_alone():
    size = dataclasses.replace(TINY, num_layers=1)
    naming = NAMINGS[2]
    model = network(size)
    tensors = exported(model, naming, size)
    tensors["vectors"] = np.arange(44, dtype=np.float32).reshape(11, 4)
    fill(model, naming, size, tensors)
    np.testing.assert_array_equal(model.embed.embedding.get_value(), tensors["vectors"])
    required = [rule.theirs for rule in naming.rules(size) if not rule.optional]
    assert required == ["vectors"]


def test_published_sizes_and_other_words_for_settings():
    assert set(CONFIGS) == {"lstm", "gru"}
    with pytest.raises(
        InputError, match=r"`pooling` of a recurrent network is `first`; choose one of: last, mean, max"
    ):
        dataclasses.replace(TINY, pooling="first")
