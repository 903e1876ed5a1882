"""Pictures of results: time and memory against the vocabulary or the rows."""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Sequence

from pandas import DataFrame

from .tables import MIB, bound_title, unit_of

#: By the beginning of a method's key: Okabe and Ito's colours, for colour-blind readers too.
COLOURS = {
    "kdloss-heads": "#56b4e9",
    "kdloss": "#0072b2",
    "eager": "#d55e00",
    "compile": "#e69f00",
    "checkpoint": "#9c6b1e",
    "liger": "#cc79a7",
    "trl": "#009e73",
    "": "#7f7f7f",
}
MARKERS = "osD^vP*X<>hd"
#: Text stays text in SVG, and the same figures give the same bytes.
SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fused_kd",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.alpha": 0.35,
}


def of_sweeps(groups: Sequence[DataFrame], size: str, note: str) -> str:
    """Return an SVG: for each sweep over the column `size` its time and memory; a note below."""
    from matplotlib import rc_context  # compare and the digest need no matplotlib
    from matplotlib.figure import Figure

    with rc_context(SETTINGS):
        figure = Figure((14, 4.4 * len(groups)), layout="constrained")
        axes = figure.subplots(len(groups), 2, squeeze=False)
        for (left, right), group in zip(axes, groups, strict=True):
            unit, scale = unit_of(group.seconds.min())
            left.set_title(group.case.iloc[0].setting(size))
            _panel(left, group, size, "seconds", scale, f"time, {unit}")
            bounds = group.dropna(subset="bound").drop_duplicates(size).sort_values(size)
            if len(bounds):
                label = bound_title(bounds.iloc[-1])
                left.plot(bounds[size], bounds.bound / scale, "k--", label=label)
            _panel(right, group, size, "memory", MIB, "peak memory beyond the inputs, MiB")
            lines = left.get_legend_handles_labels()
            right.legend(*lines, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        figure.supxlabel(note, fontsize=7.5, x=0.01, ha="left")
        figure.savefig(buffer := io.StringIO(), format="svg", metadata={"Date": None})
    comment = f"<!-- digest of the data: {digest(groups)} -->"
    return buffer.getvalue().replace("<svg ", f"{comment}\n<svg ", 1)


def digest(groups: Sequence[DataFrame]) -> str:
    """Return a hash of everything that a picture shows."""
    shown = [group[["name", "title", "seconds", "memory", "bound"]].to_csv() for group in groups]
    return hashlib.sha256("".join(shown).encode()).hexdigest()


def _panel(axis, group: DataFrame, size: str, column: str, scale: float, label: str) -> None:
    methods = group.sort_values(size).groupby("title", sort=False)
    for marker, (title, rows) in zip(itertools.cycle(MARKERS), methods, strict=False):
        colour = next(x for key, x in COLOURS.items() if rows.method.iloc[0].startswith(key))
        style = {"color": colour, "marker": marker, "linewidth": 1.2 + 1.2 * rows.is_ours.iloc[0]}
        axis.plot(rows[size], rows[column] / scale, label=title, **style)
    values = sorted(group[size].unique())
    axis.set(xscale="log", yscale="log", xlabel=size.upper(), ylabel=label)
    axis.set_xticks(values, map(str, values))
    axis.set_xticks([], minor=True)
