"""What a folder or a table names before anything is decoded: examples with a class, a split, and a file or a text."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePath

from jxfer.data import audio
from jxfer.typing import Input, InputError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
KINDS: Mapping[str, Input] = {
    ".txt": "text",
    **dict.fromkeys(audio.SUFFIXES, "audio"),
    **dict.fromkeys(IMAGE_SUFFIXES, "image"),
}
WORDS: Mapping[Input, str] = {"image": "image", "audio": "sound", "text": "text"}
"""What one example of a kind is called in messages."""


@dataclasses.dataclass(frozen=True)
class Example:
    """One example; `name` is its file's path inside the data set, with slashes, or where in the table it stands."""

    split: str
    class_name: str
    name: str
    text: str = ""
    """What a table has of it; empty where the file holds it."""


@dataclasses.dataclass(frozen=True)
class Listing:
    """A data set as its folder or table describes it; `root` is what the names of files are relative to."""

    name: str
    root: Path
    input: Input
    examples: tuple[Example, ...]
    in_files: bool
    """Whether examples are files below `root`, not texts of a table."""
    version: str
    """A hash over what the table holds; empty where there is none."""
    place: Callable[[Example], str]
    """Where the class of an example is, for messages."""


def kind_of(names: Iterable[str], *, where: str) -> Input:
    """Returns what files are by their suffixes; notes beside images or sounds, at most one for each, do not count.

    Raises:
      InputError: images and sounds are mixed, or there are more texts than what they stand beside.
    """
    suffixes = {name: PurePath(name).suffix.lower() for name in names}
    counts = Counter(KINDS[suffix] for suffix in suffixes.values() if suffix in KINDS)
    others = [kind for kind in counts if kind != "text"]
    if len(others) > 1 or (others and counts["text"] > counts[others[0]]):
        firsts = {KINDS[suffix]: name for name, suffix in reversed(suffixes.items()) if suffix in KINDS}
        first, second, *_ = sorted(firsts.values())
        raise InputError(f"{where} mixes kinds of files: '{first}' and '{second}'; keep one kind")
    return others[0] if others else "text" if counts else "image"


def class_names(listing: Listing) -> tuple[str, ...]:
    """Returns the classes of the training split: sorted, numbers by their value.

    Raises:
      InputError: there is no training example, one class only, or a class with none.
    """
    classes = {example.class_name for example in listing.examples if example.split == "train"}
    things = f"{WORDS[listing.input]}s"
    if len(classes) == 1:
        raise InputError(
            f"'{listing.root}' has {things} of one class only, '{min(classes)}'; classification needs at least two"
        )
    for example in listing.examples:
        if example.class_name not in classes:
            where = listing.root / example.name if listing.in_files else example.name
            raise InputError(f"class '{example.class_name}' has no training {things}, but there is '{where}'")
    return tuple(sorted(classes, key=_by_value if all(map(_is_number, classes)) else str))


def read_text(path: Path) -> str:
    """Returns a file's text, without the mark of the byte order if there is one.

    Raises:
      InputError: it is not UTF-8.
    """
    return decode_text(path.read_bytes(), path)


def decode_text(content: bytes, path: Path) -> str:
    """Returns a file's content as text; `path` names it in errors."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"'{path}', line {line}, is not UTF-8, perhaps Latin-1; convert it: iconv -f latin1 -t utf-8 OLD > NEW"
        ) from error


def _is_number(text: str) -> bool:
    try:
        return float(text) == float(text)
    except ValueError:
        return False


def _by_value(text: str) -> tuple[float, str]:
    return float(text), text
