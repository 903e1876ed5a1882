"""Tables of results by pandas: suites, goals, errors, and what changed between two files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

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
#: Smaller matrices stay in the caches, where a copy is no lower bound; a GPU is to be filled.
_LARGE = f"n * v >= {2**23} and suite in ('logits', 'heads') and divergence == 'forward_kl' and "
_CPU, _GPU = f"{_LARGE} device == 'cpu' and", f"{_LARGE} device == 'cuda' and n >= 8192 and"
_IN_PLACE = f"method == '{IN_PLACE}' and"
#: Which results of ours, which figure of them, and the most that it may be.
BOUND, TWICE_N, TWICE_V = "time / lower bound", "time / half the N", "time / half the V"
FORWARD_KL = "time / forward_kl at T = 2"
GOALS = (
    (f"{_CPU} {_IN_PLACE} dtype != 'fp32'", BOUND, 1.6),
    (f"{_CPU} {_IN_PLACE} dtype == 'fp32'", BOUND, 1.2),
    (f"{_CPU} method == '{FORWARD}'", BOUND, 1.3),
    (f"{_CPU} method == '{WITH_HEADS}'", BOUND, 1.15),
    (f"{_GPU} method in ('{KDLOSS}', '{IN_PLACE}')", BOUND, 1.15),
    (f"{_GPU} method in ('{KDLOSS}-triton', '{IN_PLACE}-triton')", BOUND, 1.5),
    (f"{_GPU} method in ('{WITH_HEADS}', '{WITH_HEADS}-triton')", BOUND, 1.1),
    (f"{_IN_PLACE} divergence == 'forward_kl' and temperature != 2.0", FORWARD_KL, 2.0),
    (f"{_IN_PLACE} divergence in ('reverse_kl', 'mse')", FORWARD_KL, 2.0),
    (f"{_IN_PLACE} divergence in ('jsd', 'tvd')", FORWARD_KL, 3.0),
    ("suite == 'growth' and n >= 512 and v >= 64128", TWICE_N, 2.1),
    ("suite == 'growth' and n >= 256 and v >= 128256", TWICE_V, 2.1),
)
#: How far an error may grow: the order of sums differs between machines.
ERROR_GROWTH, ERROR_SLACK = 2.0, 2 * torch.finfo(torch.float32).eps


def frame(records: Iterable[Record]) -> DataFrame:
    """Return a row for each method in each case, by the last record, with its lower bound."""
    results: dict[Any, Record] = {}
    bounds: dict[Any, Record] = {}
    for record in records:
        key = record.get("suite"), record.get("case")
        if record["kind"] == "bound":
            bounds[key] = record
        elif record["kind"] == "result":
            results[(*key, record["method"])] = record
    rows = []
    for (suite, case, _), x in results.items():
        bound = bounds.get((suite, case), {})
        why = f" ({bound['why']})" if bound.get("why") else ""
        notes = [f"computes: {x['nearest']}"] if x["nearest"] else []
        notes += [f"{x['status']}: {x['why']}"] if x["status"] != "measured" else []
        rows.append({
            "loss": None, "gradients": None, "units": {}, **x, **vars(case), **x["error"],
            "name": case.name if suite == case.level else f"{suite}: {case.name}",
            "seconds": (x["time"] or {}).get("median_s"), "bound": bound.get("seconds"),
            "bound_title": f"lower bound: {BOUNDS[bound['name']]}{why}" if bound else "",
            "share": None if x["nearest"] else x["bound_share"], "notes": notes,
            "memory": x["memory"].get("allocator_bytes"),
        })  # fmt: skip
    if not rows:
        raise ValueError("the files have no results")
    found = DataFrame(rows)
    numbers = ["seconds", "bound", "share", "memory", "loss", "gradients"]
    found[numbers] = found[numbers].apply(pandas.to_numeric)
    return found


def seconds_of(found: DataFrame, *methods: str) -> pandas.Series:
    """Return for each row the seconds of the first of these methods in its case."""
    return found.name.map(found[found.method.isin(methods)].groupby("name").seconds.first())


def figure(value: float) -> str:
    """Return three significant digits, without an exponent; "" for NaN."""
    if math.isnan(value):
        return ""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


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


def sweeps(found: DataFrame, size: str) -> list[DataFrame]:
    """Return the rows of a suite in groups whose cases differ in one size alone."""
    groups = found.groupby([name for name in SIZES if name != size], sort=False)
    is_only = found.n.nunique() == 1 or found.v.nunique() == 1
    return [group for _, group in groups if is_only or group[size].nunique() > 1]


def overviews(found: DataFrame) -> Iterator[tuple[str, str]]:
    """Yield tables of a suite in Markdown, and what each is about."""
    found = found[found.status != "skipped"]
    if found.seconds.isna().all():
        setting = found.case.iloc[0].setting("dtype", "regime")
        yield f"{setting}, worst of {found.regime.nunique()} kinds of inputs", errors(found)
        return
    for size in ("n", "v") if found.n.nunique() > 1 else ("v",):
        for group in sweeps(found, size):
            yield group.case.iloc[0].setting(size), overview(group, size)


def overview(found: DataFrame, size: str, methods: Sequence[str] = ()) -> str:
    """Return a table of methods against the cases of a sweep: times, memory, the worst errors.

    Args:
        found: the rows of the sweep.
        size: the column in which the cases differ.
        methods: the keys of the rows to show, in their order; none: all, ours first, then by time.
    """
    (unit, scale), last = unit_of(found.seconds.min()), found[size].max()
    found = found.sort_values(size, kind="stable")
    found["label"] = [x if size == "dtype" else f"{size.upper()} = {x}" for x in found[size]]
    found["shown"] = (found.seconds / scale).map(figure).where(found.seconds.notna(), found.status)
    found["peak"] = found.memory.map(mebibytes)
    found["place"] = found.seconds.where(~found.is_ours, 0)
    order = found.sort_values([size, "is_ours", "place"], ascending=[False, False, True])
    if methods:
        order = order[order.method.isin(methods)]
        order = order.sort_values("method", key=lambda keys: keys.map(methods.index), kind="stable")
    titles, labels = order.title.unique(), found.label.unique()
    parts = [found.pivot(index="title", columns="label", values=x) for x in ("shown", "peak")]
    times, peaks = (part.loc[titles, labels] for part in parts)
    table = times.add_suffix(f": {unit}").join(peaks.add_suffix(": MiB"))
    at_last, groups = found[found[size] == last].set_index("title"), found.groupby("title")
    percent = (100 * at_last.share).map("{:.0f} %".format).replace("nan %", "")
    table[f"{at_last.label.iloc[0]}: lower bound / time"] = percent
    table["loss error"] = groups["loss"].max().map(scientific)
    table["gradient error"] = groups["gradients"].max().map(scientific)
    table["note"] = groups.apply(_notes)
    bounds = found.dropna(subset="bound").drop_duplicates("label").set_index("label")
    if len(bounds):
        cells = (bounds.bound / scale).map(figure).add_suffix(f": {unit}")
        table.loc[bounds.bound_title.iloc[-1]] = cells
    return markdown(table)


def _notes(rows: DataFrame) -> str:
    """Return all notes on a method, once each, and the cases of those that are not in all."""
    found = rows.explode("notes").dropna(subset="notes").groupby("notes", sort=False).label
    return "; ".join(
        note if len(labels) == len(rows) else f"{', '.join(labels)}: {note}"
        for note, labels in found
    )


def faster(found: DataFrame) -> list[str]:
    """Return the methods that take less time than ours, a line for each."""
    found = found.assign(of_ours=found.seconds / seconds_of(found, KDLOSS, WITH_HEADS))
    found = found[~found.is_ours & (found.nearest == "") & (found.of_ours < 1)]
    lines = []
    for title, rows in found.groupby("title", sort=False):
        best = rows.loc[rows.of_ours.idxmin()]
        more = f", less than it in {len(rows)} cases" if len(rows) > 1 else ""
        time = f"{best.of_ours:.2f} of our time in {best['name']}"
        lines.append(f"* faster than ours: {title} takes {time}{more}")
    return lines


def errors(found: DataFrame) -> str:
    """Return a table of the worst relative errors of each method over all inputs, by dtype."""
    table = found.pivot_table(["loss", "gradients"], "title", "dtype", "max", sort=False)
    table.columns = [f"{dtype}: {part} error" for part, dtype in table.columns]
    return markdown(table.map(scientific))


def error_units(found: DataFrame) -> str:
    """Return a table of the worst errors in units, by dtype and divergence."""
    parts = {"loss": "loss", "gradients": "gradient in norm", "element": "gradient by element"}
    rows = found[found.units.map(bool)].reset_index()
    is_finite = (units := DataFrame([*rows.units])).map(math.isfinite)
    rows[[*parts]], by = units.where(is_finite), ["dtype", "divergence"]
    lost = rows[~is_finite.all(axis=1)]
    table = rows.pivot_table([*parts], by, "method", "max", sort=False)
    table = table[[(part, key) for part in parts for key in ("kdloss", "eager")]]
    table.columns = [x for part in parts.values() for x in (part, f"{part}, eager")]
    lines = [markdown(table.map("{:.2f}".format), left=2)]
    for names, regimes in lost.groupby([*by, "title"], sort=False).regime:
        where = ", ".join(sorted(set(regimes)))
        lines.append(f"Not finite, left out: {' '.join(names)}, on {where}.")
    return "\n\n".join(lines)


def goals(found: DataFrame) -> DataFrame:
    """Return every goal that there are figures for, the worst of them, and how often it is met."""
    seconds = found.set_index(["suite", "case", "method"]).seconds.to_dict()

    def ratio(change: Callable[[Case], Case]) -> list[float]:
        """Return the times over those of the same methods in other cases."""
        keys = zip(found.suite, map(change, found.case), found.method, strict=True)
        return found.seconds / [seconds.get(key, math.nan) for key in keys]

    found = found.assign(**{
        BOUND: 1 / found.share,
        FORWARD_KL: ratio(lambda case: replace(case, divergence="forward_kl", temperature=2.0)),
        TWICE_N: ratio(lambda case: replace(case, n=case.n // 2)),
        TWICE_V: ratio(lambda case: replace(case, v=case.v // 2)),
    })[found.is_ours & found.seconds.notna()]  # fmt: skip
    rows = []
    for which, name, most in GOALS:
        for title, group in found.query(which).dropna(subset=name).groupby("title", sort=False):
            worst, met = group.loc[group[name].idxmax()], (group[name] <= most).sum()
            rows.append({
                "goal": f"{title}: {name}", "at most": f"{most:.3g}",
                "worst here": f"{worst[name]:.3g}", "in": worst["name"],
                "in cases": f"{met} of {len(group)}",
                "verdict": "reached" if met == len(group) else "NOT reached",
            })  # fmt: skip
    return DataFrame(rows).set_index("goal") if rows else DataFrame()


def compare(before: DataFrame, after: DataFrame, tolerance: float) -> tuple[DataFrame, int, int]:
    """Return what changed, the worst first, how much is compared, and the number of regressions.

    By ratios to the lower bound (eager torch if there is none), which do not move with the
    machine's speed. A regression is a ratio of ours that grew by more than the tolerance, a method
    that lost its time, or an error that became more than twice as large, or not finite.
    """
    frames = []
    for found in (before, after):
        found = found[found.status != "skipped"]
        ratio = (1 / found.share).fillna(found.seconds / seconds_of(found, "eager"))
        # of several runs the best: a regression stays, a disturbance goes
        found = found.assign(ratio=ratio).sort_values("ratio")
        frames.append(found.drop_duplicates(["name", "method"]))
    both = frames[0].merge(frames[1], "inner", ["name", "method"], suffixes=("", "_now"))
    both["change"] = both.ratio_now / both.ratio - 1
    found = {
        f"ratio grew by more than {tolerance:.0%}": both.is_ours & (both.change > tolerance),
        "lost its time": both.seconds.notna() & both.seconds_now.isna(),
    }
    for part in ("loss", "gradients"):
        most = ERROR_GROWTH * both[part] + ERROR_SLACK
        found[f"error of the {part} grew"] = both[f"{part}_now"] > most
    both["verdict"] = ""
    for what, is_so in found.items():
        both["verdict"] += is_so.map({True: f"REGRESSION: {what}. ", False: ""})
    shown = both.sort_values("change", ascending=False)
    columns = ["name", "method", "ratio", "ratio_now", "change", "loss", "loss_now", "verdict"]
    compared = both.change.notna() | (both["loss"].notna() & both.loss_now.notna())
    return shown[columns], int(compared.sum()), int((both.verdict != "").sum())
