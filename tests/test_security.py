"""What others wrote is data: nothing in the package unpickles, extracts or hands it to a shell."""

import ast
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from jxfer import report
from jxfer.report.predictions import read_arrays
from jxfer.typing import InputError
from jxfer.weights.files import open_tensors

ROOT = Path(__file__).parents[1]
FILES = sorted(
    [*(ROOT / "jxfer").rglob("*.py"), *(ROOT / "experiments").glob("*.py"), *(ROOT / "launch").rglob("*.py")]
)

ALLOWED = {
    ("jxfer/overrides.py", "exec"),  # an experiment is a Python file that the user names
    ("jxfer/weights/torch_files.py", "pickle"),  # an unpickler that knows tensors alone
}

MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "tarfile", "subprocess", "yaml"}
CALLS = {"eval", "exec", "system", "popen", "extract", "extractall", "unpack_archive"}


def uses(file: Path) -> set[str]:
    """Returns the modules and functions of a file by which what is read could come to run or to be written."""
    found = set()
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names} & MODULES
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module).split(".")[0]} & MODULES
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            owner = getattr(getattr(node.func, "value", None), "id", "")
            found |= {name} & CALLS if (name, owner) != ("system", "platform") else set()
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            if (name, owner) == ("load", "np") or name == "read_array":
                found |= set() if getattr(keywords.get("allow_pickle"), "value", True) is False else {"allow_pickle"}
            if getattr(keywords.get("shell"), "value", False):
                found.add("shell")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_unpickles_extracts_or_asks_a_shell(file):
    assert {use for use in uses(file) if (str(file.relative_to(ROOT)), use) not in ALLOWED} == set()


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return (Path.write_text, (self.target, "it ran"))


@pytest.fixture
def trap(tmp_path):
    yield Malicious(tmp_path / "ran")
    assert not (tmp_path / "ran").exists()


def write_npz(path: Path, trap: Malicious, **arrays: np.ndarray) -> None:
    np.savez(path, **arrays, trap=np.array([trap], object))


def test_predictions_and_examples_that_hold_objects_are_no_arrays(tmp_path, trap):
    write_npz(tmp_path / "predictions.npz", trap, ids=np.arange(3))
    assert read_arrays(tmp_path / "predictions.npz") == {}


def test_a_report_of_a_directory_with_such_files_is_built_without_them(tmp_path, trap):
    row = {"experiment": "e", "source": "s", "target": "t", "model": "m", "method": "scratch", "variant": "default"}
    row |= {"shots": 1, "seed": 0, "status": "ok", "error": None, "metrics": {"accuracy": 0.5, "loss": 1.0}}
    (tmp_path / "results.jsonl").write_text(json.dumps(row) + "\n")
    folder = tmp_path / "runs" / "scratch-shots1-seed0"
    folder.mkdir(parents=True)
    names = ("ids", "labels", "logits", "validation_ids", "validation_labels", "validation_logits")
    np.savez(folder / "predictions.npz", **{name: np.array([trap], object) for name in names})
    np.savez(tmp_path / "examples.npz", ids=np.array([trap], object), images=np.zeros((1, 2, 2, 1), np.uint8))
    report.build(tmp_path)
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize("name", ["../outside.npy", "/tmp/outside.npy", "a/../../outside.npy"])
def test_a_member_that_points_out_of_its_archive_is_read_in_place_and_written_nowhere(tmp_path, name):
    content = io.BytesIO()
    np.save(content, np.arange(3.0))
    inner = tmp_path / "inner"
    inner.mkdir()
    with zipfile.ZipFile(inner / "weights.npz", "w") as archive:
        archive.writestr(name, content.getvalue())
    before = sorted(tmp_path.rglob("*"))
    try:
        tensors = open_tensors([inner / "weights.npz"])
    except InputError:
        tensors: dict = {}
    for tensor in tensors.values():
        assert np.asarray(tensor.read()).tolist() == [0, 1, 2]
    assert sorted(tmp_path.rglob("*")) == before
