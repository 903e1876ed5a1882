"""Whether a file of results is as good as another one: by ratios, not by times.

The time of a method over that of the baseline in the same case and file does not move with the
machine's speed. The baseline is its lower bound, eager torch if there is none, or a method by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .goals import ERROR_SLACK
from .records import Report, differences
from .tables import frame, markdown, seconds_of

if TYPE_CHECKING:
    from pandas import DataFrame

BOUND, TOLERANCE = "bound", 0.10
#: How far an error may grow, besides what rounding alone may cost: the order of sums differs
#: between machines.
ERROR_GROWTH = 2.0


def compare(
    before: Report, after: Report, tolerance: float = TOLERANCE, against: str = BOUND
) -> tuple[str, bool]:
    """Return what changed, the worst first, and whether there is no regression.

    A regression is a ratio of ours that grew by more than the tolerance, a method that lost its
    time, or an error that became more than twice as large, or not finite. There must be something
    to compare. Results of one file alone are shown, and no regression.
    """
    frames = (_with_ratios(report, against) for report in (before, after))
    both = next(frames).merge(next(frames), "outer", ["name", "method"], suffixes=("", "_now"))
    alone = both.status.isna() | both.status_now.isna()
    both["change"] = both.ratio_now / both.ratio - 1
    regressions = {
        f"ratio grew by more than {100 * tolerance:g} %": both.is_ours.eq(True)
        & (both.change > tolerance),
        "lost its time": both.status.eq("measured") & both.status_now.ne("measured") & ~alone,
    }
    compared = both.ratio.notna() & both.ratio_now.notna()
    for part in ("loss", "gradients"):
        limit = ERROR_GROWTH * both[part] + ERROR_SLACK  # infinite if it was not finite before
        regressions[f"error of the {part} grew"] = both[f"{part}_now"] > limit
        compared |= both[part].notna() & both[f"{part}_now"].notna()
    both["verdict"] = "in one file alone"
    both["verdict"] = both.verdict.where(alone, "")
    for what, where in regressions.items():
        both["verdict"] = both.verdict.mask(where, both.verdict + f"{what}. ")
    failed = int((both.verdict != "").sum() - alone.sum())
    found = f"{failed} REGRESSIONS" if failed else "no regression"
    return "\n".join([
        *(f"not the same: {what}" for what in differences(before.runs[-1], after.runs[-1])),
        markdown(_shown(both, against)),
        f"{compared.sum()} results compared: {found if compared.any() else 'NOTHING to compare'}",
    ]), bool(compared.any()) and not failed  # fmt: skip


def _with_ratios(report: Report, against: str) -> DataFrame:
    found = frame(report)
    found = found[found.status != "skipped"].copy()
    if against == BOUND:
        found["ratio"] = (1 / found.share).fillna(found.seconds / seconds_of(found, "eager"))
    else:
        found["ratio"] = found.seconds / seconds_of(found, against)
    return found


def _shown(both: DataFrame, against: str) -> DataFrame:
    """Return the figures of both files as a table, the largest change first."""
    both = both.sort_values("change", ascending=False)
    table = both.set_index(both["name"] + ": " + both.method)
    ratio = f"time / {against}"
    shown = table[[]].assign(**{
        ratio: table.ratio.map("{:.3g}".format),
        "now": table.ratio_now.map("{:.3g}".format),
        "change": table.change.map("{:+.1%}".format),
        "loss error": table["loss"].map("{:.1e}".format),
        "loss error now": table.loss_now.map("{:.1e}".format),
        "verdict": table.verdict,
    })  # fmt: skip
    return shown.replace({"nan": "", "+nan%": "", "nan%": ""})
