"""A report as one HTML file: nothing in it is loaded from elsewhere, and no script runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape
from pathlib import Path

from . import pictures, reading, tables
from .cells import Table
from .pictures import Picture
from .pictures.style import FAINT, INK, PAPER
from .records import Report

TITLE = "fused_kd: benchmarks"
METHOD = (
    "The methods of a case are called in turns, A B C A B C …, after a warm-up, so that "
    "drift of the machine affects all of them equally.",
    "A time is the median of forward and backward of the whole public call, with quartiles; "
    "repetitions during which our threads waited for a processor are repeated or marked.",
    "Inputs are restored and gradients dropped outside the timed region, the same for all; each "
    "case runs in its own process.",
    "Memory is the peak of torch's allocator beyond the inputs, next to that of the "
    "process; errors are relative to float64, and taken before anything is timed.",
    "The lower bound is the time of a copy of the logits or of the bare matrix "
    "products, measured in the same turns.",
)
#: Colours of the two modes; those of the pictures are replaced by them.
STYLE = """
:root{--ink:#1b1f24;--paper:#fdfdfc;--faint:#b7bec8;--wash:#f1f3f5;--link:#0067a5}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaed;--paper:#15181c;--faint:#5b636e;
--wash:#20252b;--link:#7cc4f5}}
:root{color-scheme:light dark}
body{background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif;margin:0 auto;
max-width:1240px;padding:1.5rem}
h1,h2,h3{line-height:1.2}h2{border-top:2px solid var(--faint);padding-top:1rem;margin-top:2.5rem}
a{color:var(--link)}nav a{margin-right:1rem}
figure{margin:1rem 0}figure svg{width:100%;height:auto}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:.7rem 0;font-size:13px}
th,td{padding:.2rem .6rem;text-align:right;border-bottom:1px solid var(--faint);white-space:nowrap}
th{background:var(--wash)}.left{text-align:left}td.note{white-space:normal;min-width:16rem}
summary{cursor:pointer;padding:.2rem 0}
.lost{font-weight:600}
"""


def write(report: Report, path: Path) -> Path:
    """The page of a report.

    Raises:
        ValueError: there is no matplotlib.
    """
    path.write_text(page(report))
    return path


def page(report: Report) -> str:
    """The same as text."""
    drawn = pictures.pictures(report)
    links = "".join(f'<a href="#{escape(s)}">{escape(s)}</a>' for s in [*report.suites, "goals"])
    body = [
        f"<h1>{TITLE}</h1>", f"<p>{escape(reading.machine(report.environment))}</p>",
        f"<nav>{links}</nav>", f"<p>{escape(' '.join(METHOD))}</p>",
        *(text for suite in report.suites for text in _suite(report, suite, drawn)),
        '<h2 id="goals">Goals</h2>', _goals(report),
        "<h2>Environment</h2>", *(_environment(run) for run in report.runs[-1:]),
    ]  # fmt: skip
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n<title>{TITLE}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _suite(report: Report, suite: str, drawn: list[Picture]) -> Iterator[str]:
    """Return pictures, overviews, where we lose, every case, and the methods left out."""
    yield f'<h2 id="{escape(suite)}">{escape(suite)}</h2>'
    for number, picture in enumerate(drawn):
        if picture.suite == suite:
            yield (f'<figure role="img" aria-label="{escape(picture.title)}">'
                   f"{inline(picture.svg(), f'p{number}-')}</figure>")  # fmt: skip
    for title, cells in tables.overviews(report, suite):
        yield f"<h3>{escape(title)}</h3>{_table(cells)}"
    yield _list("Faster than ours", tables.faster_lines(report, suite))
    for case in report.cases(suite):
        if any(reading.seconds(line) is not None for line in report.of(suite, case)):
            yield (f"<details><summary>{escape(case.name)}</summary>"
                   f"{_table(tables.case_cells(report, suite, case))}</details>")  # fmt: skip
    yield _list("Left out", tables.left_out_lines(report, suite))


def _list(title: str, lines: list[str]) -> str:
    """Of sentences; nothing where there are none."""
    if not lines:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<details open><summary>{title}</summary><ul>{items}</ul></details>"


def _table(cells: Table) -> str:
    last = len(cells.head) - 1

    def row(tag: str, content: list[str]) -> str:
        made = ""
        for i, cell in enumerate(content):
            is_note = cells.note and i == last
            kind = ' class="left note"' if is_note else ' class="left"' if i < cells.left else ""
            made += f"<{tag}{kind}>{escape(cell)}</{tag}>"
        return f"<tr>{made}</tr>"

    rows = "".join(row("td", line) for line in cells.rows)
    return f'<div class="wide"><table>{row("th", cells.head)}{rows}</table></div>'


def _goals(report: Report) -> str:
    cells = tables.goals_cells(report)
    if not cells.rows:
        return "<p>There are no figures for any of them.</p>"
    return _table(cells).replace("<td>NOT reached</td>", '<td class="lost">NOT reached</td>')


def _environment(run: dict[str, object]) -> str:
    found: dict[str, object] = {}
    for part in ("environment", "packages"):
        content = run.get(part)
        found.update(content if isinstance(content, dict) else {})
    command = run.get("command")
    found["command"] = " ".join(map(str, command)) if isinstance(command, list) else ""
    rows = [[name.replace("_", " "), str(value)] for name, value in found.items()]
    return _table(Table(["", ""], rows, left=2))


def inline(svg: str, prefix: str) -> str:
    """An SVG file as an element of a page, in the page's colours, with names of its own."""
    element = svg[svg.index("<svg ") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r' xmlns(:\w+)?="[^"]*"', "", element).replace("xlink:href=", "href=")
    element = re.sub(r'\bid="', f'id="{prefix}', element)
    element = re.sub(r'href="#', f'href="#{prefix}', element)
    element = element.replace("url(#", f"url(#{prefix}")
    for colour, name in ((INK, "ink"), (PAPER, "paper"), (FAINT, "faint")):
        element = element.replace(colour, f"var(--{name})")
    return element
