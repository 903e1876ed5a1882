"""Tables of results by pandas: suites, and what changed between two files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import fields

import pandas
import torch
from pandas import DataFrame

from .cases import Case
from .methods import KDLOSS, WITH_HEADS
from .one_case import Record

MIB = 2**20
#: Titles: of a lower bound, and of the column with the share of it that times reach.
BOUNDS = {
    "copy": ("time of 1.5 tensor copies", "% of the fastest possible"),
    "one copy": ("time of a tensor copy", "% of the fastest possible"),
    "products": ("reference: the four matrix products by torch", "% of the reference"),
}
SIZES = [field.name for field in fields(Case)]
#: The numbers of a result, and the nested fields of a record that hold them.
NUMBERS = ["seconds", "memory", "bound", "loss", "gradients"]
NESTED = "time_median_s", "memory_allocator_bytes", "bound_seconds", "error_loss", "error_gradients"
#: How far an error may grow: the order of sums differs between machines.
ERROR_GROWTH, ERROR_SLACK = 2.0, 2 * torch.finfo(torch.float32).eps


def frame(records: Iterable[Record]) -> DataFrame:
    """Return a row for each method in each case, its last record and bound; ValueError if none."""
    results = [x for x in records if x["kind"] in ("bound", "result")]
    last = {(x["suite"], x["case"], x.get("method")): x for x in results}
    rows = [
        {**x, **vars(case), "bound": last.get((suite, case, None), {})}
        for (suite, case, method), x in last.items()
        if method is not None
    ]
    if not rows:
        raise ValueError("the files have no results")
    table = pandas.json_normalize(rows, sep="_")
    table[NUMBERS] = table.reindex(columns=NESTED).apply(pandas.to_numeric)
    computes = ("computes: " + table.nearest).where(table.nearest != "")
    status = (table.status + ": " + table.why).where(table.status != "measured")
    prefix = (table.suite + ": ").where(table.suite != table.level, "")
    return table.assign(
        name=prefix + [case.name for case in table.case],
        notes=[*zip(computes, status, strict=True)],
        share=pandas.to_numeric(table.bound_share.where(table.nearest == "")),
    )


def bound_title(row: pandas.Series) -> str:
    """Return the title of a result's lower bound and, if it is not in the case's dtype, why."""
    return BOUNDS[row.bound_name][0] + (f" ({row.bound_why})" if row.bound_why else "")


def seconds_of(table: DataFrame, *methods: str) -> pandas.Series:
    """Return for each row the seconds of the first result in its case by one of these methods."""
    return table.name.map(table[table.method.isin(methods)].groupby("name").seconds.first())


def figure(value: float, most_digits: int = 9) -> str:
    """Return three significant digits, or `most_digits` decimals if fewer; "" for NaN."""
    if math.isnan(value):
        return ""
    digits = 2 - math.floor(math.log10(max(value, 1e-9)))
    return f"{value:.{min(most_digits, max(0, digits))}f}"


def unit_of(seconds: float) -> tuple[str, float]:
    """Return the unit for times whose shortest takes `seconds`, and the unit's seconds."""
    return ("s", 1.0) if seconds >= 1.0 else ("ms", 1e-3)


def mebibytes(count: float) -> str:
    """Return bytes in MiB; "" for NaN."""
    return figure(count / MIB, most_digits=2)


def scientific(error: float) -> str:
    """Return an error as text: "1.2e-03", or "not finite"; "" for NaN: it was not compared."""
    return "" if math.isnan(error) else f"{error:.1e}" if math.isfinite(error) else "not finite"


def markdown(table: DataFrame) -> str:
    """Return a table in Markdown, its index as the first column, without empty columns."""
    table = table.fillna("")
    table = table.loc[:, (table != "").any()]
    head = ["", *table.columns]
    rule = [":---" if name in ("", "note") else "---:" for name in head]
    lines = [head, rule, *table.reset_index().astype(str).to_numpy().tolist()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def sweeps(table: DataFrame) -> tuple[str, list[DataFrame]]:
    """Return a size (n, v or k), and a suite's rows in groups whose cases differ in it alone."""
    varied = [size for size in ("v", "n", "k") if table[size].nunique() > 1]
    size = varied[0] if varied else "v"
    groups = table.groupby([name for name in SIZES if name != size], sort=False)
    return size, [group for _, group in groups]


def overview(results: DataFrame, size: str, methods: Sequence[str] = ()) -> str:
    """Return a sweep in Markdown: a row for each method; times, memory and the worst errors.

    Args:
        results: the rows of the sweep.
        size: the column in which the cases differ.
        methods: the keys of the rows to show, in order; if empty all, ours first, then by time.
    """
    (unit, scale), last = unit_of(results.seconds.min()), results[size].max()
    results = results.sort_values(size, kind="stable")
    label = results[size] if size == "dtype" else f"{size.upper()} = " + results[size].astype(str)
    seconds = (results.seconds / scale).map(figure).where(results.seconds.notna(), results.status)
    results = results.assign(label=label, shown=seconds, peak=results.memory.map(mebibytes))
    order = results.assign(place=results.seconds.where(~results.is_ours, 0))
    order = order.sort_values([size, "is_ours", "place"], ascending=[False, False, True])
    titles, labels = order.title.unique(), results.label.unique()
    if methods:
        titles = results.groupby("method").title.first().reindex(methods).dropna()
    parts = [results.pivot(index="title", columns="label", values=x) for x in ("shown", "peak")]
    times, peaks = (part.loc[titles, labels] for part in parts)
    table = times.add_suffix(f": {unit}").join(peaks.add_suffix(": MiB"))
    at_last, groups = results[results[size] == last].set_index("title"), results.groupby("title")
    bounds = results.dropna(subset="bound").drop_duplicates("label").set_index("label")
    if len(bounds):
        percent = (100 * at_last.share).map("{:.0f} %".format).replace("nan %", "")
        table[f"{at_last.label.iloc[0]}: {BOUNDS[bounds.bound_name.iloc[-1]][1]}"] = percent
    table["loss error"] = groups["loss"].max().map(scientific)
    table["gradient error"] = groups["gradients"].max().map(scientific)
    table["note"] = groups.apply(_notes)
    if len(bounds):
        cells = (bounds.bound / scale).map(figure).add_suffix(f": {unit}")
        table.loc[bound_title(bounds.iloc[-1])] = cells
    return markdown(table)


def _notes(rows: DataFrame) -> str:
    """Return all notes on a method, once each; with its cases if a note is not on all of them."""
    notes = rows.explode("notes").dropna(subset="notes").groupby("notes", sort=False).label
    return "; ".join(
        note if len(labels) == len(rows) else f"{', '.join(labels)}: {note}"
        for note, labels in notes
    )


def faster(results: DataFrame) -> str:
    """Return a line for each method that takes less time than ours, with its best case."""
    results = results.assign(of_ours=results.seconds / seconds_of(results, KDLOSS, WITH_HEADS))
    results = results[~results.is_ours & (results.nearest == "") & (results.of_ours < 1)]
    lines = []
    for title, rows in results.groupby("title", sort=False):
        number = "one case" if len(rows) == 1 else f"the best of {len(rows)} cases"
        best = rows.loc[rows.of_ours.idxmin()]
        setting = best.case.setting("hidden", "temperature", "divergence")
        lines.append(f"* {title} takes {best.of_ours:.2f} of our time in {number}: {setting}.")
    return "\n".join(lines)


def compare(before: DataFrame, after: DataFrame, tolerance: float) -> tuple[DataFrame, int, int]:
    """Return what changed, the worst first, and the numbers of comparisons and of regressions.

    Compared are ratios to the lower bound (to eager torch if there is none), which do not depend on
    the machine's speed. A regression is a ratio of ours that grew by more than the tolerance, a
    method that lost its time, or an error that became more than twice as large, or not finite.
    """
    frames = []
    for results in (before, after):
        results = results[results.status != "skipped"]
        ratio = (1 / results.share).fillna(results.seconds / seconds_of(results, "eager"))
        # of several runs the best: a regression stays, a disturbance goes
        results = results.assign(ratio=ratio).sort_values("ratio")
        frames.append(results.drop_duplicates(["name", "method"]))
    both = frames[0].merge(frames[1], "inner", ["name", "method"], suffixes=("", "_now"))
    both["change"] = both.ratio_now / both.ratio - 1
    reasons = {
        f"ratio grew by more than {tolerance:.0%}": both.is_ours & (both.change > tolerance),
        "lost its time": both.seconds.notna() & both.seconds_now.isna(),
    }
    for part in ("loss", "gradients"):
        most = ERROR_GROWTH * both[part] + ERROR_SLACK
        reasons[f"error of the {part} grew"] = both[f"{part}_now"] > most
    both["verdict"] = ""
    for reason, is_so in reasons.items():
        both["verdict"] += is_so.map({True: f"REGRESSION: {reason}. ", False: ""})
    columns = ["name", "method", "ratio", "ratio_now", "change", "loss", "loss_now", "verdict"]
    compared = both.change.notna() | (both["loss"].notna() & both.loss_now.notna())
    shown = both.sort_values("change", ascending=False)[columns]
    return shown, int(compared.sum()), int((both.verdict != "").sum())
