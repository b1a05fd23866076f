"""The page in a real browser: it renders, its script runs, and nothing is asked of another host."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_report import FIGURES, METHODS, write_fake

from jxfer import report

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--hide-scrollbars",
    "--virtual-time-budget=2000",
    "--dump-dom",
)


_BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome") or ""

pytestmark = pytest.mark.skipif(not _BROWSER, reason="no chromium here; install the package `chromium`")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_fake(tmp_path_factory.mktemp("page"), shots=(1, 20, None), seeds=2, fail={("partial", 1, 0)})
    report.build(directory)
    return directory / "report.html"


def _render(page: Path, profile: Path, *flags: str) -> tuple[str, list[str]]:
    """The DOM after scripts ran, and what the console said."""
    command = [_BROWSER, *_FLAGS, *flags, f"--user-data-dir={profile}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.replace("<wbr>", ""), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_the_page_renders_without_complaint(page: Path, tmp_path: Path):
    dom, console = _render(page, tmp_path)
    assert console == []
    assert all(re.search(rf"<td[^>]*>{method}</td>", dom) for method in METHODS)
    assert 'aria-sort="none"' in dom  # the page's own script passed its policy and ran
    assert dom.count("<svg") == 2 * (len(FIGURES) - 1)  # examples are cards
    assert "&lt;b&gt;" in dom
    assert "<b>&lt;b&gt;" in dom or "<b>a|b</b>" in dom


def _with_script(page: Path, copy: Path, script: str) -> Path:
    """A copy of the page without its policy, with a script of ours at its end."""
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    copy.write_text(html.replace("</body>", f"<script>{script}</script></body>"))
    return copy


DARK, LIGHT = (0, "rgb(20, 23, 27)"), (1, "rgb(255, 255, 255)")


@pytest.mark.parametrize(("width", "scheme"), [(390, DARK), (1200, LIGHT)], ids=["phone, dark", "wide, light"])
def test_the_page_fits_its_window(page: Path, tmp_path: Path, width: int, scheme: tuple[int, str]):
    preferred, background = scheme
    open_all = "document.querySelectorAll('details').forEach(fold => fold.open = true);"
    sizes = "[innerWidth, document.documentElement.scrollWidth, getComputedStyle(document.body).backgroundColor]"
    _with_script(page, tmp_path / "inner.html", f"{open_all} parent.postMessage({sizes}.join('/'), '*')")
    # A window has at least 500 pixels here, a frame any number.
    frame = f'<iframe src="inner.html" width="{width}" height="800"></iframe>'
    listen = "<script>addEventListener('message', event => document.title = event.data)</script>"
    (tmp_path / "outer.html").write_text(f'<html style="color-scheme: light dark"><body>{frame}{listen}</body></html>')
    flag = f"--blink-settings=preferredColorScheme={preferred}"
    dom, console = _render(tmp_path / "outer.html", tmp_path / "profile", flag)
    assert console == []
    assert re.search(r"<title>(.*?)</title>", dom)[1] == f"{width}/{width}/{background}"


def test_a_click_on_a_heading_sorts_by_number(page: Path, tmp_path: Path):
    click = "document.querySelector('.scroll:not(details *) th:nth-child(2)').click()"
    copy = _with_script(page, tmp_path / "clicked.html", click)
    dom, console = _render(copy, tmp_path / "profile")
    assert console == []
    table = next(t for t in re.findall(r"<table>.*?</table>", dom, re.DOTALL) if 'aria-sort="ascending"' in t)
    values = [float(v) for v in re.findall(r'<tr><td>[^<]*</td><td[^>]*data-value="([^"]*)"', table)]
    assert len(values) == len(METHODS)
    assert values == sorted(values)


def test_a_script_that_came_in_with_the_data_would_not_run(page: Path, tmp_path: Path):
    copy = tmp_path / "attacked.html"
    copy.write_text(page.read_text().replace("</main>", "<script>document.title = 'taken'</script></main>"))
    dom, console = _render(copy, tmp_path / "profile")
    assert "<title>taken" not in dom
    assert any("Content Security Policy" in line for line in console)
