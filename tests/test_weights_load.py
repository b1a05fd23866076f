"""Loading a checkpoint into a model: every leaf and every tensor is accounted for, and nothing happens by half."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jxfer.typing import InputError
from jxfer.weights import load as loading
from jxfer.weights.load import fill, load, load_into, read, weights_of
from jxfer.weights.naming import CONV, LINEAR, Naming, Rule
from jxfer.weights.resize import InputChannels
from jxfer.weights.save import export_tensors
from jxfer.weights.tensors import in_memory


class Net(nnx.Module):
    """Something of everything: kernels of two kinds, statistics, leaves that share a tensor, random keys."""

    def __init__(self, *, channels: int = 3, classes: int = 4, rngs: nnx.Rngs):
        self.stem = nnx.Conv(channels, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.query, self.key = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(8, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.norm(self.stem(x)).mean((1, 2))
        return self.head(self.dropout(self.query(x) * self.key(x)))


RULES = (
    Rule("conv1.weight", "stem/kernel", CONV),
    Rule("conv1.bias", "stem/bias"),
    *(
        Rule(f"bn.{theirs}", f"norm/{ours}")
        for theirs, ours in {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}.items()
    ),
    Rule("attn.in_proj_weight", ("query/kernel", "key/kernel"), LINEAR),
    Rule("attn.in_proj_bias", ("query/bias", "key/bias")),
    Rule("fc.weight", "head/kernel", LINEAR),
    Rule("fc.bias", "head/bias"),
)
NAMING = Naming("theirs", lambda size: RULES, ignored=("*.num_batches_tracked",), prefixes=("module.",))
OTHER = Naming("others", lambda size: tuple(Rule(f"net.{rule.theirs}", rule.ours, rule.layout) for rule in RULES))
RESIZES = (("stem/kernel", InputChannels()),)


def build(**settings: Any) -> Net:
    return Net(**settings, rngs=nnx.Rngs(params=1, dropout=2))


def arrays(model: nnx.Module) -> dict[str, np.ndarray]:
    return {path: np.asarray(value) for path, value in weights_of(model).items()}


@pytest.fixture(scope="module")
def trained() -> Net:
    model = build()
    rng = np.random.default_rng(0)
    load_into(model, {p: rng.normal(size=a.shape).astype(np.float32) for p, a in arrays(model).items()}, what="test")
    return model


@pytest.fixture
def state(trained: Net) -> dict[str, np.ndarray]:
    """The trained model as somebody else would publish it."""
    return {**export_tensors(weights_of(trained), NAMING, None), "bn.num_batches_tracked": np.asarray(7)}


def loaded(state: dict[str, np.ndarray], make: Any = build, **settings: Any) -> Any:
    return load(make, in_memory(state), (OTHER, NAMING), None, what="ckpt", resizes=RESIZES, **settings)


def assert_same(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray], *, but: tuple[str, ...] = ()) -> None:
    assert set(actual) == set(expected)
    for path in set(expected) - set(but):
        np.testing.assert_array_equal(actual[path], expected[path], err_msg=path)


@pytest.mark.parametrize("prefix", ["", "module.", "net."])
def test_a_published_model_comes_back_whole_whoever_names_it(prefix, state, trained):
    if prefix == "net.":
        del state["bn.num_batches_tracked"]
    model, manifest = loaded({f"{prefix}{name}": array for name, array in state.items()})
    assert_same(arrays(model), arrays(trained))
    assert manifest.naming == ("others" if prefix == "net." else "theirs")
    x = jax.random.normal(jax.random.key(0), (2, 6, 5, 3))
    model.eval()
    trained.eval()
    np.testing.assert_array_equal(model(x), trained(x))


def test_random_keys_are_those_of_a_new_model(state):
    model, _ = loaded(state)
    assert model.dropout.rngs.count[...] == 0
    assert (
        jax.random.key_data(model.dropout.rngs.key[...]) == jax.random.key_data(build().dropout.rngs.key[...])
    ).all()


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float64])
def test_weights_of_any_precision_become_the_models(dtype, state, trained):
    model, manifest = loaded({name: array.astype(dtype) for name, array in state.items()})
    for path, value in arrays(model).items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, arrays(trained)[path].astype(dtype).astype(np.float32))
    assert manifest.coverage == 1


def test_slabs_of_large_tensors_make_the_same_leaves(state, trained, monkeypatch):
    monkeypatch.setattr(loading, "_SLAB_BYTES", 64)
    model, _ = loaded(state)
    assert_same(arrays(model), arrays(trained))


def test_leaves_go_straight_where_they_shall_live(state, trained):
    mesh = jax.make_mesh((8,), ("fsdp",), (AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    model, _ = loaded(state, shardings={"query/kernel": split})
    assert model.query.kernel[...].sharding == split
    assert model.key.kernel[...].sharding.num_devices == 1
    assert_same(arrays(model), arrays(trained))
    whole = NamedSharding(mesh, PartitionSpec())
    model, _ = loaded(state, shardings=whole, rules=[("head/**", "reinitialise")])
    assert {value.sharding for value in weights_of(model).values()} == {whole}


def test_a_manifest_accounts_for_every_leaf_and_every_tensor(state, trained):
    state = {**state, "extra.weight": np.ones((2, 2), np.float32)}
    _, manifest = loaded(state, rules=[("head/**", "reinitialise"), ("extra.*", "skip")])
    leaves, tensors = ({record[key]: record for record in manifest.to_json()[kind]} for kind, key in KINDS.items())
    assert set(leaves) == set(arrays(trained))
    assert set(tensors) == set(state)
    assert leaves["stem/kernel"] == {
        "path": "stem/kernel",
        "shape": [3, 3, 3, 8],
        "dtype": "float32",
        "nbytes": 864,
        "status": "transposed",
        "tensor": "conv1.weight",
    }
    assert leaves["stem/bias"]["status"] == "loaded"
    assert (leaves["head/kernel"]["status"], leaves["head/kernel"]["tensor"]) == ("re-initialised", None)
    assert tensors["attn.in_proj_weight"]["paths"] == ["query/kernel", "key/kernel"]
    statuses = {"fc.weight": "unused", "extra.weight": "unused", "bn.num_batches_tracked": "ignored"}
    assert {name: tensors[name]["status"] for name in statuses} == statuses
    total = sum(array.nbytes for array in arrays(trained).values())
    head = 4 * (8 * 4 + 4)
    assert manifest.coverage == (total - head) / total
    assert manifest.used == (total - head) / (total + 16)
    assert json.loads(json.dumps(manifest.to_json()))["coverage"] == manifest.coverage


KINDS = {"leaves": "path", "tensors": "name"}


def test_a_manifest_prints_in_short(state):
    _, manifest = loaded(state, rules=[("head/**", "reinitialise")])
    assert str(manifest).splitlines() == [
        "ckpt (theirs names)",
        "  model: 7 loaded, 3 transposed, 2 re-initialised; 91.7 % of 1,744 bytes from the file",
        "  file: 8 used, 2 unused, 1 ignored; 91.7 % of 1,752 bytes used",
        "  re-initialised: head/bias, head/kernel",
        "  unused: fc.bias, fc.weight",
    ]


MISFITS = {
    "a missing tensor": (
        {"conv1.bias": None, "conv1.bais": np.zeros(8, np.float32)},
        "no tensor for `stem/bias`; it would be `conv1.bias` (theirs), nearest unused: `conv1.bais`",
        [("stem/bias", "reinitialise"), ("conv1.bais", "skip")],
    ),
    "an unused tensor": (
        {"fc2.weight": np.zeros((4, 8), np.float32)},
        "tensor `fc2.weight` has no place in the model (theirs names); nearest paths: `head/",
        [("fc2.weight", "skip")],
    ),
    "another number of classes": (
        {"fc.bias": np.zeros(9, np.float32), "fc.weight": np.zeros((9, 8), np.float32)},
        "`fc.bias` gives `head/bias` the shape (9,), the model needs (4,); add the rule ('head/**', 'reinitialise')",
        [("head/**", "reinitialise")],
    ),
    "another number of channels": (
        {"conv1.weight": np.zeros((8, 1, 3, 3), np.float32)},
        "`stem/kernel` the shape (3, 3, 1, 8), the model needs (3, 3, 3, 8); add the rule ('stem/kernel', 'resize')",
        [("stem/kernel", "resize")],
    ),
    "another number of axes": (
        {"fc.weight": np.zeros((4, 8, 1), np.float32)},
        "`fc.weight` has shape (4, 8, 1), which cannot be laid out as `head/kernel`; add the rule ('head/kernel', 're",
        [("head/**", "reinitialise")],
    ),
    "a tensor that does not divide": (
        {"attn.in_proj_bias": np.zeros(15, np.float32)},
        "`attn.in_proj_bias` has shape (15,), which cannot be laid out as `query/bias`",
        [("query/bias", "reinitialise"), ("key/bias", "reinitialise")],
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_an_error_and_the_rule_it_names_allows_it(name, state, trained):
    changes, message, rules = MISFITS[name]
    changed = {name: array for name, array in (state | changes).items() if array is not None}
    with pytest.raises(InputError) as error:
        loaded(changed)
    assert str(error.value).startswith("ckpt: ")
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    model, manifest = loaded(changed, rules=rules)
    differing = {*manifest.paths("re-initialised"), *manifest.paths("resized")}
    assert_same(arrays(model), arrays(trained), but=tuple(differing))
    fresh = arrays(build())
    for path in manifest.paths("re-initialised"):
        np.testing.assert_allclose(arrays(model)[path], fresh[path], rtol=1e-6, err_msg="as a new model would have it")


def test_a_checkpoint_of_another_architecture_is_refused_with_what_it_lacks():
    state = {f"encoder.{i}.weight": np.zeros((8, 8), np.float32) for i in range(5)} | {"fc.bias": np.zeros(4)}
    with pytest.raises(
        InputError, match="a checkpoint of another architecture, it has 1 of the model's 12 leaves"
    ) as e:
        loaded(state)
    assert len(str(e.value).splitlines()) == 1


BAD_RULES = {
    "no such action": ([("head/**", "drop")], "unknown action of rule `head/**`: `drop`; nearest: "),
    "no such leaf": ([("haed/**", "reinitialise")], "no parameter matches `haed/**`; nearest: `head/**`"),
    "no such tensor": ([("fc3.*", "skip")], "ckpt: no tensor matches `fc3.*`; nearest: `fc."),
    "a rule behind another": ([("**", "load"), ("head/**", "reinitialise")], "rule `head/**` decides nothing: `**`"),
    "nothing is left alone": ([("head/**", "leave")], "`head/bias` cannot be left in a new model; use 'reinitialise'"),
    "no way to resize": ([("**", "resize")], "`head/kernel` the shape (8, 9), the model needs (8, 4), and nothing is"),
}


@pytest.mark.parametrize("name", BAD_RULES)
def test_a_rule_that_does_nothing_or_cannot_be_followed_is_an_error(name, state):
    rules, message = BAD_RULES[name]
    if name == "no way to resize":
        state |= {"fc.weight": np.zeros((9, 8), np.float32)}
    with pytest.raises(InputError) as error:
        loaded(state, rules=rules)
    assert message in str(error.value)


def test_two_tensors_for_one_leaf_are_an_error_and_one_can_be_skipped(state, trained):
    state = {**state, "module.fc.bias": state["fc.bias"] + 1}
    with pytest.raises(InputError, match=r"`fc.bias` and `module.fc.bias` are both for `head/bias`; skip one"):
        loaded(state)
    model, _ = loaded(state, rules=[("module.fc.bias", "skip")])
    assert_same(arrays(model), arrays(trained))


def test_what_a_rule_skips_leaves_its_leaves_missing(state):
    with pytest.raises(InputError, match=r"no tensor for `head/bias`"):
        loaded(state, rules=[("fc.bias", "skip")])


def test_an_existing_model_is_filled_and_keeps_what_a_rule_leaves(state, trained):
    model = build()
    before = arrays(model)
    manifest = fill(model, in_memory(state), (NAMING,), None, what="ckpt", rules=[("head/**", "leave")])
    assert manifest.paths("left alone") == ("head/bias", "head/kernel")
    expected = arrays(trained) | {path: value for path, value in before.items() if path.startswith("head/")}
    assert_same(arrays(model), expected)


@pytest.mark.parametrize("name", [*MISFITS, "a damaged file", "a rule for new models"])
def test_an_existing_model_is_filled_whole_or_not_at_all(name, state, monkeypatch):
    model = build()
    before = arrays(model)
    tensors = in_memory({n: a for n, a in (state | MISFITS.get(name, ({},))[0]).items() if a is not None})
    rules = [("head/**", "reinitialise")] if name == "a rule for new models" else []
    if name == "a damaged file":

        def unreadable(*_: Any) -> np.ndarray:
            raise InputError("it ends early")

        monkeypatch.setattr(type(tensors["bn.bias"]), "read", unreadable)
    with pytest.raises(InputError):
        fill(model, tensors, (NAMING,), None, what="ckpt", rules=rules)
    assert_same(arrays(model), before)


def test_the_leaves_of_a_file_can_be_read_without_a_model(state, trained):
    expected = weights_of(nnx.eval_shape(build))
    rules = [("head/**", "reinitialise")]
    found, manifest = read(in_memory(state), (NAMING,), None, expected, what="ckpt", rules=rules)
    assert_same(
        {path: np.asarray(value) for path, value in found.items()},
        {path: value for path, value in arrays(trained).items() if not path.startswith("head/")},
    )
    assert manifest.paths("re-initialised") == ("head/bias", "head/kernel")


def test_weights_given_by_path_must_be_exactly_the_models(trained):
    model = build()
    before, given = arrays(model), arrays(trained)
    for wrong, message in (
        ({p: a for p, a in given.items() if p != "head/bias"}, "no value for `head/bias`"),
        (given | {"head/extra": np.zeros(1)}, "the model has no `head/extra`"),
        (given | {"head/bias": np.zeros(9)}, r"`head/bias` has shape \(9,\), the model needs \(4,\)"),
    ):
        with pytest.raises(InputError, match=message):
            load_into(model, wrong, what="ckpt")
        assert_same(arrays(model), before)
    load_into(model, given, what="ckpt")
    assert_same(arrays(model), given)
