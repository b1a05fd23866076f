"""The data sets that jxfer makes itself: TFDS builders run once into the user's cache, without TensorFlow."""

import contextlib
import importlib
import io
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from jxfer.typing import InputError

OWN = {
    "jxfer_digits": ("jxfer.data.digits", "JxferDigits", ()),
    "jxfer_glyphs": ("jxfer.data.glyphs", "JxferGlyphs", ("8x8", "32x32")),
}
"""Name -> module, class, configs (the first is the default); the modules import TFDS, so they are loaded on demand."""


def cache_dir() -> Path:
    """Returns `$JXFER_CACHE`, or `jxfer` in the user's cache directory."""
    if own := os.environ.get("JXFER_CACHE"):
        return Path(own).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "jxfer"


def prepare(name: str, *, config: str | None, version: str | None) -> Path:
    """Returns the folder of one of `OWN`, after making it if it is not in the cache.

    It is built in a folder of its own and renamed into place, so a killed run leaves no half data set behind and two
    processes may prepare the same one at once: the first to finish wins.

    Raises:
      InputError: there is no such config or version.
    """
    module, class_name, configs = OWN[name]
    if config is not None and config not in configs:
        raise InputError(f"data set '{name}' has no config '{config}'; its configs: {', '.join(configs) or 'none'}")
    builder_class = getattr(importlib.import_module(module), class_name)
    root = cache_dir() / "tfds"
    final = Path(builder_class(data_dir=root, config=config, file_format="array_record").data_dir)
    if version not in (None, final.name):
        raise InputError(f"data set '{name}' has no version {version}; this jxfer makes {final.name}")
    if not final.is_dir():
        _prepare_into(final, builder_class, config, scratch_root=root)
    return final


def _prepare_into(final: Path, builder_class: Any, config: str | None, *, scratch_root: Path) -> None:
    try:
        scratch_root.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix="preparing-", dir=scratch_root)
    except OSError as error:
        raise InputError(f"cannot write to the cache: {error}; set JXFER_CACHE to a folder of yours") from error
    print(f"preparing {final} ...", file=sys.stderr, flush=True)
    start = time.perf_counter()
    with scratch:
        _publish(_build(builder_class, Path(scratch.name), config), final)
    print(f"prepared in {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)


def _build(builder_class: Any, directory: Path, config: str | None) -> Path:
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    builder = builder_class(data_dir=directory, config=config, file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()):  # where TFDS announces itself; standard output is for results
        builder.download_and_prepare()
    return Path(builder.data_dir)


def _publish(made: Path, final: Path) -> None:
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        made.rename(final)
    except OSError:
        if not final.is_dir():  # otherwise another process was first, with the same contents
            raise
