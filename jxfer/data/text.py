"""From texts to token ids of one length, by a published tokeniser or a vocabulary of words, through `tokenizers`."""

import functools
import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32

from jxfer.config import DataConfig
from jxfer.data.prepare import cache_dir
from jxfer.typing import InputError

DEFAULT_TOKENIZER = "words:20000"
DEFAULT_TOKENS = 128

PADDING, UNKNOWN = "[PAD]", "[UNK]"
"""The first two entries of a vocabulary of words: ids 0 and 1."""

PADDINGS = (PADDING, "<pad>", "<|padding|>", "<|endoftext|>")
"""What published tokenisers call padding where they do not say; the last serves those that have none."""

WORDS = re.compile(r"words:(\d+)(?:@([0-9a-f]{16}))?")
ORIGINS = ("hf", "file", "pkg")

CHUNK = 10_000  # texts whose tokens are held as objects at once; each is some kilobytes


def num_tokens(config: DataConfig) -> int:
    """Returns how long every text becomes."""
    return config.max_tokens or DEFAULT_TOKENS


def load_tokenizer(config: DataConfig, training_texts: Callable[[], Iterable[str]] | None = None) -> Any:
    """Returns the `tokenizers.Tokenizer` that a config names.

    Args:
      config: `tokenizer` is an origin of a `tokenizer.json`, `words:N`, `words:N@HASH` or `vectors:FILE`.
      training_texts: where `words:N` takes its words from; None where there is no data set.

    Raises:
      InputError: there is no such tokeniser, it is damaged, `words:N` has no data set, or `tokenizers` is missing.
    """
    name = config.tokenizer or DEFAULT_TOKENIZER
    kind, _, rest = name.partition(":")
    if found := WORDS.fullmatch(name):
        count, kept = int(found[1]), found[2]
        if kept is not None:
            return _parse(_kept_file(kept, name), name)
        if training_texts is None:
            raise InputError(f"data.tokenizer is '{name}', whose words come from a data set; give a tokenizer.json")
        return words_tokenizer(training_texts(), count)
    if kind == "vectors":
        words = [word for word, _ in _read_vectors(Path(rest).expanduser())]
        return _of_words(words, lowercase=all(word == word.lower() for word in words))
    if kind in ORIGINS:
        return _parse(_fetch(name), name)
    choices = "`words:N`, `vectors:FILE`, `hf:OWNER/NAME`, `file:PATH` or `pkg:NAME`"
    raise InputError(f"data.tokenizer is '{name}'; it must be {choices}")


def words_tokenizer(texts: Iterable[str], count: int) -> Any:
    """Returns a tokeniser of `count` ids: padding, unknown, and the most frequent words; ties in order of the alphabet.

    Texts are normalised (Unicode's NFKC), lower-cased, and split at spaces and around every punctuation mark.
    """
    tokenizers = _tokenizers()
    if count < 3:
        raise InputError(f"data.tokenizer is 'words:{count}'; it needs at least 3, with padding and unknown")
    tokenizer = _of_words([], lowercase=True)
    options = {"min_frequency": 1, "show_progress": False, "special_tokens": []}
    trainer = tokenizers.trainers.WordLevelTrainer(vocab_size=count - 2, **options)
    tokenizer.train_from_iterator(texts, trainer)
    vocabulary = tokenizer.get_vocab()
    return _of_words(sorted(vocabulary, key=vocabulary.__getitem__), lowercase=True)


def keep(tokenizer: Any, count: int) -> str:
    """Puts a vocabulary of words into the cache and returns the name by which a config finds it, `words:N@HASH`.

    Raises:
      InputError: the cache cannot be written.
    """
    content = tokenizer.to_str()
    name = hashlib.sha256(content.encode()).hexdigest()[:16]
    folder = cache_dir() / "tokenizers"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False, encoding="utf-8") as file:
            file.write(content)
        os.replace(file.name, folder / f"{name}.json")
    except OSError as error:
        raise InputError(f"cannot write to the cache: {error}; set JXFER_CACHE to a folder of yours") from error
    return f"words:{count}@{name}"


def encode(tokenizer: Any, texts: Sequence[str], config: DataConfig) -> Int32[np.ndarray, "N L"]:
    """Maps texts to token ids, cut or filled with padding to the config's length.

    Raises:
      InputError: the tokeniser names no padding, or marks of its own leave no room for a text.
    """
    length = num_tokens(config)
    marks = tokenizer.num_special_tokens_to_add(False)
    if length <= marks:
        raise InputError(f"data.max_tokens is {length}, but the tokeniser adds {marks} marks to every text; raise it")
    ready = _of_length(tokenizer.to_str(), length)
    tokens = np.empty((len(texts), length), np.int32)
    for start in range(0, len(texts), CHUNK):
        chunk = ready.encode_batch_fast(texts[start : start + CHUNK])
        tokens[start : start + CHUNK] = [encoding.ids for encoding in chunk]
    return tokens


def read_vectors(path: Path) -> tuple[list[str], Float32[np.ndarray, "V D"]]:
    """Reads a text file of word vectors, `word v1 v2 ...` on each line, with or without a first line of two counts.

    The ids are those of the tokeniser `vectors:FILE`: padding, whose vector is zero, unknown, whose vector is the mean
    of all (Pennington et al. 2014, GloVe, advise that), and the words in the order of the file.

    Raises:
      InputError: the file is missing, or a line has no or another number of values.
    """
    lines = list(_read_vectors(path))
    size = len(lines[0][1].split()) if lines else 0
    if size == 0:
        raise InputError(f"'{path}' holds no word vectors; each line must be `word v1 v2 ...`")
    vectors = np.zeros((len(lines) + 2, size), np.float32)
    for index, (word, values) in enumerate(lines):
        try:
            vectors[index + 2] = np.array(values.split(), np.float32)
        except ValueError as error:
            raise InputError(f"'{path}': the vector of '{word}' has not {size} numbers; mend it") from error
    vectors[1] = vectors[2:].mean(axis=0)
    return [PADDING, UNKNOWN, *(word for word, _ in lines)], vectors


def _of_words(words: Sequence[str], *, lowercase: bool) -> Any:
    tokenizers = _tokenizers()
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys([PADDING, UNKNOWN, *words]))}
    normalizers = [tokenizers.normalizers.NFKC(), *([tokenizers.normalizers.Lowercase()] if lowercase else [])]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = tokenizers.normalizers.Sequence(normalizers)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    return tokenizer


@functools.lru_cache(maxsize=4)
def _of_length(content: str, length: int) -> Any:
    """Returns a tokeniser of its own that cuts and fills; kept, since prediction encodes one text after the other."""
    tokenizer = _tokenizers().Tokenizer.from_str(content)
    pad_id, pad_token = _padding(tokenizer)
    tokenizer.enable_truncation(max_length=length)
    tokenizer.enable_padding(length=length, pad_id=pad_id, pad_token=pad_token)
    return tokenizer


def _padding(tokenizer: Any) -> tuple[int, str]:
    if tokenizer.padding is not None:
        return tokenizer.padding["pad_id"], tokenizer.padding["pad_token"]
    for token in PADDINGS:
        if (token_id := tokenizer.token_to_id(token)) is not None:
            return token_id, token
    raise InputError(f"the tokeniser names no padding and has none of: {', '.join(PADDINGS)}; take another")


def _read_vectors(path: Path) -> Iterator[tuple[str, str]]:
    """Yields words and their values; a first line of two whole numbers only counts what follows.

    A word may hold spaces, as some of GloVe do: the first vector says how many numbers a line ends with.
    """
    if not path.is_file():
        raise InputError(f"no file '{path}'; data.tokenizer is vectors:FILE, a text file of word vectors")
    seen, size = {PADDING, UNKNOWN}, 0
    with path.open(encoding="utf-8", errors="replace", newline="\n") as lines:
        for number, line in enumerate(lines):
            fields = line.rstrip().split(" ")
            if number == 0 and len(fields) == 2 and all(field.isdigit() for field in fields):
                continue
            size = size or len(fields) - 1
            word = " ".join(fields[: max(1, len(fields) - size)])
            if word and word not in seen:
                seen.add(word)
                yield word, " ".join(fields[-size:] if size else [])


def _kept_file(name: str, tokenizer: str) -> Path:
    path = cache_dir() / "tokenizers" / f"{name}.json"
    if not path.is_file():
        raise InputError(f"no vocabulary '{path}' for data.tokenizer '{tokenizer}'; set JXFER_CACHE to where it is")
    return path


def _fetch(origin: str) -> Path:
    from jxfer.origins import fetch

    path = fetch(origin, "tokenizer.json")
    if path is None:
        raise InputError(f"'{origin}' has no tokenizer.json; set data.tokenizer to one that has")
    return path


def _parse(path: Path, name: str) -> Any:
    try:
        return _parsed(str(path), path.stat().st_mtime_ns)
    except InputError:
        raise
    except Exception as error:  # the package raises nothing narrower
        reason = str(error).splitlines()[0][:100]
        raise InputError(f"data.tokenizer '{name}': '{path}' cannot be read: {reason}") from error


@functools.lru_cache(maxsize=4)
def _parsed(path: str, changed: int) -> Any:
    del changed  # only tells versions of the file apart
    return _tokenizers().Tokenizer.from_file(path)


def _tokenizers() -> Any:
    try:
        import tokenizers
        import tokenizers.models
        import tokenizers.normalizers
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError as error:
        raise InputError("texts need the package `tokenizers`: pip install 'jxfer[text]'") from error
    return tokenizers
