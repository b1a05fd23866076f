"""Head surgeries: logits that begin where they should, on real and on abstract models, and errors that say why not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from networks import Net, make_batch

from jxfer.config import DataConfig
from jxfer.partition import arrays_of
from jxfer.surgery.head import KeepRows, MLPHead, NewHead
from jxfer.typing import InputError

SOURCE = tuple("vwxyz")
TARGET = ("z", "v", "y")
SURGERIES = [NewHead(), MLPHead(hidden_dim=6), KeepRows()]
IMAGES = make_batch(4)["image"]


def operate(surgery, model: nnx.Module, *, seed: int = 1) -> nnx.Module:
    surgery(model, source_classes=SOURCE, target_classes=TARGET, data=DataConfig(), rngs=nnx.Rngs(seed))
    return model


def net() -> Net:
    model = Net(nnx.Rngs(0))
    model.head.bias.set_value(jnp.arange(5.0))
    model.eval()
    return model


def test_kept_rows_give_the_sources_logits_for_the_classes_of_these_names():
    expected = net()(IMAGES)[:, [SOURCE.index(name) for name in TARGET]]
    np.testing.assert_allclose(operate(KeepRows(), net())(IMAGES), expected, rtol=1e-6)


def test_rows_of_a_head_without_bias_are_kept_too():
    model = net()
    model.head = nnx.Linear(8, 5, use_bias=False, rngs=nnx.Rngs(3))
    expected = model(IMAGES)[:, [4, 0, 3]]
    np.testing.assert_allclose(operate(KeepRows(), model)(IMAGES), expected, rtol=1e-6)


def test_a_class_that_the_source_lacks_is_named_with_the_nearest():
    with pytest.raises(InputError, match=r"no class `zebra` to keep; nearest: `zebr`.*; use a new head"):
        KeepRows()(
            net(), source_classes=(*"abcd", "zebr"), target_classes=("a", "zebra"), data=DataConfig(), rngs=nnx.Rngs(0)
        )


@pytest.mark.parametrize("surgery", [NewHead(), MLPHead(hidden_dim=6)])
def test_new_heads_begin_with_zero_logits_for_the_targets_classes(surgery):
    logits = operate(surgery, net())(IMAGES)
    np.testing.assert_array_equal(logits, np.zeros((4, 3)))


def test_the_mlp_head_has_a_random_hidden_layer_of_its_size():
    first, second = (operate(MLPHead(hidden_dim=6), net(), seed=seed).head for seed in (1, 2))
    assert first.hidden.kernel.get_value().shape == (8, 6)
    assert first.out.kernel.get_value().shape == (6, 3)
    assert np.any(first.hidden.kernel.get_value() != second.hidden.kernel.get_value())
    assert np.all(np.std(first.hidden.kernel.get_value(), axis=0) > 0)


@pytest.mark.parametrize("surgery", SURGERIES, ids=repr)
def test_surgeries_touch_nothing_but_the_head(surgery):
    before, after = arrays_of(net()), arrays_of(operate(surgery, net()))
    rest = [path for path in before if not path.startswith("head/")]
    assert rest == [path for path in after if not path.startswith("head/")]
    for path in rest:
        if not jax.dtypes.issubdtype(before[path].dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(before[path], after[path])


@pytest.mark.parametrize("surgery", SURGERIES, ids=repr)
def test_surgeries_work_on_abstract_models(surgery):
    abstract = arrays_of(nnx.eval_shape(lambda: operate(surgery, net())))
    real = arrays_of(operate(surgery, net()))
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in abstract.items()} == {
        path: (leaf.shape, leaf.dtype) for path, leaf in real.items()
    }


@pytest.mark.parametrize("surgery", SURGERIES, ids=repr)
def test_heads_compute_in_the_type_of_the_old_one(surgery):
    model = net()
    model.head = nnx.Linear(8, 5, dtype=jnp.bfloat16, rngs=nnx.Rngs(3))
    assert operate(surgery, model)(IMAGES).dtype == jnp.bfloat16


class Headless(nnx.Module):
    def __init__(self, head=None):
        if head is not None:
            self.head = head


@pytest.mark.parametrize("surgery", SURGERIES, ids=repr)
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Headless(), "Headless has no `head`"),
        (Headless(nnx.Conv(1, 2, (1, 1), rngs=nnx.Rngs(0))), "Headless has a Conv as `head`"),
    ],
)
def test_a_model_without_a_linear_head_is_refused(surgery, model, message):
    with pytest.raises(InputError, match=message + "; a head surgery needs an nnx.Linear of that name"):
        operate(surgery, model)
