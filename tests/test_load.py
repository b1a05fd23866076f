"""Weights into models: all of them, or an error that names the path and leaves the model as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from networks import Net

from jxfer.partition import arrays_of, fingerprint
from jxfer.typing import InputError
from jxfer.weights.load import load_into


def is_random(value) -> bool:
    return jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key) or value.dtype == jnp.uint32


def weights(seed: int = 1) -> dict[str, np.ndarray]:
    """Returns what a checkpoint holds: parameters and statistics on the host, no random keys."""
    arrays = arrays_of(Net(nnx.Rngs(seed)))
    arrays["bn/mean"] += 3
    return {path: np.asarray(value) for path, value in arrays.items() if not is_random(value)}


def test_every_parameter_and_statistic_gets_the_value_of_its_path():
    model = Net(nnx.Rngs(0))
    load_into(model, weights(), what="weights")
    loaded = arrays_of(model)
    for path, value in weights().items():
        np.testing.assert_array_equal(loaded[path], value, err_msg=path)
    assert any(path.startswith("layers/10/") for path in weights()), "a place where order by text would differ"


def test_random_keys_stay_as_they_are_even_where_the_weights_hold_some():
    model, other = Net(nnx.Rngs(0)), Net(nnx.Rngs(1))
    keys = {path for path, value in arrays_of(model).items() if is_random(value)}
    before = fingerprint({path: arrays_of(model)[path] for path in keys})
    load_into(model, arrays_of(other), what="weights")
    assert keys
    assert fingerprint({path: arrays_of(model)[path] for path in keys}) == before


def test_the_order_of_the_weights_does_not_matter():
    model = Net(nnx.Rngs(0))
    load_into(model, dict(sorted(weights().items(), reverse=True)), what="weights")
    np.testing.assert_array_equal(model.layers[10].kernel.get_value(), weights()["layers/10/kernel"])


def test_weights_take_the_type_of_the_model():
    model = Net(nnx.Rngs(0))
    halves = {path: value.astype(np.float16) for path, value in weights().items()}
    load_into(model, halves, what="weights")
    kernel = model.head.kernel.get_value()
    assert kernel.dtype == jnp.float32
    np.testing.assert_array_equal(kernel, halves["head/kernel"].astype(np.float32))


def renamed(arrays, old, new):
    return {new if path == old else path: value for path, value in arrays.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda arrays: renamed(arrays, "layers/3/kernel", "layers/3/weight"),
            r"^run:x: no value for `layers/3/kernel`; nearest given: .*`layers/\d+/kernel`",
        ),
        (
            lambda arrays: arrays | {"hed/kernel": np.zeros((8, 5))},
            r"^run:x: the model has no `hed/kernel`; nearest: `head/kernel`",
        ),
        (
            lambda arrays: arrays | {"head/kernel": np.zeros((8, 62))},
            r"^run:x: `head/kernel` has shape \(8, 62\), the model needs \(8, 5\)$",
        ),
    ],
)
def test_weights_that_do_not_fit_name_the_path_and_change_nothing(change, message):
    model = Net(nnx.Rngs(0))
    before = fingerprint(arrays_of(model))
    with pytest.raises(InputError, match=message) as error:
        load_into(model, change(weights()), what="run:x")
    assert "\n" not in str(error.value)
    assert fingerprint(arrays_of(model)) == before


def test_the_model_runs_with_what_was_loaded():
    model, donor = Net(nnx.Rngs(0)), Net(nnx.Rngs(1))
    load_into(model, arrays_of(donor), what="weights")
    model.eval(), donor.eval()
    images = jnp.ones((2, 8, 8, 1))
    np.testing.assert_array_equal(model(images), donor(images))
