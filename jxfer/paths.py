"""Parameter paths such as `layer4/0/conv1/kernel`, and ordered rules over them: the first match wins."""

import difflib
import fnmatch
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from jxfer.typing import InputError, Path, PyTree, Rules

_RANGE = re.compile(r"\[(\d*):(\d*)\]")


def match(path: Path, pattern: str) -> bool:
    """Tells whether a path matches a pattern.

    A glob is matched fragment by fragment (fragments are separated by `/`): `*` is any text within a fragment, `?`
    one character, `[ab]` one of these, `[0:6]` an integer in a half-open range, and `**` any number of fragments,
    none included. A pattern that starts with `re:` is a regular expression for the whole path.
    """
    if pattern.startswith("re:"):
        return _regex(pattern).fullmatch(path) is not None
    return _match_fragments(tuple(path.split("/")), tuple(pattern.split("/")))


def match_rules(paths: Iterable[Path], rules: Rules, *, what: str = "parameter") -> dict[Path, Any]:
    """Returns the value of the first rule that matches each path, in the order of `paths`.

    Raises:
      InputError: a path is matched by no rule, or a rule decides nothing because no path matches it or because
        earlier rules take all that do.
    """
    paths = list(paths)
    found: dict[Path, Any] = {}
    used: set[int] = set()
    for path in paths:
        index = next((i for i, (pattern, _) in enumerate(rules) if match(path, pattern)), None)
        if index is None:
            raise InputError(f"no rule covers {what} `{path}`; end the rules with ('**', 'frozen') to freeze the rest")
        found[path] = rules[index][1]
        used.add(index)
    for index, (pattern, _) in enumerate(rules):
        if index not in used:
            raise _dead_rule(pattern, paths, rules[:index], what)
    return found


def nearest(name: str, names: Iterable[str], *, n: int = 3) -> str:
    """Returns up to `n` of `names` most like `name`, quoted and separated by commas, for error messages."""
    choices = list(dict.fromkeys(names))
    close = difflib.get_close_matches(name, choices, n=n, cutoff=0.4) or choices[:n]
    return ", ".join(f"`{choice}`" for choice in close)


def unknown(kind: str, name: str, names: Iterable[str]) -> InputError:
    """Returns the error for a name that is none of `names`: the nearest ones, and all where they are few."""
    names = list(names)
    every = f"; all: {', '.join(names)}" if 3 < len(names) <= 20 else ""
    return InputError(f"unknown {kind} `{name}`; nearest: {nearest(name, names)}{every}")


def keypath(keys: Iterable[Any]) -> Path:
    """Returns the path of a jax key path, the same for nested dicts, flat dicts, `nnx.State` and modules."""
    fragments = [str(_key_name(key)) for key in keys]
    if len(fragments) > 1 and fragments[-1] in ("value", "raw_value"):
        fragments.pop()  # nnx.Variable is itself a pytree node around its array
    return "/".join(fragments)


def map_with_paths(fn: Any, tree: PyTree) -> PyTree:
    """Returns `tree` with each leaf replaced by `fn(path, leaf)`."""
    return jax.tree_util.tree_map_with_path(lambda keys, leaf: fn(keypath(keys), leaf), tree)


def check_same(given: Mapping[Path, Any], expected: Mapping[Path, Any], *, what: str) -> None:
    """Checks that two flat dicts have the same paths and, leaf by leaf, the same shapes.

    Raises:
      InputError: naming the first path that is missing, surplus, or of another shape.
    """
    for path in expected:
        if path not in given:
            raise InputError(f"{what}: no value for `{path}`; nearest given: {nearest(path, given)}")
    for path, value in given.items():
        if path not in expected:
            raise InputError(f"{what}: the model has no `{path}`; nearest: {nearest(path, expected)}")
        if tuple(value.shape) != tuple(expected[path].shape):
            shapes = f"{tuple(value.shape)}, the model needs {tuple(expected[path].shape)}"
            raise InputError(f"{what}: `{path}` has shape {shapes}")


@functools.lru_cache(maxsize=1024)
def _regex(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern.removeprefix("re:"))
    except re.error as error:
        raise InputError(f"bad regular expression `{pattern}`: {error}") from error


@functools.lru_cache(maxsize=65536)
def _match_fragments(path: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    if not pattern:
        return not path
    if pattern[0] == "**":
        return _match_fragments(path, pattern[1:]) or (bool(path) and _match_fragments(path[1:], pattern))
    return bool(path) and _match_fragment(path[0], pattern[0]) and _match_fragments(path[1:], pattern[1:])


def _match_fragment(fragment: str, pattern: str) -> bool:
    if bounds := _RANGE.fullmatch(pattern):
        low, high = bounds.groups()
        return fragment.isdigit() and int(low or 0) <= int(fragment) and (not high or int(fragment) < int(high))
    return fnmatch.fnmatchcase(fragment, pattern)


def _key_name(key: Any) -> Any:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    raise TypeError(f"unknown kind of pytree key {key!r}")


def _dead_rule(pattern: str, paths: list[Path], earlier: Rules, what: str) -> InputError:
    if taken := [path for path in paths if match(path, pattern)]:
        taker = next(other for other, _ in earlier if match(taken[0], other))
        return InputError(f"rule `{pattern}` decides nothing: `{taker}` before it takes every {what} that it matches")
    depth = pattern.count("/")
    prefixes = ["/".join(path.split("/")[:depth]) + "/**" for path in paths] if pattern.endswith("**") else paths
    return InputError(f"no {what} matches `{pattern}`; nearest: {nearest(pattern, prefixes)}")
