"""Tables of a report: a suite at a glance, faster methods, and those left out.

pandas is imported when a table is made: `run`, on a machine that is only measured on, needs nothing
but torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fused_kd.options import MIB

from .cases import Case
from .methods.ours import KDLOSS, WITH_HEADS
from .records import Report
from .report import markdown_table
from .schema import Bound, Result

if TYPE_CHECKING:
    from pandas import DataFrame, Series

#: The lower bounds, as shown.
BOUNDS = {"copy": "1.5 copies", "products": "the four products"}
#: Bytes by which the two counts of memory may differ: heap that is used again, code that is loaded.
PEAK_SLACK = 16 * MIB
#: The columns in which the cases of a suite may differ.
SIZES = ["level", "dtype", "n", "v", "student_hidden", "teacher_hidden", "divergence",
         "temperature", "regime", "device"]  # fmt: skip


def frame(report: Report) -> DataFrame:
    """Return a row for each result, with the case's sizes, its lower bound, and our time in it."""
    import pandas

    rows = []
    for (suite, case, key), result in report.results.items():
        bound = report.bounds.get((suite, case))
        rows.append({
            **vars(result), **case.sizes, **errors(result), "case": case, "key": (suite, case, key),
            "name": case_name(suite, case), "notes": notes(result),
            "seconds": (result.time or {}).get("median_s"), "bound": bound and bound.seconds,
            "share": None if result.nearest else result.bound_share,
            "memory": result.memory.get("allocator_bytes"),
            "bound_title": bound and bound_title(bound),
        })  # fmt: skip
    if not rows:
        raise ValueError("the files have no results")
    found = pandas.DataFrame(rows)
    numbers = ["seconds", "bound", "share", "memory", "loss", "gradients"]
    found[numbers] = found[numbers].apply(pandas.to_numeric)
    found["ours"] = seconds_of(found, KDLOSS, WITH_HEADS)
    return found


def seconds_of(found: DataFrame, *methods: str) -> Series:
    """Return for each row the seconds of the first of these methods in its case."""
    return found.name.map(found[found.method.isin(methods)].groupby("name").seconds.first())


def case_name(suite: str, case: Case) -> str:
    """Return a name of a case in a suite; the suites of the levels are in the case's already."""
    return case.name if suite == case.level else f"{suite}: {case.name}"


def errors(result: Result) -> dict[str, float | None]:
    """Return the errors; infinity for one that is no number, None: not compared."""
    found = {part: result.error.get(part) for part in ("loss", "gradients")}
    return {part: math.inf if error != error else error for part, error in found.items()}


def notes(result: Result) -> list[str]:
    """Return what a method computes if that is something else, and why it has no time."""
    words = [f"computes: {result.nearest}"] if result.nearest else []
    return words + ([f"{result.status}: {result.why}"] if result.status != "measured" else [])


def bound_title(bound: Bound) -> str:
    """Return the name of a lower bound, with the reason why it is not in the case's dtype."""
    return f"lower bound: {BOUNDS[bound.name]}" + (f" ({bound.why})" if bound.why else "")


def machine(environment: dict[str, Any]) -> str:
    """Return what the figures depend on, in a line."""
    named = {"threads": "{} threads", "instruction_set": "{}", "torch": "torch {}",
             "driver": "driver {}", "commit": "commit {}"}  # fmt: skip
    facts = [text.format(environment[key]) for key, text in named.items() if environment.get(key)]
    return ", ".join([str(environment.get("device", "unknown device")), *facts])


# ------------------------------------------------------------------------------------ figures


def figure(value: float) -> str:
    """Return three significant digits, without an exponent; "" for NaN."""
    if value == 0 or not math.isfinite(value):
        return "" if math.isnan(value) else f"{value:g}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def unit_of(times: Sequence[float]) -> tuple[str, float]:
    """Return the unit in which all of them are shown, and its seconds: by the fastest."""
    fastest = min((time for time in times if time > 0), default=0.0)
    return ("s", 1.0) if fastest >= 1.0 else ("ms", 1e-3)


def time_text(seconds: float) -> str:
    """Return a time with its unit."""
    unit, scale = unit_of([seconds])
    return f"{figure(seconds / scale)} {unit}"


def mebibytes(count: float | None) -> str:
    """Return bytes in MiB; "" if they are unknown."""
    if count is None or math.isnan(count):
        return ""
    return f"{count / MIB:.{2 if count < 10 * MIB else 1 if count < 100 * MIB else 0}f}"


def scientific(value: float | None) -> str:
    """Return an error; "" if it was not compared."""
    if value is None or math.isnan(value):
        return ""
    return f"{value:.1e}" if math.isfinite(value) else "not finite"


def percent(share: float) -> str:
    """Return a share; "" for NaN."""
    return "" if math.isnan(share) else f"{100 * share:.0f} %"


def line(record: Result | Bound) -> str:
    """Return a record as a line of a terminal."""
    if isinstance(record, Bound):
        rate = f"at {record.rate / 1e9:.1f} {'GB/s' if record.name == 'copy' else 'GFLOP/s'}"
        return f"  {bound_title(record):<36} {time_text(record.seconds):>9}  {rate}"
    time, words = record.time, notes(record)
    peaks = [record.memory.get(kind) for kind in ("allocator_bytes", "process_bytes")]
    if None not in peaks and abs(peaks[0] - peaks[1]) > max(peaks) / 10 + PEAK_SLACK:
        words.append(f"the process's peak is {mebibytes(peaks[1])} MiB")
    if time and time["undisturbed"] < time["repeats"]:
        words.append("disturbed")
    shown = {
        "quartiles": " … ".join(map(time_text, time["quartiles_s"])) if time else "",
        "bound / time": percent(record.bound_share or math.nan), "peak MiB": mebibytes(peaks[0]),
        "errors": ", ".join(filter(None, map(scientific, errors(record).values()))),
    }  # fmt: skip
    words = [f"{name} {text}" for name, text in shown.items() if text] + words
    return (
        f"  {record.title:<36} {time_text(time['median_s']) if time else '':>9}  {'; '.join(words)}"
    )


# ------------------------------------------------------------------------------------ a suite


def sweeps(found: DataFrame, size: str) -> list[DataFrame]:
    """Return the rows of a suite in groups whose cases differ in one size alone."""
    groups = found.groupby([name for name in SIZES if name != size], sort=False)
    is_only = found.n.nunique() == 1 or found.v.nunique() == 1
    return [group for _, group in groups if is_only or group[size].nunique() > 1]


def overviews(found: DataFrame) -> Iterator[tuple[str, str]]:
    """Yield tables of a suite in Markdown, and what each is about."""
    found = found[found.status != "skipped"]
    if found.seconds.isna().all():
        for group in sweeps(found, "regime"):
            kinds = f"{group.regime.nunique()} kinds of inputs"
            yield f"{group.case.iloc[0].setting('regime')}, {kinds}", _worst_errors(group)
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
    (unit, scale), last = unit_of(found.seconds), found[size].max()
    found = found.sort_values(size, kind="stable")
    found = found.assign(
        label=[value if size == "dtype" else f"{size.upper()} = {value}" for value in found[size]],
        shown=(found.seconds / scale).map(figure).where(found.seconds.notna(), found.status),
        peak=found.memory.map(mebibytes),
        place=found.seconds.where(~found.is_ours, 0.0),
    )
    order = found.sort_values([size, "is_ours", "place"], ascending=[False, False, True])
    if methods:
        order = order[order.method.isin(methods)]
        order = order.sort_values("method", key=lambda keys: keys.map(methods.index), kind="stable")
    titles, labels = order.title.unique(), found.label.unique()
    parts = [(found.pivot(index="title", columns="label", values=values)[labels], name)
             for values, name in (("shown", unit), ("peak", "MiB"))]  # fmt: skip
    times, peaks = (part.loc[titles].add_suffix(f": {name}") for part, name in parts)
    groups, table = found.groupby("title"), times.join(peaks)
    at_last = found[found[size] == last].set_index("title")
    table[f"{at_last.label.iloc[0]}: lower bound / time"] = at_last.share.map(percent)
    table["loss error"] = groups["loss"].max().map(scientific)
    table["gradient error"] = groups["gradients"].max().map(scientific)
    table["note"] = groups.apply(_notes)
    bounds = found.dropna(subset="bound").drop_duplicates("label")
    if len(bounds):
        figures = dict(zip(bounds.label + f": {unit}", bounds.bound / scale, strict=True))
        cells = {label: figure(value) for label, value in figures.items()}
        table.loc[bounds.bound_title.iloc[-1]] = cells
    return markdown(table)


def markdown(table: DataFrame) -> str:
    """Return a table with its index as the first column, without empty columns."""
    table = table.fillna("")
    table = table.loc[:, (table != "").any()]
    text = markdown_table(["", *table.columns], table.reset_index().to_numpy().tolist())
    return text.replace("---: |\n", ":--- |\n", 1) if table.columns[-1] == "note" else text


def _notes(rows: DataFrame) -> str:
    """Return all notes on a method, once each, and the cases of those that are not in all."""
    found = rows.explode("notes").dropna(subset="notes").groupby("notes", sort=False).label
    return "; ".join(
        note if len(labels) == len(rows) else f"{', '.join(labels)}: {note}"
        for note, labels in found
    )


def _worst_errors(found: DataFrame) -> str:
    """Return a table of the worst errors over all kinds of inputs."""
    table = found.groupby("title", sort=False)[["nearest"]].first()
    for part, name in (("loss", "loss"), ("gradients", "gradient")):
        worst = found.loc[found.dropna(subset=part).groupby("title")[part].idxmax()]
        worst = worst.set_index("title")
        table[f"worst {name} error"] = worst[part].map(scientific)
        table[f"{name}: on"] = worst.regime
    return markdown(table[[*table.columns[1:], "nearest"]].rename(columns={"nearest": "computes"}))


def faster(found: DataFrame) -> list[str]:
    """Return the methods that take less time than ours, a line for each."""
    found = found.assign(of_ours=found.seconds / found.ours)
    found = found[~found.is_ours & (found.nearest == "") & (found.of_ours < 1)]
    lines = []
    for title, rows in found.groupby("title", sort=False):
        best = rows.loc[rows.of_ours.idxmin()]
        more = f", less than it in {len(rows)} cases" if len(rows) > 1 else ""
        time = f"{best.of_ours:.2f} of our time in {best['name']}"
        lines.append(f"* faster than ours: {title} takes {time}{more}")
    return lines


def left_out(found: DataFrame) -> list[str]:
    """Return the methods that could not take part, a line for each reason."""
    cases, lines = found.title.value_counts(), []
    skipped = found[found.status == "skipped"].groupby(["title", "why"], sort=False)
    for (title, why), count in skipped.size().items():
        some = "" if count == cases[title] else f" (in {count} of {cases[title]} cases)"
        lines.append(f"* left out: {title}: {why}{some}")
    return lines
