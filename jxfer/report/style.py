"""How figures look: one colour and marker per method, and SVG whose colours follow the page, light or dark."""

import contextlib
import dataclasses
import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from jxfer.report.document import Figure, Table

WIDE_INCHES = 7.4
NARROW_INCHES = 3.9
NARROW_BELOW = 5.0
INK = "#1b1f24"
MUTED = "#5d6570"
LINE = "#dcdfe4"
HEAT = "#2563b8"
PAPER = "#fefefe"
"""The page's background in a drawing; white itself stays white, as in the numbers on dark cells."""
_PIXELS_PER_POINT = 1.75  # at most: a larger drawing would have letters larger than the text around it
_GREY = "#70767e"
# After Okabe and Ito's palette for all kinds of colour vision, without its yellow, which white swallows.
_LIGHT = ("#0072b2", "#d55e00", "#00855f", "#b5508a", "#b07a00", "#3a9bd9", "#6a4fb3", _GREY)
_DARK = ("#4fa8e0", "#f2854a", "#35c79d", "#e08fbe", "#e3b341", "#93d2f7", "#a792ea", "#a9b0b8")
_MARKERS = "os^DvPX<>"  # nine, so that 7 colours x 9 markers repeat only after 63 methods
_VARIABLES = {INK: "currentColor", MUTED: "var(--muted)", LINE: "var(--line)", PAPER: "var(--back)"} | {
    colour: f"var(--c{index})" for index, colour in enumerate(_LIGHT)
}
_SETTINGS: dict[str, Any] = {
    "font.size": 9,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 9,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,  # a class may be called `$x`
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
}


@dataclasses.dataclass(frozen=True)
class Look:
    """The colour, marker and line by which a method is known in every figure."""

    colour: str
    marker: str
    line: Literal["-", "--"]


def looks(methods: Sequence[str], baselines: Sequence[str]) -> dict[str, Look]:
    """One look per method; those without transfer are grey and dashed."""
    others = [name for name in methods if name not in baselines]
    colours = _LIGHT[:-1]
    found = {n: Look(colours[i % len(colours)], _MARKERS[i % len(_MARKERS)], "-") for i, n in enumerate(others)}
    found |= {n: Look(_GREY, _MARKERS[-1 - i % len(_MARKERS)], "--") for i, n in enumerate(baselines)}
    return {name: found[name] for name in methods}


def css_colours() -> tuple[str, str]:
    """The CSS variables of the series, for a light and for a dark page."""
    light = "".join(f"--c{index}:{colour};" for index, colour in enumerate(_LIGHT))
    return light, "".join(f"--c{index}:{colour};" for index, colour in enumerate(_DARK))


def picture(draw: Callable[[float], Any], *, name: str, alt: str, caption: str, data: Table) -> Figure:
    """Draws at both widths. `draw` takes the width in inches and returns a matplotlib figure."""
    with drawing(f"{name}{WIDE_INCHES}"):
        canvas = draw(WIDE_INCHES)
        wide = _svg(canvas)
        canvas.set_layout_engine("none")  # laid out already, and half of the work
        png = png_bytes(canvas)
    with drawing(f"{name}{NARROW_INCHES}"):
        narrow = _svg(draw(NARROW_INCHES))
    return Figure(name=name, alt=alt, caption=caption, wide=wide, narrow=narrow, png=png, data=data)


@contextlib.contextmanager
def drawing(salt: str) -> Iterator[None]:
    """Matplotlib with the report's settings; `salt` keeps element ids of figures on one page apart."""
    import matplotlib

    settings: Any = _SETTINGS | {"svg.hashsalt": salt}  # newer matplotlib types every key
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # A class may be named in a script that the font lacks: the PNG shows boxes, the page the right letters.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def png_bytes(figure: Any) -> bytes:
    """The figure on white, at 160 dots per inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor="white")
    return buffer.getvalue()


def shorten(text: str, length: int = 18) -> str:
    """One line of at most `length` characters; a long one loses its middle, since names often differ at the end."""
    line = " ".join(text.split())
    if len(line) <= length:
        return line
    tail = (length - 1) // 2
    return f"{line[: length - 1 - tail]}…{line[-tail:]}"


def _svg(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue().decode())


def _inline(svg: str) -> str:
    """Strips what only a file of its own needs, and lets colours follow the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    head, body = svg.split(">", 1)
    _, _, width, height = re.findall(r"[\d.]+", head[head.index("viewBox=") :])[:4]
    body = body.replace("xlink:href", "href")
    body = re.sub(r'style="[^"]*"', _follow_page, body)
    size = f"max-width:{_PIXELS_PER_POINT * float(width):.0f}px"
    return f'<svg viewBox="0 0 {width} {height}" style="{size}" aria-hidden="true">{body}'


def _follow_page(style: re.Match[str]) -> str:
    return re.sub(r"#[0-9a-f]{6}", lambda colour: _VARIABLES.get(colour.group(0), colour.group(0)), style.group(0))
