"""The tables a paper needs, as LaTeX that asks for the package booktabs alone."""

import re
from collections.abc import Iterable

from jxfer.report.document import Cell, Table

_ESCAPES = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{character: f"${character}$" for character in "<>"},
    "±": r"$\pm$",
    "≈": r"$\approx$",
    "×": r"$\times$",
    "−": "$-$",
    "–": "--",
    "…": r"\ldots{}",
    "\u00a0": "~",
}


def latex(tables: Iterable[tuple[str, str, Table]]) -> str:
    """Renders tables, given as label, caption and table, in floats of their own."""
    head = "% Needs \\usepackage{booktabs}. Labels: "
    found = list(tables)
    labels = ", ".join(f"tab:{label}" for label, _, _ in found)
    return "\n\n".join([f"{head}{labels}.", *(_table(label, caption, table) for label, caption, table in found)]) + "\n"


def escape(text: str) -> str:
    """Text that LaTeX prints as it is, on one line."""
    return re.sub(r".", lambda character: _ESCAPES.get(character.group(0), character.group(0)), " ".join(text.split()))


def _table(label: str, caption: str, table: Table) -> str:
    numeric = [any(row[column].value is not None for row in table.rows) for column in range(len(table.header))]
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape(' '.join(filter(None, (caption, table.note))))}}}",
        rf"\label{{tab:{label}}}",
        rf"\begin{{tabular}}{{{''.join('r' if right else 'l' for right in numeric)}}}",
        r"\toprule",
        _row(escape(name) for name in table.header),
        r"\midrule",
        *(_row(map(_cell, row)) for row in table.rows),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines)


def _row(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def _cell(cell: Cell) -> str:
    return rf"\textbf{{{escape(cell.text)}}}" if cell.tone == "best" else escape(cell.text)
