"""Patterns and rules over parameter paths."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from networks import Net

from jxfer import paths
from jxfer.typing import InputError

PATHS = [
    "stem/kernel",
    "layer1/0/conv1/kernel",
    "layer1/2/bn/scale",
    "layer1/10/conv1/kernel",
    "head/kernel",
    "head/bias",
]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("**", [0, 1, 2, 3, 4, 5]),
        ("head/**", [4, 5]),
        ("head", []),
        ("*/kernel", [0, 4]),
        ("**/kernel", [0, 1, 3, 4]),
        ("layer1/*/conv1/*", [1, 3]),
        ("layer1/[0:3]/**", [1, 2]),
        ("layer1/[2:]/**", [2, 3]),
        ("layer1/[:2]/**", [1]),
        ("layer[12]/**", [1, 2, 3]),
        ("layer?/0/**", [1]),
        ("head/**/kernel", [4]),
        ("**/conv1/**", [1, 3]),
        ("re:.*(bias|scale)", [2, 5]),
        ("re:head", []),
        ("HEAD/**", []),
    ],
)
def test_a_pattern_matches_just_these_paths(pattern, expected):
    assert [index for index, path in enumerate(PATHS) if paths.match(path, pattern)] == expected


FRAGMENTS = st.lists(st.sampled_from(["a", "b", "0", "10", "kernel"]), min_size=1, max_size=5)


@given(FRAGMENTS, FRAGMENTS)
def test_double_star_matches_any_number_of_fragments(prefix, rest):
    path = "/".join(prefix + rest)
    assert paths.match(path, "/".join(prefix) + "/**")
    assert paths.match(path, "**/" + "/".join(rest))
    assert paths.match(path, "/".join([*prefix, "**", *rest]))
    assert paths.match(path, path)


@given(FRAGMENTS)
def test_a_star_stands_for_exactly_one_fragment(fragments):
    stars = ["*"] * len(fragments)
    assert paths.match("/".join(fragments), "/".join(stars))
    assert not paths.match("/".join(fragments), "/".join([*stars, "*"]))


def test_the_first_matching_rule_wins():
    values = paths.match_rules(PATHS, [("head/bias", 1), ("head/**", 2), ("**", 3)])
    assert values == dict(zip(PATHS, [3, 3, 3, 3, 2, 1], strict=True))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("layer5/**", 1), ("**", 0)], "no parameter matches `layer5/**`; nearest: `layer1/**`"),
        ([("head/kernl", 1), ("**", 0)], "no parameter matches `head/kernl`; nearest: `head/kernel`"),
        ([("head/**", 1)], "no rule covers parameter `stem/kernel`; end the rules with ('**', 'frozen')"),
        ([("**", 0), ("head/**", 1)], "rule `head/**` decides nothing: `**` before it takes every parameter"),
        ([("re:(", 0)], "bad regular expression `re:(`"),
    ],
)
def test_rules_that_do_not_fit_are_one_line_errors(rules, message):
    with pytest.raises(InputError) as error:
        paths.match_rules(PATHS, rules)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_path_is_the_same_in_modules_states_nested_and_flat_dicts():
    model = Net(nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    nested = nnx.to_pure_dict(state)

    def names(tree):
        return {paths.keypath(keys) for keys, _ in jax.tree_util.tree_flatten_with_path(tree)[0]}

    flat = {"/".join(map(str, keys)): value for keys, value in nnx.to_flat_state(state)}
    assert names(state) == names(nested) == set(flat)
    assert names({path: jnp.zeros(()) for path in flat}) == set(flat)


def test_the_nearest_names_come_first():
    assert paths.nearest("lier4", ["stem", "layer3", "layer4"]).startswith("`layer4`")
    assert "nearest: `resnet18`" in str(paths.unknown("model", "resnet81", ["resnet18", "vit"]))
