"""How pictures look: one colour for each method in all of them, names next to the lines."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..records import Report

#: Text and axes, what is faint, and the paper: a page puts its own colours in their place.
INK, FAINT, PAPER = "#1b1f24", "#b7bec8", "#fdfdfc"
#: Okabe and Ito's colours, told apart by colour-blind readers too; one for each family of
#: methods: the first name that begins the key. Members of a family differ in marker and dashes.
#: Ours are the blues.
FAMILIES = {
    "kdloss-heads": "#56b4e9",
    "kdloss": "#0072b2",
    "eager": "#d55e00",
    "compile": "#e69f00",
    "checkpoint": "#9c6b1e",
    "liger": "#cc79a7",
    "trl": "#009e73",
}
SPARE = ("#8a8d00", "#a05195", "#7f7f7f", "#5f9ea0", "#b3697a")
MARKERS, DASHES = "osD^vP*X<>hd", ("-", "--", "-.", ":")
#: Characters of a name at most; share of the height between two names.
NAME_WIDTH, NAME_GAP = 36, 0.052

#: For matplotlib: text stays text in SVG, and the same figures give the same bytes.
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fused_kd",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.alpha": 0.35,
    "axes.facecolor": PAPER,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color",
         "axes.titlecolor"), INK,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Look:
    """Of one entrant."""

    colour: str
    marker: str
    dashes: str
    is_ours: bool

    @property
    def width(self) -> float:
        return 2.6 if self.is_ours else 1.3

    @property
    def size(self) -> float:
        return 7.0 if self.is_ours else 5.0

    @property
    def weight(self) -> str:
        return "bold" if self.is_ours else "normal"

    @property
    def order(self) -> int:
        return 4 if self.is_ours else 3


def looks(report: Report) -> dict[str, Look]:
    """By the entrant's key; the same in every picture of a report."""
    ours = {x["entrant"]: bool(x["is_ours"]) for x in report.results.values()}
    families: dict[str, list[str]] = {}
    for key in sorted(ours):
        families.setdefault(_family(key), []).append(key)
    spare = itertools.cycle(SPARE)
    found = {}
    for family, keys in families.items():
        colour = FAMILIES.get(family) or next(spare)
        for i, key in enumerate(keys):
            marker, dashes = MARKERS[i % len(MARKERS)], DASHES[i % len(DASHES)]
            found[key] = Look(colour, marker, dashes, ours[key])
    return found


def _family(key: str) -> str:
    known = (name for name in FAMILIES if f"{key}-".startswith(f"{name}-"))
    return next(known, key.split("-")[0])


def need_matplotlib() -> None:
    """Raises ValueError, with what to do about it in one line, where there is none."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(f"pictures need matplotlib: pip install matplotlib ({error})") from error


def rendered(figure: Any, format_: str) -> bytes:
    """The file of a figure of matplotlib; the same figure gives the same bytes."""
    import matplotlib

    buffer = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if format_ == "svg" else {"Software": None}
    with matplotlib.rc_context(SETTINGS):
        figure.savefig(buffer, format=format_, dpi=110, metadata=metadata)
    return buffer.getvalue()


def svg(figure: Any, digest: str = "") -> str:
    """As a text; with the digest of the data that it shows, for a check without matplotlib."""
    text = rendered(figure, "svg").decode()
    return text.replace("<svg ", f"<!-- digest of the data: {digest} -->\n<svg ", digest != "")


@dataclass(frozen=True)
class Name:
    """Of what ends at a point."""

    x: float
    y: float
    text: str
    colour: str
    weight: str = "normal"


def name_ends(axis: Any, names: Iterable[Name], size: float = 8.0) -> None:
    """Names to the right of the axes, as high as their points, apart where they would overlap."""
    to_share = axis.transData + axis.transAxes.inverted()
    found = sorted(names, key=lambda name: float(to_share.transform((name.x, name.y))[1]))
    wanted = [float(to_share.transform((name.x, name.y))[1]) for name in found]
    for name, height in zip(found, apart(wanted), strict=True):
        axis.annotate(
            short(name.text), xy=(name.x, name.y), xytext=(1.06, height),
            textcoords=axis.transAxes, color=name.colour, weight=name.weight, fontsize=size,
            va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": name.colour, "linewidth": 0.6, "alpha": 0.6,
                        "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 3},
        )  # fmt: skip


def short(text: str) -> str:
    """Return a name that fits next to a panel; its end distinguishes a family's members."""
    if len(text) <= NAME_WIDTH:
        return text
    end = NAME_WIDTH // 3
    return f"{text[: NAME_WIDTH - end - 1].rstrip()}…{text[-end:].lstrip()}"


def apart(wanted: Sequence[float], gap: float = NAME_GAP) -> list[float]:
    """Heights (shares, ascending) moved so that none is closer to the next than the gap."""
    gap = min(gap, 1 / max(1, len(wanted) - 1))
    heights: list[float] = []
    for height in wanted:
        heights.append(max(height, heights[-1] + gap) if heights else max(0.0, height))
    highest = 1.0
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], highest)
        highest = heights[i] - gap
    return heights
