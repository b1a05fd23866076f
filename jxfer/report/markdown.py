"""The report as Markdown beside its PNG files."""

import html
import re

from jxfer.report.document import Block, Code, Document, Figure, Fold, Gallery, Section, Table, Text


def markdown(document: Document) -> str:
    """Renders the document; tables and text are the same as on the page, figures are links to files beside it."""
    head = f"# {_escape(document.title)}\n\n{_escape(document.subtitle)}\n\n**{_escape(document.headline)}**\n"
    head += f"\n{_escape(document.certainty)}\n"
    return "\n".join([head, *map(_section, document.sections)])


def _section(section: Section) -> str:
    return f"## {_escape(section.title)}\n\n" + "\n\n".join(map(_block, section.blocks)) + "\n"


def _block(block: Block) -> str:
    match block:
        case Text(text, tone):
            return f"**{_escape(text)}**" if tone == "best" else _escape(text)
        case Code(text):
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
            return f"{fence}\n{text}\n{fence}"
        case Table():
            return _table(block)
        case Figure(name=name, alt=alt, caption=caption) | Gallery(name=name, alt=alt, caption=caption):
            return f"![{_escape(alt)}]({name}.png)\n\n{_escape(caption)}"
        case Fold(summary, blocks):
            inside = "\n\n".join(map(_block, blocks))
            return f"<details><summary>{html.escape(_line(summary))}</summary>\n\n{inside}\n\n</details>"


def _table(table: Table) -> str:
    right = [any(row[column].value is not None for row in table.rows) for column in range(len(table.header))]
    lines = [
        _row([_escape(name) for name in table.header]),
        _row(["---:" if numeric else "---" for numeric in right]),
        *(_row([f"**{_escape(c.text)}**" if c.tone == "best" else _escape(c.text) for c in r]) for r in table.rows),
    ]
    return "\n".join(lines) + (f"\n\n{_escape(table.note)}" if table.note else "")


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escape(text: str) -> str:
    return re.sub(r"([\\`*\[\]|])", r"\\\1", html.escape(_line(text), quote=False))


def _line(text: str) -> str:
    return " ".join(text.split())
