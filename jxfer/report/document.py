"""What a report is made of, before it becomes HTML or Markdown: sections of text, tables, figures and cards."""

import dataclasses
from typing import Literal, TypeAlias

from jxfer.report.results import Summary
from jxfer.report.statistics import Difference

Tone = Literal["", "best", "good", "bad", "muted"]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One entry of a table: its text, the number it sorts by, and how it is set off."""

    text: str
    value: float | int | None = None
    tone: Tone = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells under a header; plain strings are cells without a number."""

    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    tone: Tone = ""


@dataclasses.dataclass(frozen=True)
class Code:
    """Text whose line breaks and spaces matter."""

    text: str


@dataclasses.dataclass(frozen=True)
class Figure:
    """A drawing at two widths as SVG that follows the page's colours, once as PNG, and the numbers behind it."""

    name: str
    alt: str
    caption: str
    wide: str
    narrow: str
    png: bytes
    data: Table


@dataclasses.dataclass(frozen=True)
class Card:
    """A test example: its picture, its class, and what each method took it for."""

    png: bytes
    tiny: bool
    """Fewer pixels than it is shown with, so that they should stay square."""
    label: str
    predictions: tuple[tuple[str, str, bool], ...]
    """(method, predicted class, whether right)."""


@dataclasses.dataclass(frozen=True)
class Gallery:
    """Cards on the page; one PNG in Markdown."""

    name: str
    alt: str
    caption: str
    cards: tuple[Card, ...]
    png: bytes


@dataclasses.dataclass(frozen=True)
class Fold:
    """Blocks shown on demand."""

    summary: str
    blocks: "tuple[Block, ...]"


Block: TypeAlias = Table | Text | Code | Figure | Gallery | Fold


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: tuple[Block, ...]


@dataclasses.dataclass(frozen=True)
class Document:
    """The whole report; `headline` is its finding in a sentence or two, `certainty` says how sure that is."""

    title: str
    subtitle: str
    headline: str
    certainty: str
    sections: tuple[Section, ...]


def number(value: float | int | None) -> Cell:
    """A count or an amount with an SI prefix: `1.23 M`."""
    return _scaled(value, 1000.0, ("", "k", "M", "G", "T", "P", "E"), "")


def size(value: float | int | None) -> Cell:
    """Bytes with a binary prefix: `1.23 MiB`."""
    return _scaled(value, 1024.0, ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"), "B")


def seconds(value: float | int | None) -> Cell:
    """A duration in seconds, or in minutes and hours where that reads better."""
    if value is None:
        return Cell("–", tone="muted")
    if value < 120:
        return Cell(f"{value:.3g} s", value)
    return Cell(f"{value / 60:.3g} min" if value < 7200 else f"{value / 3600:.3g} h", value)


def percent(summary: Summary | None, tone: Tone = "") -> Cell:
    """A mean accuracy with its half-width, in percent: `75.3 ± 1.2`."""
    if summary is None:
        return Cell("–", tone="muted")
    return Cell(percent_text(summary), summary.mean, tone)


def plus_minus(summary: Summary, *, digits: int) -> Cell:
    """A mean with its half-width, as it is."""
    spread = "" if summary.half_width is None else f" ± {summary.half_width:.{digits}f}"
    return Cell(f"{summary.mean:.{digits}f}{spread}", summary.mean)


def percent_text(summary: Summary) -> str:
    """`75.3 ± 1.2`, or `75.3` where one seed gives no interval."""
    spread = "" if summary.half_width is None else f" ± {100 * summary.half_width:.1f}"
    return f"{100 * summary.mean:.1f}{spread}"


def points_text(difference: float) -> str:
    """A difference of accuracies in points: `+1.2`, `−0.3`."""
    return f"{100 * difference:+.1f}".replace("-", "−")


def difference_text(difference: Difference) -> str:
    """`+1.2 (−0.3 to +2.7)`, in points."""
    low, high = points_text(difference.low), points_text(difference.high)
    return f"{points_text(difference.mean)} ({low} to {high})"


def p_text(p: float) -> str:
    """`p = 0.012`, `p < 0.001`."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def _scaled(value: float | int | None, base: float, prefixes: tuple[str, ...], unit: str) -> Cell:
    if value is None:
        return Cell("–", tone="muted")
    scaled, step = float(value), 0
    while abs(scaled) >= base and step < len(prefixes) - 1:
        scaled, step = scaled / base, step + 1
    digits = f"{scaled:.0f}" if step == 0 or scaled >= 100 else f"{scaled:.3g}"
    return Cell(f"{digits} {prefixes[step]}{unit}".rstrip(), float(value))
