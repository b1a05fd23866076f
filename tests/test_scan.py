"""Scanned blocks: what they compute, what they change, how often they are traced, and what their gradients cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jxfer.models.attention import PostNormBlock, PreNormBlock
from jxfer.models.scan import scan_blocks
from jxfer.typing import InputError

DIM = 8


class NormBlock(nnx.Module):
    """A block that counts its traces and has dropout and statistics."""

    traces = 0

    def __init__(self, rngs):
        self.linear = nnx.Linear(DIM, DIM, rngs=rngs)
        self.bn = nnx.BatchNorm(DIM, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        NormBlock.traces += 1
        return x + self.dropout(nnx.relu(self.bn(self.linear(x))))


class Stack(nnx.Module):
    def __init__(self, blocks, cuts=None):
        self.blocks = nnx.List(blocks)
        self.cuts = cuts

    def __call__(self, x):
        if self.cuts is not None:
            return scan_blocks(self.blocks, x, cuts=self.cuts)
        for block in self.blocks:
            x = block(x)
        return x


def transformer(**settings):
    settings = {"norm_eps": 1e-6, "dropout_rate": 0.0, "dtype": jnp.float32} | settings
    return PreNormBlock(DIM, 2, 16, **{"qkv_bias": True, "layer_scale": None} | settings)


def pair(make, count=4, cuts=()):
    """Returns the same blocks as a list and scanned."""
    return tuple(Stack([make(rngs=nnx.Rngs(seed)) for seed in range(count)], way) for way in (None, cuts))


def flat(model, kind=...):
    state = nnx.to_flat_state(nnx.state(model, kind))
    return {"/".join(map(str, keys)): variable.get_value() for keys, variable in state}


def raw(value):
    return np.asarray(jax.random.key_data(value) if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key) else value)


@nnx.jit
def value_and_grad(model, x):
    return nnx.value_and_grad(lambda model: jnp.square(model(x)).mean())(model)


@pytest.mark.parametrize("cuts", [(), (0, 2), (1, 2, 3)])
@pytest.mark.parametrize("make", [NormBlock, transformer], ids=["statistics and dropout", "transformer"])
def test_a_scan_equals_the_loop_in_values_gradients_and_changed_state(make, cuts):
    looped, scanned = pair(make, cuts=cuts)
    x = jax.random.normal(jax.random.key(0), (3, 5, DIM))
    for _ in range(2):  # the second step draws other masks and sees the statistics of the first
        loss, grads = value_and_grad(looped, x)
        scanned_loss, scanned_grads = value_and_grad(scanned, x)
        np.testing.assert_allclose(scanned_loss, loss, rtol=1e-6)
        expected = dict(nnx.to_flat_state(grads))
        for keys, grad in nnx.to_flat_state(scanned_grads):
            np.testing.assert_allclose(grad[...], expected[keys][...], rtol=1e-4, atol=1e-7, err_msg=str(keys))
    after = flat(looped)
    assert list(flat(scanned)) == list(after)
    for path, value in flat(scanned).items():
        np.testing.assert_allclose(raw(value), raw(after[path]), rtol=1e-6, err_msg=path)


def test_dropout_counters_of_every_block_advance():
    _, scanned = pair(NormBlock)
    nnx.jit(lambda model, x: model(x))(scanned, jnp.ones((2, DIM)))
    counts = {path: int(value) for path, value in flat(scanned, nnx.RngCount).items()}
    assert len(counts) == 4
    assert set(counts.values()) == {1}


@pytest.mark.parametrize(("cuts", "traces"), [((), 1), ((3,), 2), ((3, 6), 3)])
def test_the_body_is_traced_once_per_segment(cuts, traces):
    _, scanned = pair(NormBlock, count=9, cuts=cuts)
    NormBlock.traces = 0
    jax.make_jaxpr(lambda state, x: nnx.merge(nnx.graphdef(scanned), state)(x))(nnx.state(scanned), jnp.ones((2, DIM)))
    assert NormBlock.traces == traces


def test_blocks_of_other_modes_are_cut_apart():
    looped, scanned = pair(NormBlock)
    for model in (looped, scanned):
        for block in model.blocks[:2]:
            block.dropout.deterministic = block.bn.use_running_average = True
    x = jax.random.normal(jax.random.key(0), (64, DIM))
    np.testing.assert_allclose(scanned(x), looped(x), rtol=1e-5, atol=1e-5)
    counts = [int(block.dropout.rngs.count[...]) for block in scanned.blocks]
    assert counts == [0, 0, 1, 1]


def test_a_frozen_prefix_has_no_backward_pass():
    model = Stack([transformer(rngs=nnx.Rngs(seed)) for seed in range(8)], (6,))
    graphdef, state = nnx.split(model)
    flat_state = dict(nnx.to_flat_state(state))
    moving = {keys: value[...] for keys, value in flat_state.items() if keys[1] >= 6}
    frozen = {keys: value[...] for keys, value in flat_state.items() if keys[1] < 6}

    def loss(moving, frozen, x):
        return nnx.merge(graphdef, nnx.from_flat_state({**frozen, **moving}))(x).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(moving, frozen, jnp.ones((1, 4, DIM)))
    lengths = [eqn.params["length"] for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    assert sorted(lengths) == [2, 2, 6]  # forward and backward of the last two; the first six forward only


def test_activations_may_be_dicts_with_a_mask():
    settings = {"norm_eps": 1e-12, "dropout_rate": 0.0, "dtype": jnp.float32}
    looped, scanned = pair(lambda rngs: PostNormBlock(DIM, 2, 16, **settings, rngs=rngs))
    x = {"hidden": jax.random.normal(jax.random.key(0), (2, 5, DIM)), "mask": jnp.arange(5) < jnp.array([[3], [0]])}
    expected = looped(x)
    actual = scanned(x)
    assert bool(jnp.isfinite(actual["hidden"]).all())
    np.testing.assert_allclose(actual["hidden"], expected["hidden"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cut", [4, -1])
def test_a_cut_outside_the_blocks_is_refused(cut):
    _, scanned = pair(NormBlock, cuts=(cut,))
    with pytest.raises(InputError, match=f"before block {cut}; cuts lie in 0 to 3"):
        scanned(jnp.ones((2, DIM)))
