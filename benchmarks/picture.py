"""Pictures of a report: time and memory against the vocabulary or the rows; needs matplotlib."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fused_kd.options import MIB

from .records import Report
from .tables import frame, machine, sweeps, unit_of

if TYPE_CHECKING:
    from pandas import DataFrame

#: Okabe and Ito's colours, told apart by colour-blind readers too; ours are the blues.
COLOURS = {
    "kdloss-heads": "#56b4e9",
    "kdloss": "#0072b2",
    "eager": "#d55e00",
    "compile": "#e69f00",
    "checkpoint": "#9c6b1e",
    "liger": "#cc79a7",
    "trl": "#009e73",
}
MARKERS = "osD^vP*X<>hd"
#: For matplotlib: text stays text in SVG, and the same figures give the same bytes.
SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fused_kd",
    "font.size": 9.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.35,
}
#: Inches of a panel.
WIDTH, HEIGHT = 7.0, 4.4


def draw(report: Report, folder: Path) -> Iterator[Path]:
    """Draw a picture of each sweep of each suite into a folder; yield where they are."""
    found = frame(report)
    for suite, rows in found[found.seconds.notna()].groupby("suite", sort=False):
        for size in ("n", "v"):
            for number, sweep in enumerate(s for s in sweeps(rows, size) if s[size].nunique() > 1):
                path = folder / f"{suite}-{size}-{number}.svg"
                path.write_text(of_sweeps([sweep], size, machine(report.environment)))
                yield path


def of_sweeps(groups: Sequence[DataFrame], size: str, note: str) -> str:
    """Return a picture of sweeps, a row of two panels each."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(SETTINGS):
        figure = Figure((2 * WIDTH, len(groups) * HEIGHT), layout="constrained")
        for axes, group in zip(figure.subplots(len(groups), 2, squeeze=False), groups, strict=True):
            _panels(axes, group, size)
        figure.supxlabel(note, fontsize=7.5, x=0.01, ha="left")
        return svg(figure, digest(groups))


def svg(figure: Any, digest: str) -> str:
    """Return a figure as a text that names the digest of what it shows."""
    from matplotlib import rc_context

    with rc_context(SETTINGS):
        figure.savefig(buffer := io.StringIO(), format="svg", metadata={"Date": None})
    return buffer.getvalue().replace("<svg ", f"<!-- digest of the data: {digest} -->\n<svg ", 1)


def digest(groups: Sequence[DataFrame]) -> str:
    """Return a hash of everything that a picture shows, for a check without matplotlib."""
    shown = [group[["name", "title", "seconds", "memory", "bound"]].to_csv() for group in groups]
    return hashlib.sha256("".join(shown).encode()).hexdigest()


def _panels(axes: Sequence[Any], group: DataFrame, size: str) -> None:
    """Draw time and memory against a size, both logarithmic, a line for each method."""
    unit, scale = unit_of(group.seconds)
    setting = group.case.iloc[0].setting(size)
    group = group.sort_values(size)
    for axis, column, per, label in (
        (axes[0], "seconds", scale, f"time, {unit}"),
        (axes[1], "memory", MIB, "peak memory beyond the inputs, MiB"),
    ):
        for number, (title, rows) in enumerate(group.groupby("title", sort=False)):
            key, is_ours = rows.method.iloc[0], rows.is_ours.iloc[0]
            family = next((name for name in COLOURS if key.startswith(name)), None)
            axis.plot(
                rows[size], rows[column] / per, label=title, color=COLOURS.get(family, "#7f7f7f"),
                marker=MARKERS[number % len(MARKERS)], linewidth=2.4 if is_ours else 1.2,
            )  # fmt: skip
        bounds = group.dropna(subset="bound").drop_duplicates(size)
        if column == "seconds" and len(bounds):
            bound = dict(color="black", linestyle="--", label=bounds.bound_title.iloc[-1])
            axis.plot(bounds[size], bounds.bound / per, **bound)
        axis.set(xscale="log", yscale="log", xlabel=size.upper(), ylabel=label, title=setting)
        axis.set_xticks(values := sorted(group[size].unique()), map(str, values), minor=False)
        axis.set_xticks([], minor=True)
    lines = axes[0].get_legend_handles_labels()
    axes[1].legend(*lines, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
