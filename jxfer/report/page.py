"""The report as one HTML file that asks nothing of any other host, and reads without its script."""

import base64
import hashlib
import math
from html import escape

from jxfer.report.document import Block, Card, Cell, Code, Document, Figure, Fold, Gallery, Section, Table, Text
from jxfer.report.theme import SCRIPT, css

_LONG = 36
"""Characters from which a cell may break into lines."""


def html(document: Document) -> str:
    """Renders the document; every text in it is escaped, and no script but the page's own may run."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    links = "".join(f'<a href="#{_anchor(s)}">{escape(s.title)}</a>' for s in document.sections)
    sections = "\n".join(map(_section, document.sections))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(document.title)}</title>
<link rel="icon" href="data:,">
<style>{css()}</style>
</head>
<body>
<main>
<header>
<h1>{escape(document.title)}</h1>
<p class="subtitle">{escape(document.subtitle)}</p>
<p class="headline">{escape(document.headline)}</p>
<p class="certainty">{escape(document.certainty)}</p>
<nav>{links}</nav>
</header>
{sections}
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _section(section: Section) -> str:
    return f'<section id="{_anchor(section)}">\n<h2>{escape(section.title)}</h2>\n{_blocks(section.blocks)}\n</section>'


def _anchor(section: Section) -> str:
    return section.title.lower().replace(" ", "-")


def _blocks(blocks: tuple[Block, ...]) -> str:
    return "\n".join(map(_block, blocks))


def _block(block: Block) -> str:
    match block:
        case Text(text, tone):
            return f'<p class="{"heading" if tone == "best" else tone}">{escape(text)}</p>'
        case Code(text):
            return f"<pre>{escape(text)}</pre>"
        case Table():
            return _table(block)
        case Figure():
            return _figure(block)
        case Gallery(caption=caption, cards=cards):
            return f'<p class="note">{escape(caption)}</p>\n<div class="cards">{"".join(map(_card, cards))}</div>'
        case Fold(summary, blocks):
            return f"<details><summary>{escape(summary)}</summary>\n{_blocks(blocks)}\n</details>"


def _table(table: Table) -> str:
    numeric = [_is_numeric(table, column) for column in range(len(table.header))]
    head = "".join(
        f"<th{_class('num' * right)}>{escape(h)}</th>" for h, right in zip(table.header, numeric, strict=True)
    )
    body = "\n".join(
        "<tr>" + "".join(_cell(cell, right) for cell, right in zip(row, numeric, strict=True)) + "</tr>"
        for row in table.rows
    )
    note = f'\n<p class="note">{escape(table.note)}</p>' if table.note else ""
    rows = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>"
    return f'<div class="scroll"><table>{rows}</table></div>{note}'


def _cell(cell: Cell, right: bool) -> str:
    classes = " ".join(filter(None, ("num" * right, cell.tone, "long" * (len(cell.text) > _LONG))))
    value = "" if cell.value is None else f' data-value="{cell.value if math.isfinite(cell.value) else 1e300}"'
    return f"<td{_class(classes)}{value}>{_breakable(cell.text)}</td>"


def _is_numeric(table: Table, column: int) -> bool:
    cells = [row[column] for row in table.rows]
    return any(cell.value is not None for cell in cells) and all(c.value is not None or c.text == "–" for c in cells)


def _class(names: str) -> str:
    return f' class="{names}"' if names else ""


def _figure(figure: Figure) -> str:
    return (
        f'<figure id="figure-{figure.name}" role="group" aria-label="{escape(figure.alt)}">'
        f'<div class="wide">{figure.wide}</div><div class="narrow">{figure.narrow}</div>'
        f"<figcaption>{escape(figure.caption)}</figcaption>"
        f"<details><summary>The numbers behind this figure</summary>{_table(figure.data)}</details></figure>"
    )


def _card(card: Card) -> str:
    lines = "".join(
        f'<li class="{"good" if right else "bad"}">{"✓" if right else "✗"} {_breakable(method)}'
        f"{'' if right else f': {_breakable(name)}'}</li>"
        for method, name, right in card.predictions
    )
    tiny = _class("tiny" * card.tiny)
    image = f'<img{tiny} alt="{escape(card.label)}" src="data:image/png;base64,{base64.b64encode(card.png).decode()}">'
    return f'<div class="card">{image}true: <b>{escape(card.label)}</b><ul>{lines}</ul></div>\n'


def _breakable(text: str) -> str:
    """Escaped text that may break after underscores."""
    return escape(text).replace("_", "_<wbr>")
