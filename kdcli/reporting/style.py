"""How a report looks: one style sheet for light, dark and paper, and the little script that sorts tables."""

SERIES = 6
"""Colours ``--s0`` to ``--s5``: distinguishable with each kind of colour blindness, >= 3:1 on the ground."""

STYLE = """
:root {
  color-scheme: light dark;
  --ground: #ffffff; --ink: #1c2024; --soft: #5c646d; --line: #dfe3e7; --wash: #f5f6f8;
  --s0: #3180dc; --s1: #dd6f00; --s2: #27715f; --s3: #86157b; --s4: #544e10; --s5: #97909a;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --ground: #14171a; --ink: #e4e7ea; --soft: #9aa3ad; --line: #31373e; --wash: #1d2125;
    --s0: #1d84cc; --s1: #ed783f; --s2: #6bc098; --s3: #cc9ed2; --s4: #f1e743; --s5: #7c7e83;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 3.5rem 1.5rem 5rem; max-width: 61rem;
  background: var(--ground); color: var(--ink);
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif;
}
h1 { margin: 0 0 1rem; font-size: 2rem; line-height: 1.2; font-weight: 650; letter-spacing: -0.015em; }
h2 { margin: 3.5rem 0 .75rem; font-size: 1.2rem; line-height: 1.3; font-weight: 650; break-after: avoid; }
h3 { margin: 2rem 0 .4rem; font-size: 1rem; line-height: 1.4; font-weight: 600; break-after: avoid; }
p { margin: 0 0 .75rem; max-width: 44rem; }
.lead { font-size: 1.15rem; line-height: 1.55; }
.soft, figcaption, footer { color: var(--soft); }
.soft, figcaption { font-size: .925rem; }
figcaption { max-width: 44rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td {
  padding: .5rem .8rem .5rem 0; text-align: left; vertical-align: baseline;
  border-bottom: 1px solid var(--line);
}
th:last-child, td:last-child { padding-right: 0; }
th { font-size: .85rem; font-weight: 500; color: var(--soft); vertical-align: bottom; line-height: 1.3; }
.number { text-align: right; white-space: nowrap; }
thead th.number { white-space: normal; }
thead th { max-width: 9rem; }
.tight { white-space: nowrap; }
.note { color: var(--soft); font-size: .9rem; min-width: 7rem; }
tbody th {
  vertical-align: baseline; line-height: inherit; font-size: 1rem; font-weight: 400; color: inherit;
  white-space: nowrap;
}
tbody .long { white-space: normal; min-width: 14rem; overflow-wrap: anywhere; }
.best { font-weight: 700; }
.best::before { content: "\\25B8\\2009"; color: var(--s0); }
th button {
  all: unset; cursor: pointer; border-radius: 2px;
}
th button:hover { color: var(--ink); }
th button:focus-visible { outline: 2px solid var(--s0); outline-offset: 2px; }
th[aria-sort] { color: var(--ink); }
th[aria-sort=ascending] button::after { content: "\\2009\\2191"; }
th[aria-sort=descending] button::after { content: "\\2009\\2193"; }
figure { margin: 1.25rem 0 0; break-inside: avoid; }
figure > svg { display: block; width: 100%; height: auto; margin: .75rem 0; }
figure > svg.phone { display: none; }
.gallery .row { display: grid; grid-template-columns: 9rem 1fr; gap: .25rem 1rem; margin: .5rem 0; }
.gallery .wide { display: block; margin: 1rem 0 1.4rem; }
.strip-title { margin: 0; overflow-wrap: anywhere; }
.strip { display: flex; flex-wrap: wrap; gap: .5rem .6rem; }
.wide .strip { display: grid; grid-template-columns: repeat(auto-fill, minmax(16rem, 1fr)); gap: 1rem 1.2rem; }
.picture { font-size: .85rem; line-height: 1.4; min-width: 0; break-inside: avoid; }
.picture img { display: block; width: 4.5rem; height: 4.5rem; object-fit: contain; background: var(--wash); }
.wide .picture { display: grid; grid-template: auto 1fr / 5.5rem 1fr; gap: 0 .6rem; }
.wide .picture img { width: 5.5rem; height: 5.5rem; grid-row: 1 / 3; }
.wide .picture.film { display: block; }
.gallery .film img { width: 13.5rem; max-width: 100%; height: auto; }
.picture img.pixelated { image-rendering: pixelated; }
.picture p { margin: 0; font-weight: 600; overflow-wrap: anywhere; }
.picture ul { margin: 0; padding: 0; list-style: none; }
.row:not(.wide) .picture:not(.film) { max-width: 7rem; }
.picture li { overflow-wrap: anywhere; }
.picture .model { color: var(--soft); }
.picture .model::after { content: ": "; }
.picture .right, .picture .wrong, .picture .other { display: inline-block; width: 1rem; font-weight: 700; }
.right { color: var(--s2); } .wrong { color: var(--s1); } .other { color: var(--soft); }
.legend-of dl { margin: .5rem 0 0; font-size: .9rem; max-width: 48rem; }
.legend-of dl div { display: grid; grid-template-columns: 11rem 1fr; gap: 0 1rem; padding: .12rem 0; }
.legend-of dt { color: var(--soft); } .legend-of dd { margin: 0; }
header ul.notes { margin-bottom: 1rem; color: var(--ink); }
.legend {
  display: flex; flex-wrap: wrap; gap: .1rem 1.4rem; margin: 0; padding: 0;
  list-style: none; font-size: .9rem;
}
.legend svg { display: inline-block; width: 1.9rem; height: .6rem; margin: 0 .45rem 0 0; vertical-align: middle; }
ol.steps { margin: 0; padding: 0; list-style: none; counter-reset: step; }
ol.steps li { margin: 0 0 1rem; break-inside: avoid; counter-increment: step; }
ol.steps p { display: flex; justify-content: space-between; gap: 1rem; margin: 0 0 .3rem; max-width: none; }
ol.steps p > span:first-child::before { content: counter(step) ".\\2002"; color: var(--soft); }
ol.steps p > span:last-child { color: var(--soft); font-variant-numeric: tabular-nums; white-space: nowrap; }
pre {
  margin: 0; padding: .6rem .9rem .6rem 2.6rem; border-radius: 5px; background: var(--wash);
  font: .84rem/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace;
  text-indent: -1.7rem; white-space: pre-wrap; overflow-wrap: anywhere; user-select: all;
}
pre span { white-space: nowrap; }
pre::before { content: "$"; display: inline-block; width: 1.7rem; text-indent: 0; color: var(--soft); }
details { margin: 1.25rem 0 0; }
summary { cursor: pointer; color: var(--soft); font-size: .925rem; }
summary:hover { color: var(--ink); }
summary:focus-visible { outline: 2px solid var(--s0); outline-offset: 2px; }
ul.notes { margin: 1rem 0 0; padding: 0 0 0 1.1rem; max-width: 44rem; }
ul.notes li { margin-bottom: .35rem; }
dl.versions { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: .2rem 2rem; margin: 0; }
dl.versions div { display: flex; justify-content: space-between; border-bottom: 1px solid var(--line); }
dl.versions dt { color: var(--soft); } dl.versions dd { margin: 0; font-variant-numeric: tabular-nums; }
footer { margin-top: 3rem; font-size: .85rem; }
@media screen and (max-width: 40rem) {
  body { padding: 2rem 1rem 3rem; overflow-wrap: anywhere; }
  h1 { font-size: 1.6rem; }
  figure > svg.desk { display: none; }
  figure > svg.phone { display: block; }
  table:not(.slim) {
    thead { display: none; }
    &, tbody, tr, tbody th { display: block; }
    tr { padding: .5rem 0; border-bottom: 1px solid var(--line); }
    tbody th, td { padding: .1rem 0; border: 0; white-space: normal; }
    tbody th { font-weight: 600; }
    td { display: flex; justify-content: space-between; gap: 1rem; text-align: right; }
    td::before { content: attr(data-label); color: var(--soft); font-size: .9rem; text-align: left; }
    td[data-value=""] { display: none; }
  }
  .note, tbody .long { min-width: 0; }
  .gallery .row, .legend-of dl div { grid-template-columns: 1fr; }
  .legend-of dl div { padding: .3rem 0; }
  pre span { white-space: pre-wrap; }
  dl.versions dd { text-align: right; }
}
@media print {
  @page { margin: 16mm 14mm; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  h2 { margin-top: 1.6rem; }
  .scroll { overflow: visible; }
  .screen { display: none; }
  .legend-of dl { columns: 2; column-gap: 1.5rem; font-size: 7.5pt; line-height: 1.35; max-width: none; }
  .legend-of dl div { grid-template-columns: 7rem 1fr; gap: 0 .5rem; break-inside: avoid; padding: 0; }
  .gallery { break-inside: auto; }
  .gallery .row { grid-template-columns: 5rem 1fr; break-inside: avoid; }
  .picture { font-size: 7.5pt; }
  .row:not(.wide) .picture { max-width: 5.8rem; }
  .wide .strip { grid-template-columns: repeat(3, 1fr); }
  details::details-content { content-visibility: visible; height: auto; }
  summary { list-style: none; }
  table { font-size: 8.5pt; }
  th, td { padding-right: .6rem; }
  th { font-size: 7.5pt; }
  table .note { font-size: inherit; }
  thead .note { font-size: 7.5pt; }
  tbody th { font-size: 8.5pt; white-space: normal; }
  tr, figure, ol.steps li { break-inside: avoid; }
  pre { border: 1px solid var(--line); background: none; }
}
"""

SCRIPT = """
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), table = head.closest("table"), body = table.tBodies[0];
    const column = head.cellIndex, numeric = head.classList.contains("number");
    const old = head.getAttribute("aria-sort");
    const descending = old ? old === "ascending" : numeric;
    const key = (row) => row.cells[column].dataset.value ?? (numeric ? "" : row.cells[column].textContent);
    const order = (a, b) => (numeric ? a - b : a.localeCompare(b)) * (descending ? -1 : 1);
    const rows = [...body.rows].sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      return x === "" || y === "" ? (x === "") - (y === "") : order(x, y);
    });
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    body.append(...rows);
  });
}
"""
