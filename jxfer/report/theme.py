"""The page's style sheet and its one script, which sorts tables; the page is complete without the script."""

from jxfer.report.style import css_colours

_CSS = """
:root { color-scheme: light dark; --back:#fff; --raised:#f6f7f9; --ink:#1b1f24; --muted:#5d6570; --line:#dcdfe4;
  --accent:#1f5fae; --good:#1d7a3f; --bad:#b3261e; LIGHT }
@media (prefers-color-scheme: dark) { :root { --back:#14171b; --raised:#1d2126; --ink:#e6e8eb; --muted:#9aa3ae;
  --line:#343a42; --accent:#7db4f5; --good:#5cc586; --bad:#f28b82; DARK } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 3rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); }
p { margin: .75rem 0; overflow-wrap: anywhere; }
.subtitle, figcaption, .note, .muted, nav { color: var(--muted); }
.certainty { font-size: .925rem; }
.subtitle { margin: .3rem 0 0; font-size: .9rem; }
.headline { font-size: 1.15rem; line-height: 1.5; margin: 1.25rem 0; padding-left: 1rem;
  border-left: 3px solid var(--accent); }
.heading { font-weight: 600; margin: 1.5rem 0 .5rem; }
nav { font-size: .875rem; display: flex; flex-wrap: wrap; gap: .2rem 1rem; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
figure { margin: 1rem 0 1.5rem; }
figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif !important; }
.narrow { display: none; }
figcaption, .note { font-size: .875rem; line-height: 1.45; margin-top: .5rem; }
.scroll { overflow-x: auto; margin: .75rem 0 .25rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .6rem; text-align: left; vertical-align: baseline; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--muted); vertical-align: bottom; line-height: 1.25; }
td { white-space: nowrap; }
td.long { white-space: normal; min-width: 12rem; overflow-wrap: anywhere; }
.num { text-align: right; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--back); padding-left: 0; }
tbody tr:hover td { background: var(--raised); }
th[aria-sort] { cursor: pointer; }
th[aria-sort=ascending]::after { content: " ↑"; }
th[aria-sort=descending]::after { content: " ↓"; }
.best { font-weight: 650; }
.good { color: var(--good); }
.bad { color: var(--bad); }
details { margin: .5rem 0; }
summary { cursor: pointer; color: var(--accent); font-size: .9rem; overflow-wrap: anywhere; }
details[open] > summary { margin-bottom: .5rem; }
pre { background: var(--raised); padding: .75rem 1rem; border-radius: 6px; overflow-x: auto; margin: .75rem 0;
  font: .8125rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(12.5rem, 1fr)); gap: .75rem; }
.card { border: 1px solid var(--line); border-radius: 6px; padding: .75rem; font-size: .8125rem; line-height: 1.4; }
.card img { display: block; width: 6rem; height: 6rem; object-fit: contain; margin-bottom: .5rem; }
.card img.tiny { image-rendering: pixelated; }
.card ul { list-style: none; margin: .4rem 0 0; padding: 0; overflow-wrap: anywhere; }
.card li { padding-left: 1.2em; text-indent: -1.2em; }
@media (max-width: 40rem) {
  main { padding: 1.25rem 1rem 3rem; }
  .wide { display: none; } .narrow { display: block; }
  td:first-child, td:nth-child(2):not(.num) { white-space: normal; min-width: 6.5rem; }
  th, td { padding: .32rem .4rem; }
  .cards { grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); }
}
@media print { details > * { display: block; } nav { display: none; } }
"""

SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const key = (row, i) => row.cells[i].dataset.value ?? row.cells[i].textContent;
  const compare = (a, b) => {
    const x = parseFloat(a), y = parseFloat(b);
    return isNaN(x) || isNaN(y) ? a.localeCompare(b) : x === y ? 0 : x - y;
  };
  heads.forEach((head, i) => {
    const sort = () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach(other => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = [...body.rows].sort((a, b) => (up ? 1 : -1) * compare(key(a, i), key(b, i)));
      body.append(...rows);
    };
    head.setAttribute("aria-sort", "none");
    head.tabIndex = 0;
    head.addEventListener("click", sort);
    head.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
  });
}
"""


def css() -> str:
    """The style sheet with the colours of the series for both schemes."""
    light, dark = css_colours()
    return _CSS.replace("LIGHT", light).replace("DARK", dark)
