"""From the name in a config to a data set."""

from jxfer.config import DataConfig
from jxfer.data import prepare
from jxfer.data.dataset import Dataset
from jxfer.data.folder import load_folder
from jxfer.data.records import load_records
from jxfer.typing import InputError


def load_dataset(config: DataConfig) -> Dataset:
    """Opens the data set that `config.name` names; small ones are read into memory.

    Raises:
      InputError: it does not exist, is damaged, or does not fit the config.
    """
    kind, _, _ = config.name.partition(":")
    if kind == "tfds":
        return load_records(config)
    if kind == "folder":
        return load_folder(config)
    raise InputError(f"unknown data set '{config.name}'; choose one of: {', '.join(names())}")


def names() -> tuple[str, ...]:
    """Returns what `data.name` may be, with capitals for what the user fills in."""
    return (*(f"tfds:{name}" for name in prepare.OWN), "tfds:NAME[/CONFIG][:VERSION]", "tfds:DIR", "folder:PATH")
