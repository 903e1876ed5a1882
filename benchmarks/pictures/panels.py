"""The panels that pictures are made of; each is drawn on matplotlib axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..cells import figure
from .style import FAINT, INK, Look, Name, name_ends, short

#: Where a figure that is no positive number is drawn on a logarithmic axis of memory or errors.
LEAST_MEMORY, LEAST_ERROR = 2.0**-10, 1e-9
#: Below and above the errors, as a factor.
ERROR_MARGIN = 6.0


@dataclass(frozen=True)
class Series:
    """One entrant: points (x, y)."""

    title: str
    look: Look
    points: list[tuple[float, float]]


@dataclass(frozen=True)
class Guide:
    """A dashed line that belongs to no method."""

    title: str
    points: list[tuple[float, float]]
    colour: str = INK


def lines(
    axis: Any, series: Sequence[Series], xlabel: str, ylabel: str, guides: Sequence[Guide] = ()
) -> None:
    """y against x, both logarithmic, a line for each entrant with its name at the end."""
    axis.set_xscale("log")
    axis.set_yscale("log")
    names = []
    for guide in guides:
        axis.plot(*zip(*guide.points, strict=True), linestyle=(0, (5, 3)), color=guide.colour,
                  linewidth=1.4, zorder=5)  # fmt: skip
        names.append(Name(*guide.points[-1], guide.title, guide.colour, "bold"))
    for one in series:
        look = one.look
        axis.plot(*zip(*one.points, strict=True), linestyle=look.dashes, color=look.colour,
                  marker=look.marker, linewidth=look.width, markersize=look.size,
                  zorder=look.order)  # fmt: skip
        names.append(Name(*one.points[-1], one.title, look.colour, look.weight))
    values = sorted({x for one in series for x, _ in one.points})
    axis.set_xticks(values, [f"{x:g}" if x < 1e4 else f"{x / 1e3:.0f}k" for x in values])
    axis.set_xticks([], minor=True)
    _plain_numbers(axis.yaxis)
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    name_ends(axis, names)


def scatter(axis: Any, series: Sequence[Series], xlabel: str, ylabel: str) -> None:
    """A point for each entrant, with its name; both axes logarithmic."""
    axis.set_xscale("log")
    axis.set_yscale("log")
    names = []
    for one in series:
        (point,), look = one.points, one.look
        axis.plot(*point, marker=look.marker, color=look.colour, linestyle="none",
                  markersize=look.size + 2, zorder=look.order)  # fmt: skip
        names.append(Name(*point, one.title, look.colour, look.weight))
    axis.margins(0.1)
    _plain_numbers(axis.xaxis)
    errors = [one.points[0][1] for one in series]  # what differs by rounding is to look alike
    axis.set_ylim(min(errors) / ERROR_MARGIN, max(errors) * ERROR_MARGIN)
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    name_ends(axis, names)


def bars(axis: Any, series: Sequence[Series], xlabel: str, guides: Sequence[Guide] = ()) -> None:
    """The first y of each as a bar with its number and name, the smallest on top."""
    found = sorted(series, key=lambda one: -one.points[0][1])
    longest = max((one.points[0][1] for one in found), default=1.0)
    for i, one in enumerate(found):
        value, look = one.points[0][1], one.look
        axis.barh(i, value, 0.66, color=look.colour, edgecolor=look.colour,
                  alpha=1.0 if look.is_ours else 0.75)  # fmt: skip
        text = f"{figure(value)}  {short(one.title)}"
        axis.text(value + 0.01 * longest, i, text, va="center", weight=look.weight, fontsize=8.5)
    for guide in guides:
        axis.axvline(guide.points[0][1], linestyle=(0, (5, 3)), color=guide.colour, linewidth=1.6)
        axis.text(guide.points[0][1], len(found) - 0.4, guide.title, va="bottom", ha="left",
                  weight="bold", fontsize=8.5, color=guide.colour)  # fmt: skip
    axis.set_yticks([])
    axis.set_xlim(0, 1.05 * longest)
    axis.grid(visible=False, axis="y")
    axis.set_xlabel(xlabel)


def budgets(axis: Any, curves: dict[str, list[tuple[float, float]]], look: Look) -> None:
    """Time over the floor against the memory budget in MiB, a line for each size."""
    axis.set_xscale("log", base=2)
    names = []
    for i, (title, points) in enumerate(curves.items()):
        axis.plot(*zip(*points, strict=True), linestyle=("-", "--", "-.", ":")[i % 4],
                  color=look.colour, marker="osD^"[i % 4], linewidth=2.0)  # fmt: skip
        names.append(Name(*points[-1], title, look.colour))
    values = sorted({x for points in curves.values() for x, _ in points})
    axis.set_xticks(values, [f"{x:g}" for x in values])
    axis.set_xticks([], minor=True)
    axis.axhline(1.0, linestyle=(0, (5, 3)), color=INK, linewidth=1.6)
    highest = max((y for points in curves.values() for _, y in points), default=1.0)
    axis.set_ylim(0, 1.15 * max(1.0, highest))
    if values:
        names.append(Name(values[-1], 1.0, "lower bound: the four products", INK, "bold"))
    axis.set_xlabel("memory budget, MiB")
    axis.set_ylabel("time / time of the four products")
    name_ends(axis, names)


def strips(axis: Any, series: Sequence[Series], xlabel: str) -> None:
    """Errors (the y of all points) on a row for each entrant; what is no number at the right."""
    axis.set_xscale("log")
    found = sorted(series, key=lambda one: -_typical([y for _, y in one.points]))
    finite = [y for one in found for _, y in one.points if math.isfinite(y)]
    edge = 10 * max([*finite, LEAST_ERROR])
    for i, one in enumerate(found):
        good = [max(y, LEAST_ERROR) for _, y in one.points if math.isfinite(y)]
        lost = len(one.points) - len(good)
        axis.plot(good, [i] * len(good), linestyle="none", marker="o", color=one.look.colour,
                  markersize=6, alpha=0.6, markeredgewidth=0)  # fmt: skip
        if lost:
            axis.plot([edge], [i], linestyle="none", marker="x", color=one.look.colour)
            axis.text(1.6 * edge, i, f"{lost} not finite", va="center", fontsize=8)
            axis.set_xlim(right=1e3 * edge)
    axis.set_yticks([])
    axis.set_xlabel(xlabel)
    name_ends(axis, [Name(axis.get_xlim()[1], i, one.title, one.look.colour, one.look.weight)
                     for i, one in enumerate(found)])  # fmt: skip


def _typical(errors: Sequence[float]) -> float:
    """The mean of the logarithms, for the order of the rows."""
    found = [math.log(max(e, LEAST_ERROR)) if math.isfinite(e) else 10.0 for e in errors]
    return sum(found) / max(1, len(found))


def empty(axis: Any, why: str) -> None:
    """Says why a panel shows nothing."""
    axis.set_axis_off()
    axis.text(0.5, 0.5, why, ha="center", color=FAINT, transform=axis.transAxes)


def _plain_numbers(axis: Any) -> None:
    """1, 10, 1000 rather than powers, and numbers between where there are few of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    between: tuple[float, ...] = (1.0,) if high > 100 * low else (1.0, 2.0, 5.0)
    if high < 10 * low:
        between = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    axis.set_major_locator(LogLocator(10, between, numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}" if x >= 1e-3 else f"{x:.0e}"))
    axis.set_minor_formatter(NullFormatter())
