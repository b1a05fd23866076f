"""Turns an ablation's directory into a page, Markdown, LaTeX tables and figures, and its rows into a terminal table."""

from collections.abc import Iterator
from pathlib import Path

from jxfer.directory import reporting, write_file
from jxfer.report.comparisons import Comparisons
from jxfer.report.directory import read_directory
from jxfer.report.document import Block, Document, Figure, Fold, Gallery
from jxfer.report.latex import latex
from jxfer.report.markdown import markdown
from jxfer.report.page import html
from jxfer.report.sections import document, paper_tables
from jxfer.report.tables import summary_table

__all__ = ["build", "summary_table"]


def build(directory: Path) -> Comparisons:
    """Writes `report.html`, `report.md`, `tables.tex` and `*.png` into `directory`, each whole or not at all.

    Returns how the methods compare, which `summary_table` marks.

    Raises:
      InputError: there are no finished runs, or a file of the directory cannot be understood, or none written.
    """
    material = read_directory(directory)
    report = document(material)
    with reporting(directory):
        for name, png in _pngs(report):
            write_file(directory / f"{name}.png", png)
        write_file(directory / "report.md", markdown(report).encode())
        write_file(directory / "tables.tex", latex(paper_tables(material)).encode())
        write_file(directory / "report.html", html(report).encode())
    return material.comparisons


def _pngs(report: Document) -> Iterator[tuple[str, bytes]]:
    blocks: list[Block] = [block for section in report.sections for block in section.blocks]
    while blocks:
        match blocks.pop(0):
            case Figure(name=name, png=png) | Gallery(name=name, png=png):
                yield name, png
            case Fold(blocks=inner):
                blocks.extend(inner)
