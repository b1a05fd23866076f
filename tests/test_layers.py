"""The import order of the design's layout, and what every file must and must not be."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jxfer"

LAYERS = (
    ("typing", "xla_flags", "programs", "config", "paths", "origins", "distributed", "checks"),
    ("data", "models"),
    ("partition", "weights", "sharding", "rounding"),
    ("solvers", "surgery", "penalties", "optim", "objectives"),
    ("methods",),
    ("state", "step"),
    ("claims", "activations", "cost", "peak", "chunks", "store", "variants", "planned", "statement", "saving"),
    ("damage", "checkpoint", "known", "source", "pretrained", "task", "plan", "evaluate"),
    (
        "logs",
        "loop",
        "trace",
        "extract",
        "features",
        "stored",
        "context",
        "phase",
        "solve",
        "equivalence",
        "population",
    ),
    ("search", "measure"),
    ("run", "predict", "export", "directory", "ablate"),
    ("report",),
    ("overrides", "progress", "peers", "session", "commands", "cli"),
)
"""An import may only point up, and within a row to the left."""

ORDER = {name: rank for rank, name in enumerate(name for row in LAYERS for name in row)}

FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(file: Path) -> str:
    """`jxfer/data/load.py` -> `jxfer.data.load`; the `__init__.py` of a folder is the folder."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}


def imports(file: Path) -> set[str]:
    """The modules of jxfer that a file imports, at the top and inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else str(node.module) for name in names}
    return {name for name in found if name.split(".")[0] == "jxfer"}


def layer(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize(
    "file", [file for file in FILES if file.parent != PACKAGE or file.stem != "__init__"], ids=module_of
)
def test_an_import_points_up_the_list(file):
    own = layer(module_of(file))
    assert own in ORDER, f"jxfer/{own} has no place in the layout"
    for module in imports(file):
        if module == "jxfer":
            assert own == "cli", f"{file} imports the public names; import from the module that defines them"
            continue
        assert ORDER[layer(module)] < ORDER[own] or layer(module) == own, f"{module_of(file)} imports {module}"


def test_every_place_in_the_list_is_taken():
    assert {layer(module) for module in MODULES if module != "jxfer"} == set(ORDER)


@pytest.mark.parametrize("folder", sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()))
def test_a_folder_has_no_import_cycle(folder):
    inside = {module for module in MODULES if module.startswith(f"jxfer.{folder}.")} | {f"jxfer.{folder}"}
    edges = {module: imports(MODULES[module]) & inside - {module} for module in inside}
    while edges:
        free = {module for module, targets in edges.items() if not targets & edges.keys()}
        assert free, f"a cycle among {sorted(edges)}"
        edges = {module: targets for module, targets in edges.items() if module not in free}


def test_no_file_is_named_after_nothing_in_particular():
    assert not {"utils", "util", "core", "common", "base", "helpers", "misc"} & {
        part for m in MODULES for part in m.split(".")
    }


@pytest.mark.parametrize("file", [*FILES, *sorted((ROOT / "experiments").glob("*.py"))], ids=lambda file: file.stem)
def test_a_file_says_what_it_is_and_stays_short(file):
    text = file.read_text()
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring
    assert text.startswith('"""')
    assert len(text.splitlines()) <= 400


def test_the_public_names_are_there():
    import jxfer

    for name in jxfer.__all__:
        assert getattr(jxfer, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'pratition'"):
        _ = jxfer.pratition


def test_importing_jxfer_brings_in_nothing_heavy():
    heavy = {
        "tensorflow",
        "torch",
        "grain",
        "tyro",
        "rich",
        "tensorflow_datasets",
        "sklearn",
        "matplotlib",
        "PIL",
        "wandb",
    }
    # flax itself imports rich where it is installed, so what the core's own dependencies bring in does not count.
    code = """
import sys, jax, optax, flax.nnx
before = set(sys.modules)
import jxfer
[getattr(jxfer, name) for name in jxfer.__all__]
print(*(set(sys.modules) - before))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert heavy.isdisjoint(done.stdout.split())


def test_help_does_not_wait_for_jax():
    code = "import sys; from jxfer.cli import main; main(['--help']); assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, check=True)
