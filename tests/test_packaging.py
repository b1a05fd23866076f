"""What the project file says of the package: which others it needs, and what a wheel ships beside Python files."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def declared() -> set[str]:
    extras = PROJECT["project"]["optional-dependencies"].values()
    requirements = [*PROJECT["project"]["dependencies"], *(item for extra in extras for item in extra)]
    return {distribution(re.split(r"[\[<>=!~; ]", requirement)[0]) for requirement in requirements}


def distribution(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported() -> set[str]:
    nodes = [node for file in (ROOT / "jxfer").rglob("*.py") for node in ast.walk(ast.parse(file.read_bytes()))]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"jxfer"}


def test_every_package_that_is_imported_is_declared():
    providers = packages_distributions()
    undeclared = [
        name for name in imported() if not {distribution(d) for d in providers.get(name, [name])} & declared()
    ]
    assert not undeclared


def test_a_wheel_ships_the_mark_that_the_package_is_typed():
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["jxfer"]
    assert (ROOT / "jxfer" / "py.typed").read_bytes() == b""
