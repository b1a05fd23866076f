"""Heads that see every stage: what they see, and where a run of the stages must refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from jxfer import models
from jxfer.config import DataConfig
from jxfer.models.stages import pool, run_stages
from jxfer.partition import eval_graphdef
from jxfer.surgery.neighbours import NeighbourVotes
from jxfer.surgery.taps import TapHead
from jxfer.typing import InputError

IMAGES = jax.random.normal(jax.random.key(0), (4, *tiny.IMAGE_SHAPE))


@pytest.fixture(autouse=True)
def _tiny_models(monkeypatch):
    monkeypatch.setattr(models, "_CONFIGS", tiny.CONFIGS)


def operate(surgery, model):
    surgery(model, source_classes=(), target_classes=("a", "b"), data=DataConfig(), rngs=nnx.Rngs(1))
    return nnx.merge(eval_graphdef(model), nnx.state(model))


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_the_head_sees_the_means_of_all_stages_side_by_side(name):
    plain = nnx.merge(eval_graphdef(model := tiny.build(name)), nnx.state(model))
    stages = plain.stages
    means = [pool(run_stages(plain, IMAGES, stop=after)) for after in stages[1:-1]]
    tapped = operate(TapHead(tiny.IMAGE_SHAPE), model)
    features = tapped.features(IMAGES)
    assert tapped.head.in_features == features.shape[1] == sum(width for _, width in tapped.taps)
    np.testing.assert_allclose(features, jnp.concatenate(means[: len(tapped.taps)], axis=1), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(tapped(IMAGES), np.zeros((4, 2)))
    np.testing.assert_array_equal(run_stages(tapped, features, start="head"), np.zeros((4, 2)))


def test_a_head_that_sees_every_stage_needs_every_stage():
    tapped = operate(TapHead(tiny.IMAGE_SHAPE), tiny.build("convnet"))
    with pytest.raises(InputError, match="the head of this ConvNet sees every stage; run it from the first"):
        run_stages(tapped, IMAGES, start="layer1")


def test_texts_are_pooled_over_the_tokens_that_are_there():
    hidden, mask = jnp.arange(12.0).reshape(2, 3, 2), jnp.array([[True, True, False], [False, False, False]])
    np.testing.assert_array_equal(pool({"hidden": hidden, "mask": mask}), [[1.0, 2.0], [0.0, 0.0]])


def test_a_bank_has_a_row_for_each_example_and_no_more_votes():
    model = operate(NeighbourVotes(most=5, num_train=3), tiny.build("convnet"))
    assert (model.head.bank.shape, model.head.ranks.shape) == ((3, 8), (3,))
    assert model(IMAGES).shape == (4, 2)
