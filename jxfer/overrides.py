"""From a command line to an experiment: the file that defines it, and the settings that override it."""

import ast
import dataclasses
import functools
import sys
import traceback
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jxfer.checks import describe, near_choice
from jxfer.config import Experiment
from jxfer.paths import nearest, unknown
from jxfer.typing import InputError

EXPERIMENTS = Path("experiments")
"""Where experiments are looked for by name, below the current directory."""


def load_experiment(path: str | Path) -> Experiment:
    """Runs a Python file, given by its path or by its name in `experiments/`, and returns its `experiment`.

    Raises:
      InputError: there is no such file, it fails (the message has the line), or defines no `experiment`.
    """
    file = _find(str(path))
    module = types.ModuleType(f"_jxfer_experiment:{file.resolve()}")
    module.__file__ = str(file)
    # Dataclasses look their module up there, to tell what an annotation kept as text means; so may anything later.
    sys.modules[module.__name__] = module
    try:
        exec(compile(file.read_bytes(), str(file), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        raise InputError(f"{file}:{_line(error, file)}: {type(error).__name__}: {_first_line(error)}") from error
    experiment = getattr(module, "experiment", None)
    if experiment is None:
        raise InputError(f"{file} defines no `experiment`; end it with `experiment = Experiment(name=...)`")
    if not isinstance(experiment, Experiment):
        raise InputError(f"`experiment` in {file} is a {type(experiment).__name__}, not an Experiment")
    return experiment


def split_options(
    args: Sequence[str], switches: Iterable[str] = (), numbered: Mapping[str, str] = types.MappingProxyType({})
) -> tuple[list[str], dict[str, str]]:
    """Separates `--NAME VALUE`, `--NAME=VALUE` and the switches, which take no value, from the other arguments.

    Those `numbered` are switches too, but take the number that follows, or the one given here.

    Returns the others in order, and name -> value; the last of equal names counts.

    Raises:
      InputError: a value is missing.
    """
    others, options, rest = [], {}, list(args)
    while rest:
        arg = rest.pop(0)
        if not arg.startswith("--"):
            others.append(arg)
            continue
        name = option_name(arg)
        _, equals, value = arg.partition("=")
        if not equals and name in numbered:
            value = rest.pop(0) if rest and rest[0].isdecimal() else numbered[name]
        elif not equals and name not in switches:
            if not rest or rest[0].startswith("--"):
                raise InputError(f"`{arg}` needs a value: `{arg} VALUE`")
            value = rest.pop(0)
        options[name] = value
    return others, options


def option_name(arg: str) -> str:
    """Returns the name in `--NAME` or `--NAME=VALUE`, with `_` for `-`."""
    return arg.removeprefix("--").partition("=")[0].replace("-", "_")


def override(experiment: Experiment, args: Sequence[str]) -> Experiment:
    """Returns the experiment with settings replaced by `--FIELD.PATH VALUE` arguments.

    Commas separate the values of a field that has several, `none` is Python's None or, for a field that is empty by
    default, no value at all; placement rules are written `PATTERN=AXES` with spaces between them.

    Raises:
      InputError: a field is unknown, a value does not fit its type, or a search takes the place of the setting.
    """
    others, options = split_options(args)
    if others:
        raise InputError(f"unexpected argument `{others[0]}`; settings are written `--FIELD.PATH VALUE`")
    fields = settings()
    for name in options:
        if name not in fields:
            raise unknown("option", f"--{name}", [f"--{field}" for field in fields])
    words = {name: _words(name, value, fields[name]) for name, value in options.items()}
    changed = _parse(experiment, words, options)
    _check_effect(changed, options)
    return changed


def settings(cls: type = Experiment, prefix: str = "") -> dict[str, Any]:
    """Returns the path of every setting that can be overridden, such as `train.learning_rate`, with its type."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            found |= settings(typing.cast(type, hint), f"{prefix}{name}.")
        elif name != "methods":
            found[f"{prefix}{name}"] = hint
    return found


def settings_help() -> list[str]:
    """Returns a line for each setting: how it is written, what it takes, and its default."""
    return [f"  --{name} {describe(hint)} ({_default(name)})" for name, hint in settings().items()]


def experiments() -> dict[str, str]:
    """Returns the files in `experiments/` with the first line of their docstrings."""
    files = sorted(EXPERIMENTS.glob("*.py"))
    return {str(file): _claim(file) for file in files}


def _claim(file: Path) -> str:
    try:
        docstring = ast.get_docstring(ast.parse(file.read_bytes()))
    except SyntaxError as error:
        return f"(line {error.lineno} is no Python)"
    return (docstring or "").partition("\n")[0]


def _default(name: str) -> str:
    value = _value(Experiment(name="NAME"), name)
    return "none" if value in (None, ()) else str(value)


def _value(experiment: Experiment, name: str) -> Any:
    return functools.reduce(getattr, name.split("."), experiment)


def _find(name: str) -> Path:
    for path in (Path(name), EXPERIMENTS / f"{name}.py"):
        if path.is_file():
            return path
    names = [str(path) for path in sorted(EXPERIMENTS.glob("*.py"))]
    near = f"nearest: {nearest(name, names)}" if names else "give the path of a Python file that defines `experiment`"
    raise InputError(f"no experiment `{name}`; {near}")


def _line(error: BaseException, file: Path) -> int | None:
    """Returns the last line of the file that was running, or the line at which it is no Python."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return error.lineno
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return lines[-1] if lines else 1


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no message").splitlines()[0]


def _check_effect(experiment: Experiment, options: Mapping[str, str]) -> None:
    for name, tried in vars(experiment.search).items():
        train, search = f"train.{name}", f"search.{name}"
        if train in options and tried:
            values = ", ".join(f"{value:g}" for value in tried)
            raise InputError(f"--{train} has no effect: {search} tries {values}; give --{search} {options[train]}")


def _words(name: str, value: str, hint: Any) -> list[str]:
    empty = value.lower() == "none" and _value(Experiment(name="NAME"), name) == ()
    return [] if empty else _spell(value, hint)


def _spell(value: str, hint: Any) -> list[str]:
    """Returns the value in the words that tyro reads for this type."""
    args = typing.get_args(hint)
    if types.NoneType in args:
        some = next(kind for kind in args if kind is not types.NoneType)
        return ["None"] if value.lower() == "none" else _spell(value, some)
    if typing.get_origin(hint) is tuple and typing.get_origin(args[0]) is tuple:
        return [part for pair in value.split() for part in pair.rsplit("=", 1)]
    if typing.get_origin(hint) is tuple:
        return [word for part in value.split(",") for word in _spell(part.strip(), args[0])]
    if hint is bool:
        return [value.capitalize()]
    return [value]


def _parse(experiment: Experiment, words: Mapping[str, Sequence[str]], options: Mapping[str, str]) -> Experiment:
    parsed = _run_tyro(experiment, words)
    if parsed is None:
        wrong = next(name for name in words if _run_tyro(experiment, {name: words[name]}) is None)
        hint = settings()[wrong]
        text = f"--{wrong} takes {describe(hint)}, not `{options[wrong]}`"
        raise InputError(text + near_choice(options[wrong], hint))
    return parsed


def _run_tyro(experiment: Experiment, words: Mapping[str, Sequence[str]]) -> Experiment | None:
    """Returns None where tyro refuses; it would print a box, and we want one line."""
    import contextlib
    import io

    import tyro

    overridable = [field for field in dataclasses.fields(Experiment) if field.name != "methods"]
    values = {field.name: getattr(experiment, field.name) for field in overridable}
    cls = dataclasses.make_dataclass("Settings", [(field.name, field.type) for field in overridable], frozen=True)
    args = [arg for name, parts in words.items() for arg in (f"--{name}", *parts)]
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            parsed = tyro.cli(cls, args=args, default=cls(**values), config=(tyro.conf.FlagConversionOff,))
    except SystemExit:
        return None
    return dataclasses.replace(experiment, **{field.name: getattr(parsed, field.name) for field in overridable})
