"""Panels put together, and written as PNG and SVG."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import reading
from ..cases import Case
from ..records import Report
from . import style
from .suites import Panel, SuitePictures

#: What marks of the panels mean.
MARKS = "†: computes something else"
#: Inches of a panel with its names; of the heading and the small print, together.
PANEL_WIDTH, PANEL_HEIGHT, MARGIN = 7.0, 4.4, 0.9


@dataclass(frozen=True)
class Picture:
    """A figure of matplotlib, the suite that it belongs to, and what it shows in a line."""

    name: str
    suite: str
    title: str
    figure: Any

    def save(self, path: Path) -> Path:
        """In the format of the suffix; the same figures give the same bytes."""
        path.write_bytes(style.rendered(self.figure, path.suffix[1:]))
        return path

    def svg(self) -> str:
        return style.svg(self.figure)


def draw(report: Report, folder: Path) -> list[Path]:
    """Every picture into a folder, as SVG and PNG; where they are.

    Raises:
        ValueError: there is no matplotlib.
    """
    return [picture.save(folder / f"{picture.name}.{suffix}")
            for picture in pictures(report) for suffix in ("svg", "png")]  # fmt: skip


def pictures(report: Report) -> list[Picture]:
    """One for each suite and what its cases do not sweep over.

    Raises:
        ValueError: there is no matplotlib.
    """
    style.need_matplotlib()
    found = []
    for suite in report.suites:
        for one in SuitePictures(report, suite).described():
            made = _figure(one.title, one.panels, report.environment)
            found.append(Picture(one.name, suite, one.title, made))
    return found


def published(report: Report, chosen: Mapping[str, tuple[Sequence[Case], Sequence[str]]]) -> str:
    """One SVG for a document: time and memory by vocabulary, with a digest of what it shows.

    Args:
        report: where the figures are.
        chosen: by suite the cases of one sweep and the keys of the entrants to show.

    Raises:
        ValueError: there is no matplotlib, or nothing to show.
    """
    style.need_matplotlib()
    if not chosen:
        raise ValueError("the results have no cases over the vocabulary to draw")
    panels: dict[str, Panel] = {}
    for suite, (cases, keys) in chosen.items():
        one = SuitePictures(report, suite, keys)
        what = reading.setting(cases[0], "v", "divergence", "temperature", "hidden")
        panels[f"Time: {what}"] = one.times(cases, "v")
        panels[f"Memory: {what}"] = one.peaks(cases, "v")
    title = "Distillation loss, forward + backward, by vocabulary"
    made = _figure(title, panels, report.environment)
    return style.svg(made, digest_of(report, chosen))


def digest_of(report: Report, chosen: Mapping[str, tuple[Sequence[Case], Sequence[str]]]) -> str:
    """Of everything that the published picture shows."""
    shown: list[object] = [reading.machine(report.environment)]
    for suite, (cases, keys) in chosen.items():
        for case in cases:
            shown.append([suite, case.name, reading.floor(report, suite, case)])
            shown += [[x["title"], reading.seconds(x), reading.memory(x)]
                      for x in report.of(suite, case) if x["entrant"] in keys]  # fmt: skip
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()


def _figure(title: str, panels: Mapping[str, Panel], environment: dict[str, Any]) -> Any:
    """Panels two in a row, with their titles, what is shown, and in small print on what."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = -(-len(panels) // 2)
    width, height = 2 * PANEL_WIDTH, rows * PANEL_HEIGHT + MARGIN
    with matplotlib.rc_context(style.SETTINGS):
        figure = Figure(figsize=(width, height))
        inch = 1 / height
        figure.subplots_adjust(left=0.055, right=0.81, top=1 - 0.95 * inch, bottom=0.8 * inch,
                               wspace=0.85, hspace=0.36)  # fmt: skip
        for i, (name, panel) in enumerate(panels.items(), 1):
            axis = figure.add_subplot(rows, 2, i)
            axis.set_title(name)
            panel(axis)
        figure.text(0.012, 1 - 0.38 * inch, title, fontsize=12.5, weight="bold")
        small = f"{reading.machine(environment)}. {MARKS}"
        figure.text(0.012, 0.18 * inch, small, fontsize=7.5, alpha=0.75)
    return figure
