"""A folder of images, sounds or texts: sub-folder = class, with split folders around them if there are any."""

from pathlib import Path

from jxfer.config import DataConfig
from jxfer.data.listing import KINDS, WORDS, Example, Listing, kind_of
from jxfer.typing import InputError

SPLIT_FOLDERS = {
    "train": ("train", "training", "training_set"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "test_set", "testing"),
}
"""Split -> what its folder may be called, in any case."""


def list_folder(config: DataConfig) -> Listing:
    """Lists the files of `folder:PATH`, in order of their paths.

    Raises:
      InputError: the folder is missing, empty, laid out differently, or holds several kinds of files.
    """
    root = Path(config.name.removeprefix("folder:")).expanduser().absolute()
    if not root.is_dir():
        raise InputError(f"no folder '{root}'; data.name is folder:PATH with a sub-folder of examples for each class")
    examples = tuple(
        Example(split, class_folder.name, path.relative_to(root).as_posix())
        for split, folder in _split_folders(root).items()
        for class_folder in _visible(folder)
        if class_folder.is_dir()
        for path in _files_below(class_folder)
    )
    kind = kind_of((example.name for example in examples), where=f"folder '{root}'")
    if not any(example.split == "train" for example in examples):
        raise InputError(f"no {WORDS[kind]}s in '{root}'; put them into a sub-folder for each class")
    of_kind = [example.name for example in examples if KINDS.get(Path(example.name).suffix.lower()) == kind]
    _check_layout(root, of_kind or [example.name for example in examples], WORDS[kind])
    depth = 1 if _split_folders(root) == {"train": root} else 2

    def place(example: Example) -> str:
        return f"'{root.joinpath(*example.name.split('/')[:depth])}'"

    return Listing(root.name, root, kind, examples, in_files=True, version="", place=place)


def _check_layout(root: Path, names: list[str], word: str) -> None:
    """Refuses what looks like classes one level too deep: no top-level folder holds an example directly."""
    if names and all(name.count("/") > 1 for name in names) and _split_folders(root) == {"train": root}:
        raise InputError(
            f"no folder in '{root}' holds {word}s directly, the first is '{names[0]}';"
            f" expected CLASS/{word.upper()} or train/CLASS/{word.upper()}: give the folder that holds the class or"
            " split folders"
        )


def _split_folders(root: Path) -> dict[str, Path]:
    """Returns the folder of each split that there is; without split folders all is for training."""
    splits: dict[str, Path] = {}
    strays = []
    for folder in (path for path in _visible(root) if path.is_dir()):
        split = next((split for split, names in SPLIT_FOLDERS.items() if folder.name.lower() in names), None)
        if split is None:
            strays.append(folder)
        elif split in splits:
            raise InputError(f"two folders for one split: '{splits[split]}' and '{folder.name}' are {split}; keep one")
        else:
            splits[split] = folder
    if not splits:
        return {"train": root}
    if "train" not in splits:
        held_out = next(iter(splits.values()))
        raise InputError(f"'{held_out}' is named like a split, but there is no folder 'train' beside it; rename one")
    if strays:
        raise InputError(f"'{strays[0]}' stands beside '{splits['train'].name}' and is no split; move it away")
    return splits


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _files_below(folder: Path) -> list[Path]:
    return [file for path in _visible(folder) for file in (_files_below(path) if path.is_dir() else [path])]
