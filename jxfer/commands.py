"""What a command is, to the command line and to who asks for help."""

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

# Nothing here imports jax, so that `jxfer --help` does not wait for it.


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What follows the name of a command."""

    line: str
    """The whole command, as it is recorded with the results."""
    operands: tuple[str, ...]
    options: Mapping[str, str]
    settings: tuple[str, ...]
    """The options that are settings of the experiment, as `--FIELD.PATH=VALUE`."""


@dataclasses.dataclass(frozen=True)
class Command:
    """What a command does and takes."""

    call: Callable[[Arguments], int]
    operands: str
    summary: str
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Name -> value and help, of the options that are not settings."""
    joins: bool = False
    """Whether several processes can run it as one."""

    @property
    def most_operands(self) -> int | float:
        """How many operands it takes."""
        return math.inf if "..." in self.operands else len(self.operands.split())

    @property
    def least_operands(self) -> int:
        """How many operands it needs."""
        return 0 if self.operands.startswith("[") else len(self.operands.split())

    @property
    def takes_settings(self) -> bool:
        """Whether every setting of the experiment is an option too."""
        return self.operands == "EXPERIMENT"


def overview(commands: Mapping[str, Command]) -> str:
    """Returns what `jxfer --help` prints."""
    calls = {name: f"{name} {command.operands}" for name, command in commands.items()}
    width = max(map(len, calls.values()))
    rows = [f"  {calls[name]:<{width}}  {command.summary}" for name, command in commands.items()]
    return "\n".join(
        [
            "usage: jxfer COMMAND ...     jxfer COMMAND --help     jxfer --version",
            "",
            *rows,
            "",
            "EXPERIMENT is a Python file that defines `experiment`, or its name in experiments/.",
            "exit status: 0 done, 2 bad input, 3 a run failed, 75 stopped (the same command continues)",
        ]
    )


def help_of(name: str, command: Command) -> str:
    """Returns what `jxfer NAME --help` prints."""
    lines = [f"usage: jxfer {name} {command.operands}{' [OPTIONS]' if command.options else ''}", "", command.summary]
    if command.options:
        options = {name.replace("_", "-"): text for name, text in command.options.items()}
        width = max(8, *map(len, options))
        lines += ["", *(f"  --{name:<{width}} {text}" for name, text in options.items())]
    if command.takes_settings:
        from jxfer import overrides

        lines += ["", "and every setting of the experiment:", *overrides.settings_help()]
    return "\n".join(lines)


def whole_number(args: Arguments, name: str, *, default: int, least: int = 0) -> int:
    """Returns the number that an option gives; raises InputError where it is none."""
    from jxfer.typing import InputError

    value = args.options.get(name, str(default))
    if not value.isdecimal() or int(value) < least:
        raise InputError(f"--{name} takes a whole number, {least} or more, not `{value}`")
    return int(value)


def title_of(row: Mapping[str, Any]) -> str:
    """Returns the name of a run for people."""
    return f"{row['method']} · {'all' if row['shots'] is None else row['shots']} shots · seed {row['seed']}"


def print_table(table: Any) -> None:
    """Prints a table, as wide as it needs to be where no terminal says otherwise."""
    from rich.console import Console

    # A pipe has no width of its own; a table cut at 80 columns would be unreadable there.
    Console(width=None if sys.stdout.isatty() else 200).print(table)
