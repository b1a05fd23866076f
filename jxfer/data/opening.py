"""From a listing to a data set: its files or texts read with one shape for all, what cannot be read named."""

import dataclasses
import hashlib
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from jxfer.config import DataConfig
from jxfer.data import audio, images, text
from jxfer.data.dataset import MEMORY_BYTES, ArraySplit, Dataset, LazySplit, Split, decode_all, usual_splits
from jxfer.data.listing import KINDS, WORDS, Example, Listing, class_names, read_text
from jxfer.data.stall import reading
from jxfer.data.threads import in_threads
from jxfer.typing import Input, InputError

log = logging.getLogger(__name__)

CONTENT_BYTES = 256 * 1024**2
"""Folders of at most this size are told apart by what their files hold; reading larger ones would take too long."""


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reads files of one kind to arrays of one shape."""

    input_shape: tuple[int, ...]
    num_bytes: int
    """Of one example in memory."""
    read: Callable[[Path], np.ndarray]
    sample_rate: int | None = None
    """Of sounds."""


def open_files(listing: Listing, config: DataConfig) -> Dataset:
    """Opens a data set of image or sound files; a small one is read into memory.

    A file that cannot be read is left out, logged as a warning and listed in `skipped`.

    Raises:
      InputError: there is one class only, a class without a readable file, or the files differ in size or rate where
        the config does not say what they are to be.
    """
    headers = _headers(listing)
    examples = [example for example in listing.examples if example.name in headers]
    skipped = [example for example in listing.examples if example.name not in headers]
    _check_left(listing, examples, skipped)
    classes = class_names(dataclasses.replace(listing, examples=tuple(examples)))
    reader = _READERS[listing.input](listing.root, headers, config)
    opened = {
        name: _open_split(listing, [example for example in examples if example.split == name], classes, reader)
        for name in dict.fromkeys(example.split for example in examples)
    }
    splits: dict[str, Split] = dict(opened)
    if len(examples) * reader.num_bytes <= MEMORY_BYTES:
        splits, damaged = _decode_splits(opened)
        skipped += [example for example in examples if example.name in damaged]
        _check_left(listing, [example for example in examples if example.name not in damaged], skipped)
    names = tuple(example.name for example in skipped)
    if names:
        word = WORDS[listing.input]
        log.warning("%d files in '%s' are no readable %ss: %s", len(names), listing.root, word, ", ".join(names))
    return Dataset(
        name=listing.name,
        version=_version(listing, examples),
        class_names=classes,
        splits=usual_splits(splits, name=config.name),
        input_shape=reader.input_shape,
        input=listing.input,
        skipped=names,
        sample_rate=reader.sample_rate,
    )


def open_texts(listing: Listing, config: DataConfig) -> Dataset:
    """Opens a data set of texts as token ids in memory, [N L] int32.

    Raises:
      InputError: a file is not UTF-8, there is one class only, or the tokeniser does not exist.
    """
    listing, skipped = with_texts(listing)
    classes = class_names(listing)
    tokenizer = text.load_tokenizer(config, lambda: training_texts(listing))
    splits: dict[str, Split] = {}
    for name in dict.fromkeys(example.split for example in listing.examples):
        examples = [example for example in listing.examples if example.split == name]
        tokens = text.encode(tokenizer, [example.text for example in examples], config)
        splits[name] = ArraySplit(*_ids_and_labels(examples, classes), {"text": tokens})
    return Dataset(
        name=listing.name,
        version=_version(listing, list(listing.examples)),
        class_names=classes,
        splits=usual_splits(splits, name=config.name),
        input_shape=(text.num_tokens(config),),
        input="text",
        skipped=skipped,
    )


def with_texts(listing: Listing) -> tuple[Listing, tuple[str, ...]]:
    """Returns a listing of texts with the texts of its files, and the names of files that are no texts."""
    if not listing.in_files:
        return listing, ()
    of_kind = [example for example in listing.examples if KINDS.get(Path(example.name).suffix.lower()) == "text"]
    skipped = [example for example in listing.examples if example not in set(of_kind)]
    _check_left(listing, of_kind, skipped)
    read = [dataclasses.replace(example, text=read_text(listing.root / example.name)) for example in of_kind]
    return dataclasses.replace(listing, examples=tuple(read)), tuple(example.name for example in skipped)


def training_texts(listing: Listing) -> list[str]:
    """Returns the texts of the training split; all texts where there is one split, as `usual_splits` has it."""
    splits = {example.split for example in listing.examples}
    return [example.text for example in listing.examples if example.split == "train" or len(splits) == 1]


def read_file(path: Path, config: DataConfig, *, kind: Input, input_shape: tuple[int, ...]) -> np.ndarray:
    """Reads one file as the files of a data set are.

    Args:
      path: the file.
      config: how it is prepared; of sounds `sample_rate` must be set (`Dataset.sample_rate` has it), of texts a
        tokeniser that needs no data set.
      kind: what the file holds.
      input_shape: that of the data set's examples.

    Raises:
      OSError: the file is missing, damaged or of another kind.
      InputError: it is no UTF-8 text, or of another size than `input_shape` where the config does not resize.
    """
    if kind == "text":
        return text.encode(text.load_tokenizer(config), [read_text(path)], config)[0]
    if kind == "audio":
        if config.sample_rate is None:
            raise InputError(f"'{path}' cannot be resampled, since data.sample_rate is not set; set it")
        return audio.decode(path, audio.AudioShape(config.sample_rate, input_shape[0]))
    image = images.decode(path, images.ImageShape.of(config, channels=input_shape[-1]))
    if image.shape != input_shape:
        sizes = f"{image.shape[1]}x{image.shape[0]}, the others {input_shape[1]}x{input_shape[0]}"
        raise InputError(f"'{path}' is {sizes}; set data.image_size to resize them all")
    return image


def _image_reader(root: Path, headers: Mapping[str, tuple[int, ...]], config: DataConfig) -> Reader:
    """Decides size and channels: those of the config, else the size all images share, and colour if any has it."""
    shape = images.ImageShape.of(config, channels=max(channels for _, _, channels in headers.values()))
    first, (rows, columns, _) = next(iter(headers.items()))
    for name, (height, width, _) in headers.items():
        if shape.size is None and (height, width) != (rows, columns):
            sizes = f"'{first}' is {columns}x{rows}, '{name}' is {width}x{height}"
            raise InputError(f"images in '{root}' differ in size: {sizes}; set data.image_size to resize them all")
    rows, columns = (shape.size, shape.size) if shape.size else (rows, columns)
    input_shape = (rows, columns, shape.channels)
    return Reader(input_shape, math.prod(input_shape), lambda path: images.decode(path, shape))


def _audio_reader(root: Path, headers: Mapping[str, tuple[int, ...]], config: DataConfig) -> Reader:
    """Decides rate and length: those of the config, else the rate all sounds share, and the length of the longest."""
    first, (rate, _) = next(iter(headers.items()))
    for name, (other, _) in headers.items():
        if config.sample_rate is None and other != rate:
            rates = f"'{first}' has {rate} samples per second, '{name}' {other}"
            raise InputError(f"sounds in '{root}' differ in rate: {rates}; set data.sample_rate to resample them all")
    rate = config.sample_rate or rate
    longest = max(audio.resampled_length(n, sample_rate=own, new_rate=rate) for own, n in headers.values())
    shape = audio.AudioShape(rate, longest if config.seconds is None else round(config.seconds * rate))
    return Reader((shape.num_samples,), 2 * shape.num_samples, lambda path: audio.decode(path, shape), rate)


_READERS: Mapping[Input, Callable[[Path, Mapping[str, tuple[int, ...]], DataConfig], Reader]] = {
    "image": _image_reader,
    "audio": _audio_reader,
}
_HEADERS: Mapping[Input, Callable[[Path], tuple[int, ...]]] = {
    "image": images.read_header,
    "audio": audio.read_header,
}


def _headers(listing: Listing) -> dict[str, tuple[int, ...]]:
    """Returns what the headers of all files say that can be read, by name."""

    def attempt(example: Example) -> tuple[int, ...] | None:
        try:
            with reading(f"'{listing.root / example.name}'"):
                return _HEADERS[listing.input](listing.root / example.name)
        except OSError:
            return None

    found = list(in_threads(attempt, listing.examples, lambda _: f"the header of a file of '{listing.root}'"))
    named = zip(listing.examples, found, strict=True)
    return {example.name: header for example, header in named if header is not None}


def _check_left(listing: Listing, good: list[Example], bad: list[Example]) -> None:
    """Refuses a class that has files of which none can be read."""
    empty = {listing.place(example) for example in bad} - {listing.place(example) for example in good}
    if empty:
        place = min(empty)
        names = [example.name for example in bad if listing.place(example) == place]
        raise InputError(
            f"no {WORDS[listing.input]} is left in {place}: files that could not be read: {len(names)}, one is"
            f" '{names[0]}'; mend or replace them, or leave the class out"
        )


def _open_split(listing: Listing, examples: list[Example], classes: tuple[str, ...], reader: Reader) -> LazySplit:
    ids, labels = _ids_and_labels(examples, classes)
    return LazySplit(
        ids, labels, lambda index: reader.read(listing.root / examples[index].name), listing.input, str(listing.root)
    )


def _ids_and_labels(examples: list[Example], classes: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    numbers = {name: number for number, name in enumerate(classes)}
    ids = np.array([example.name for example in examples])
    return ids, np.array([numbers[example.class_name] for example in examples], np.int32)


def _decode_splits(opened: dict[str, LazySplit]) -> tuple[dict[str, Split], set[str]]:
    """Reads all splits into memory; returns them without the damaged examples, and the names of these."""
    splits: dict[str, Split] = {}
    damaged = set()
    for name, split in opened.items():
        splits[name], bad = decode_all(split)
        damaged |= {str(split.ids[index]) for index in bad}
    return splits, damaged


def _version(listing: Listing, examples: list[Example]) -> str:
    """Returns a hash over the table if any, and the names, lengths and contents of the files: a change is noticed.

    In folders of more than `CONTENT_BYTES` only names and lengths count: a file replaced by one of equal length is
    not noticed there.
    """
    if not listing.in_files:
        return listing.version
    paths = [listing.root / example.name for example in examples]
    sizes = [path.stat().st_size for path in paths]
    with_contents = sum(sizes) <= CONTENT_BYTES
    digest = hashlib.blake2b(listing.version.encode(), digest_size=8)
    for example, path, size in zip(examples, paths, sizes, strict=True):
        # Linux allows names that are no UTF-8.
        digest.update(f"{example.name}\n{size}\n".encode(errors="surrogateescape"))
        if with_contents:
            digest.update(path.read_bytes())
    return digest.hexdigest()
