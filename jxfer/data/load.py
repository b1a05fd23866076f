"""From the name in a config to a data set, and single inputs prepared as those of a data set are."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from jxfer.config import DataConfig
from jxfer.data import prepare, text
from jxfer.data.dataset import Dataset
from jxfer.data.folder import list_folder
from jxfer.data.listing import Listing
from jxfer.data.opening import open_files, open_texts, training_texts, with_texts
from jxfer.data.records import load_records
from jxfer.data.table import list_table
from jxfer.typing import InputError

_LISTINGS: Mapping[str, Callable[[DataConfig], Listing]] = {"folder": list_folder, "table": list_table}


def load_dataset(config: DataConfig) -> Dataset:
    """Opens the data set that `config.name` names; small ones are read into memory.

    Raises:
      InputError: it does not exist, is damaged, or does not fit the config.
    """
    kind, _, _ = config.name.partition(":")
    if kind == "tfds":
        return load_records(config)
    listing = _list(config)
    return open_texts(listing, config) if listing.input == "text" else open_files(listing, config)


def names() -> tuple[str, ...]:
    """Returns what `data.name` may be, with capitals for what the user fills in."""
    own = (f"tfds:{name}" for name in prepare.OWN)
    return (*own, "tfds:NAME[/CONFIG][:VERSION]", "tfds:DIR", "folder:PATH", "table:FILE")


def keep_words(config: DataConfig) -> str:
    """Puts the words of a data set's training texts into the cache and returns the tokeniser's name, `words:N@HASH`.

    So another data set can be read with the same vocabulary. What names a tokeniser without a data set stays as it is.

    Raises:
      InputError: the data set does not exist, holds no texts, or the cache cannot be written.
    """
    name = config.tokenizer or text.DEFAULT_TOKENIZER
    if not re.fullmatch(r"words:\d+", name):
        return name
    return text.keep(_tokenizer(config), int(name.removeprefix("words:")))


def tokenizer_json(config: DataConfig) -> str:
    """Returns the content of the `tokenizer.json` of a data set's texts, for who reads others as them.

    Raises:
      InputError: there is no such tokeniser, or none could be made of the data set's texts.
    """
    return _tokenizer(config).to_str()


def encode_texts(texts: Sequence[str], config: DataConfig) -> Int32[np.ndarray, "N L"]:
    """Maps texts to token ids as the texts of a data set are; `words:N` reads that data set for its words.

    Raises:
      InputError: there is no such tokeniser, or none could be made of the data set's texts.
    """
    return text.encode(_tokenizer(config), texts, config)


def texts_of(config: DataConfig) -> dict[str, str]:
    """Returns the texts of a data set by the ids of its examples, for who looks at them with other tools.

    Raises:
      InputError: the data set does not exist, or holds no texts.
    """
    return {example.name: example.text for example in _listed_texts(config).examples}


def _tokenizer(config: DataConfig) -> Any:
    return text.load_tokenizer(config, lambda: training_texts(_listed_texts(config)))


def _listed_texts(config: DataConfig) -> Listing:
    listing = _list(config)
    if listing.input != "text":
        raise InputError(f"data set '{config.name}' holds no texts")
    return with_texts(listing)[0]


def _list(config: DataConfig) -> Listing:
    kind, _, _ = config.name.partition(":")
    if kind not in _LISTINGS:
        raise InputError(f"unknown data set '{config.name}'; choose one of: {', '.join(names())}")
    return _LISTINGS[kind](config)
