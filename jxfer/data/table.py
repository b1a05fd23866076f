"""A table as a data set: csv, tsv or jsonl with a column of classes and columns of texts, or one of files."""

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from jxfer import paths
from jxfer.config import DataConfig
from jxfer.data.dataset import SPLIT_NAMES
from jxfer.data.listing import Example, Listing, decode_text, kind_of
from jxfer.typing import InputError

FILE, SPLIT = "file", "split"
"""Columns with a meaning of their own: files relative to the table's folder; `train`, `validation` or `test`."""

Row: TypeAlias = tuple[int, Mapping[str, str]]
"""The line that it ends on, and its values by column."""


def list_table(config: DataConfig) -> Listing:
    """Lists the rows of `table:FILE`.

    A csv or tsv file starts with the names of its columns, unless all columns that the config names are numbers: then
    its first line is a row, and columns count from 1. In a tsv file quotes are letters like others.

    Raises:
      InputError: the file is missing, empty, not UTF-8, of another format or damaged, lacks a column, or a row does not
        fit.
    """
    path = Path(config.name.removeprefix("table:")).expanduser().absolute()
    if not path.is_file():
        raise InputError(f"no file '{path}'; data.name is table:FILE, a csv, tsv or jsonl file")
    if path.suffix.lower() not in _READERS:
        raise InputError(f"'{path}' is no table; its name must end in one of: {', '.join(_READERS)}")
    content = path.read_bytes()
    rows = list(_READERS[path.suffix.lower()](decode_text(content, path), path, config))
    if not rows:
        raise InputError(f"'{path}' is empty; it needs a row for each example")
    in_files = FILE in rows[0][1]
    examples = tuple(_example(row, path, config, in_files) for row in rows)
    if in_files:
        _check_files(path, rows, examples)
    if {example.split for example in examples} == {"train"}:
        _check_classes(path, rows, examples, config)
    return Listing(
        name=path.name,
        root=path.parent,
        input=kind_of((example.name for example in examples), where=f"'{path}'") if in_files else "text",
        examples=examples,
        in_files=in_files,
        version=hashlib.blake2b(content, digest_size=8).hexdigest(),
        place=lambda example: f"class '{example.class_name}' of '{path}', split {example.split}",
    )


def _example(row: Row, path: Path, config: DataConfig, in_files: bool) -> Example:
    line, values = row
    label = _value(row, config.label_column, path, "data.label_column").strip()
    if not label:
        raise InputError(f"'{path}', line {line}: column '{config.label_column}' is empty; every row needs a class")
    split = values.get(SPLIT, "train").strip().lower()
    if split not in SPLIT_NAMES:
        raise InputError(f"'{path}', line {line}: split is '{values[SPLIT]}'; choose one of: train, validation, test")
    if in_files:
        return Example(SPLIT_NAMES[split], label, Path(_value(row, FILE, path, "it").strip()).as_posix())
    texts = [_value(row, column, path, "data.text_columns") for column in config.text_columns]
    return Example(SPLIT_NAMES[split], label, f"line {line}", " ".join(texts))


def _value(row: Row, column: str, path: Path, setting: str) -> str:
    line, values = row
    if column not in values:
        raise InputError(
            f"'{path}', line {line}, has no column `{column}`; nearest: {paths.nearest(column, values)}: set {setting}"
        )
    return values[column]


def _csv_rows(text: str, path: Path, config: DataConfig) -> Iterator[Row]:
    yield from _separated(text, path, config, delimiter=",", quoting=csv.QUOTE_MINIMAL)


def _tsv_rows(text: str, path: Path, config: DataConfig) -> Iterator[Row]:
    yield from _separated(text, path, config, delimiter="\t", quoting=csv.QUOTE_NONE)


def _separated(text: str, path: Path, config: DataConfig, *, delimiter: str, quoting: Any) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # the module's own limit, 128 kB, is shorter than some texts
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    columns: list[str] | None = None
    numbered = all(column.isdigit() for column in (*config.text_columns, config.label_column))
    try:
        for values in reader:
            if not values:
                continue
            if columns is None:
                columns = [str(i + 1) for i in range(len(values))] if numbered else [name.strip() for name in values]
                if not numbered:
                    _check_distinct(columns, path)
                    continue
            if len(values) != len(columns):
                counts = f"{len(values)} fields where the first line has {len(columns)}"
                raise InputError(f"'{path}', line {reader.line_num}: {counts}; mend the row")
            yield reader.line_num, dict(zip(columns, values, strict=True))
    except csv.Error as error:
        raise InputError(f"'{path}', line {reader.line_num}: {error}; mend the row") from error


def _json_rows(text: str, path: Path, config: DataConfig) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:  # the latter of brackets in brackets, thousands deep
            reason = getattr(error, "msg", str(error))
            raise InputError(f"'{path}', line {number}: {reason}; each line must be one JSON object") from error
        if not isinstance(values, dict):
            raise InputError(f"'{path}', line {number}: no object but {line.strip()[:40]}; write {{\"column\": value}}")
        wanted = (*config.text_columns, config.label_column, SPLIT, FILE)
        for name in wanted:
            if isinstance(values.get(name), (dict, list)):
                raise InputError(f"'{path}', line {number}: `{name}` is no text or number; give one")
        yield number, {name: _as_text(value) for name, value in values.items() if value is not None}


_READERS = {".csv": _csv_rows, ".tsv": _tsv_rows, ".jsonl": _json_rows}


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _check_distinct(columns: list[str], path: Path) -> None:
    for name, count in Counter(columns).items():
        if count > 1:
            raise InputError(f"'{path}' has {count} columns named `{name}`; rename one")


def _check_files(path: Path, rows: list[Row], examples: tuple[Example, ...]) -> None:
    """Refuses a file listed twice, which could stand in training and test at once, and one that is not there."""
    lines: dict[str, int] = {}
    for (line, _), example in zip(rows, examples, strict=True):
        if example.name in lines:
            raise InputError(f"'{path}', line {line}: '{example.name}' is listed in line {lines[example.name]} already")
        if not (path.parent / example.name).is_file():
            raise InputError(f"'{path}', line {line}: no file '{path.parent / example.name}'")
        lines[example.name] = line


def _check_classes(path: Path, rows: list[Row], examples: tuple[Example, ...], config: DataConfig) -> None:
    """Refuses a class of one example where test examples have yet to be drawn: often the column is the wrong one."""
    counts = Counter(example.class_name for example in examples)
    for (line, _), example in zip(rows, examples, strict=True):
        if counts[example.class_name] == 1:
            raise InputError(
                f"'{path}', line {line}: class '{example.class_name[:40]}' has one example only; add some, remove it,"
                f" or set data.label_column if it is not `{config.label_column}`"
            )
