"""Tables of results by pandas: suites, goals, errors, and what changed between two files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields

import pandas
import torch
from pandas import DataFrame

from .cases import Case
from .methods import FORWARD, IN_PLACE, KDLOSS, WITH_HEADS
from .one_case import Record

MIB = 2**20
#: The lower bounds, as shown.
BOUNDS = {"copy": "1.5 copies", "products": "the four products"}
SIZES = [field.name for field in fields(Case) if field.name != "regime"]
#: The numbers of a result, and in which nested fields records have them.
NUMBERS = ["seconds", "memory", "bound", "loss", "gradients"]
NESTED = "time_median_s", "memory_allocator_bytes", "bound_seconds", "error_loss", "error_gradients"
#: Smaller matrices stay in the caches, then a copy is no lower bound; a GPU is to be filled.
LARGE = f"suite == level and divergence == 'forward_kl' and n * v >= {2**23}"
LARGE += " and (device == 'cpu' or n >= 8192)"
#: Which results of ours, and the most that their time over the lower bound may be.
GOALS = {
    f"device == 'cpu' and method == '{IN_PLACE}' and dtype != 'fp32'": 1.6,
    f"device == 'cpu' and method == '{IN_PLACE}' and dtype == 'fp32'": 1.2,
    f"device == 'cpu' and method == '{FORWARD}'": 1.3,
    f"device == 'cpu' and method == '{WITH_HEADS}'": 1.15,
    f"device == 'cuda' and method in ('{KDLOSS}', '{IN_PLACE}')": 1.15,
    f"device == 'cuda' and method in ('{KDLOSS}-triton', '{IN_PLACE}-triton')": 1.5,
    f"device == 'cuda' and method in ('{WITH_HEADS}', '{WITH_HEADS}-triton')": 1.1,
}
#: How far an error may grow: the order of sums differs between machines.
ERROR_GROWTH, ERROR_SLACK = 2.0, 2 * torch.finfo(torch.float32).eps


def frame(records: Iterable[Record]) -> DataFrame:
    """Return a row for each method in each case, by the last record, with its lower bound."""
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
    """Return the name of the lower bound of a result."""
    why = f" ({row.bound_why})" if row.bound_why else ""
    return f"lower bound: {BOUNDS[row.bound_name]}{why}"


def seconds_of(table: DataFrame, *methods: str) -> pandas.Series:
    """Return for each row the seconds of the first of these methods in its case."""
    return table.name.map(table[table.method.isin(methods)].groupby("name").seconds.first())


def figure(value: float) -> str:
    """Return three significant digits, without an exponent; "" for NaN."""
    digits = 0 if math.isnan(value) else max(0, 2 - math.floor(math.log10(value)))
    return f"{value:.{digits}f}".replace("nan", "")


def unit_of(seconds: float) -> tuple[str, float]:
    """Return the unit in which times are shown of which this is the shortest, and its seconds."""
    return ("s", 1.0) if seconds >= 1.0 else ("ms", 1e-3)


def mebibytes(count: float) -> str:
    """Return bytes in MiB; "" for NaN."""
    digits = 2 if count < 10 * MIB else 1 if count < 100 * MIB else 0
    return "" if math.isnan(count) else f"{count / MIB:.{digits}f}"


def scientific(error: float) -> str:
    """Return an error; "" for NaN: it was not compared."""
    return "" if math.isnan(error) else f"{error:.1e}" if math.isfinite(error) else "not finite"


def markdown(table: DataFrame, left: int = 1) -> str:
    """Return a table in Markdown, its index as the first column, without empty columns."""
    table = table.fillna("")
    table = table.loc[:, (table != "").any()].reset_index()
    head = ["" if name in ("title", "index", "goal") else str(name) for name in table.columns]
    rule = [":---" if i < left or name == "note" else "---:" for i, name in enumerate(head)]
    lines = [head, rule, *table.astype(str).to_numpy().tolist()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def sweeps(table: DataFrame, size: str) -> list[DataFrame]:
    """Return the rows of a suite in groups whose cases differ in one size alone."""
    groups = table.groupby([name for name in SIZES if name != size], sort=False)
    is_only = table.n.nunique() == 1 or table.v.nunique() == 1
    return [group for _, group in groups if is_only or group[size].nunique() > 1]


def overviews(table: DataFrame) -> Iterator[tuple[str, str]]:
    """Yield tables of a suite in Markdown, and what each is about."""
    table = table[table.status != "skipped"]
    if table.seconds.isna().all():
        setting = table.case.iloc[0].setting("dtype", "regime")
        yield f"{setting}, worst of {table.regime.nunique()} kinds of inputs", errors(table)
        return
    for size in ("n", "v") if table.n.nunique() > 1 else ("v",):
        for group in sweeps(table, size):
            yield group.case.iloc[0].setting(size), overview(group, size)


def overview(results: DataFrame, size: str, methods: Sequence[str] = ()) -> str:
    """Return a table of methods against the cases of a sweep: times, memory, the worst errors.

    Args:
        results: the rows of the sweep.
        size: the column in which the cases differ.
        methods: the keys of the rows to show, in their order; none: all, ours first, then by time.
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
    percent = (100 * at_last.share).map("{:.0f} %".format).replace("nan %", "")
    table[f"{at_last.label.iloc[0]}: lower bound / time"] = percent
    table["loss error"] = groups["loss"].max().map(scientific)
    table["gradient error"] = groups["gradients"].max().map(scientific)
    table["note"] = groups.apply(_notes)
    bounds = results.dropna(subset="bound").drop_duplicates("label").set_index("label")
    if len(bounds):
        cells = (bounds.bound / scale).map(figure).add_suffix(f": {unit}")
        table.loc[bound_title(bounds.iloc[-1])] = cells
    return markdown(table)


def _notes(rows: DataFrame) -> str:
    """Return all notes on a method, once each, and the cases of those that are not in all."""
    notes = rows.explode("notes").dropna(subset="notes").groupby("notes", sort=False).label
    return "; ".join(
        note if len(labels) == len(rows) else f"{', '.join(labels)}: {note}"
        for note, labels in notes
    )


def faster(results: DataFrame) -> list[str]:
    """Return the methods that take less time than ours, a line for each."""
    results = results.assign(of_ours=results.seconds / seconds_of(results, KDLOSS, WITH_HEADS))
    results = results[~results.is_ours & (results.nearest == "") & (results.of_ours < 1)]
    lines = []
    for title, rows in results.groupby("title", sort=False):
        least, case = rows.of_ours.min(), rows.name[rows.of_ours.idxmin()]
        more = f", less than it in {len(rows)} cases" if len(rows) > 1 else ""
        lines.append(f"* faster than ours: {title} takes {least:.2f} of our time in {case}{more}")
    return lines


def errors(results: DataFrame) -> str:
    """Return a table of the worst relative errors of each method over all inputs, by dtype."""
    table = results.pivot_table(["loss", "gradients"], "title", "dtype", "max", sort=False)
    table.columns = [f"{dtype}: {part} error" for part, dtype in table.columns]
    return markdown(table.map(scientific))


def error_units(results: DataFrame) -> str:
    """Return a table of the worst errors in units, by dtype and divergence."""
    parts = {"loss": "loss", "gradients": "gradient in norm", "element": "gradient by element"}
    columns, by = [f"units_{part}" for part in parts], ["dtype", "divergence"]
    rows = results.dropna(subset=columns)
    rows[columns] = rows[columns].where(rows[columns] < math.inf)
    lost = rows[rows[columns].isna().any(axis=1)]
    table = rows.pivot_table(columns, by, "method", "max", sort=False)
    table = table[[(column, key) for column in columns for key in ("kdloss", "eager")]]
    table.columns = [x for part in parts.values() for x in (part, f"{part}, eager")]
    lines = [markdown(table.map("{:.2f}".format), left=2)]
    for names, regimes in lost.groupby([*by, "title"], sort=False).regime:
        inputs = ", ".join(sorted(set(regimes)))
        lines.append(f"Not finite, left out: {' '.join(names)}, on {inputs}.")
    return "\n\n".join(lines)


def goals(results: DataFrame) -> str:
    """Return a table of the goals with figures, the worst of them, and how often each is met."""
    results = results.query(LARGE).assign(ratio=lambda rows: 1 / rows.share).dropna(subset="ratio")
    rows = {}
    for which, most in GOALS.items():
        for title, group in results.query(which).groupby("title", sort=False):
            worst, met = group.loc[group.ratio.idxmax()], (group.ratio <= most).sum()
            verdict = "reached" if met == len(group) else "NOT reached"
            cells = f"{most:.3g}", f"{worst.ratio:.3g}", worst["name"], f"{met} of {len(group)}"
            rows[f"{title}: time / lower bound", most] = *cells, verdict
    table = DataFrame(rows, ["at most", "worst here", "in", "in cases", "verdict"]).T
    return markdown(table.droplevel(1)) if rows else ""


def compare(before: DataFrame, after: DataFrame, tolerance: float) -> tuple[DataFrame, int, int]:
    """Return what changed, the worst first, how much is compared, and the number of regressions.

    By ratios to the lower bound (eager torch if there is none), which do not move with the
    machine's speed. A regression is a ratio of ours that grew by more than the tolerance, a method
    that lost its time, or an error that became more than twice as large, or not finite.
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
