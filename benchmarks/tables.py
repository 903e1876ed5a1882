"""Tables of a report: a case, a suite at a glance, what was left out, the goals."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from . import errors, goals, reading
from .cases import HEADS, Case
from .cells import Table, figure, mebibytes, scientific, unit_of
from .reading import GRADIENTS, LOSS
from .records import Line, Report


def time_cell(line: Line, scale: float) -> str:
    """The median, or why there is none in a word."""
    seconds = reading.seconds(line)
    if seconds is None:
        return "" if line["status"] == "measured" else str(line["status"])
    return figure(seconds / scale)


def note(line: Line, brief: bool = False) -> str:
    """What it computes where that is something else, and what became of it."""
    return "; ".join(_notes(line, brief))


def _notes(line: Line, brief: bool) -> list[str]:
    words = [f"computes: {line['nearest']}"] if line["nearest"] else []
    if line["status"] != "measured":
        words.append(f"{line['status']}: {line['why']}")
    if reading.peaks_differ(line) and not brief:
        words.append("the process's peak is another")
    if reading.is_noisy(line) and not brief:
        words.append("disturbed")
    return words


# ------------------------------------------------------------------------------------- a case


def case_table(report: Report, suite: str, case: Case) -> str:
    """Return all results of a case, for a terminal."""
    cells = case_cells(report, suite, case)
    shown = cells.text() if cells.rows else "no method takes part"
    return "\n".join([reading.name(suite, case), shown, *_floor(report, suite, case)])


def case_cells(report: Report, suite: str, case: Case) -> Table:
    """Its columns are those that the suite has figures for."""
    lines = reading.taking_part(report, suite, case)
    unit, scale = unit_of([reading.seconds(line) for line in lines])
    ours = reading.reference(report, suite, case)
    columns: dict[str, Callable[[Line], str]] = {
        "": lambda line: line["title"],
        unit: lambda line: time_cell(line, scale),
        "[quartiles]": lambda line: _quartiles(line, scale),
        f"{ours['title'] if ours else 'ours'} / it": lambda line: _ratio(ours, line),
        "bound / it": lambda line: _share(line),
        "peak MiB": lambda line: mebibytes(reading.memory(line)),
        "process MiB": lambda line: mebibytes(reading.memory(line, "process_bytes")),
        "loss error": lambda line: scientific(reading.error(line, LOSS)),
        "gradient error": lambda line: scientific(reading.error(line, GRADIENTS)),
        "note": note,
    }
    rows = [[cell(line) for cell in columns.values()] for line in lines]
    return Table(list(columns), rows, note=True).without_empty()


def _quartiles(line: Line, scale: float) -> str:
    if line["time"] is None or line["time"]["repeats"] < 2:
        return ""
    low, high = (figure(q / scale) for q in line["time"]["quartiles_s"])
    return f"[{low}, {high}]"


def _ratio(ours: Line | None, line: Line) -> str:
    mine, its = reading.seconds(ours), reading.seconds(line)
    return "" if mine is None or not its else figure(mine / its)


def _share(line: Line) -> str:
    share = reading.floor_share(line)
    return "" if share is None else f"{100 * share:.0f} %"


def _floor(report: Report, suite: str, case: Case) -> list[str]:
    """What the machine could do, in a line."""
    line = report.floors.get((suite, case.name))
    if line is None:
        return []
    _, scale = unit_of([line["seconds"]])
    unit = "s" if scale == 1 else "ms"
    rate = f"{line['rate'] / 1e9:.1f} {'GFLOP/s' if case.level == HEADS else 'GB/s'}"
    why = f" ({line['why']})" if line.get("why") else ""
    title = reading.floor_title(report, suite, case)
    return [f"{title}, {figure(line['seconds'] / scale)} {unit} at {rate}{why}"]


# ------------------------------------------------------------------------------------ a suite


def lines_of(lines: list[str]) -> list[str]:
    """As one paragraph, or none."""
    return ["\n".join(lines)] if lines else []


def overviews(report: Report, suite: str) -> list[tuple[str, Table]]:
    """A table, and what it is about, for each group of cases that belong together."""
    if not _has_times(report, suite):
        return _regimes(report, suite)
    return [
        (reading.setting(cases[0], size), overview(report, suite, cases, size))
        for size in (("n", "v") if suite == reading.GROWTH else ("v",))
        for cases in reading.sweeps(report, suite, size)
    ]


def _has_times(report: Report, suite: str) -> bool:
    return any(
        line["time"] is not None for (of, _, _), line in report.results.items() if of == suite
    )


def overview(report: Report, suite: str, cases: Sequence[Case], size: str) -> Table:
    """Entrants against the cases of a sweep: times, memory, the worst errors.

    The lower bound's share is of the last case, the largest.
    """
    found = {case: reading.taking_part(report, suite, case) for case in cases}
    order = list(dict.fromkeys(x["entrant"] for case in cases[::-1] for x in found[case]))
    by_key = {key: [next((x for x in found[case] if x["entrant"] == key), None) for case in cases]
              for key in order}  # fmt: skip
    unit, scale = unit_of([reading.seconds(x) for lines in found.values() for x in lines])
    labels = [f"{size.upper()} = {getattr(case, size)}" for case in cases]
    rows = [_overview_row(lines, labels, scale) for lines in by_key.values()]
    if any((suite, case.name) in report.floors for case in cases):
        times = [reading.floor(report, suite, case) for case in cases]
        title = reading.floor_titles(report, suite, cases)
        shown = ["" if time is None else figure(time / scale) for time in times]
        rows.append([title, *shown, *[""] * (len(cases) + 4)])
    head = ["", *(f"{label}: {unit}" for label in labels), *(f"{label}: MiB" for label in labels),
            f"{labels[-1]}: bound / it", "loss error", "gradient error", "note"]  # fmt: skip
    return Table(head, rows, note=True).without_empty()


def _overview_row(every: Sequence[Line | None], labels: Sequence[str], scale: float) -> list[str]:
    lines = [line for line in every if line is not None]
    worst = [errors.worst([reading.error(line, of) for line in lines]) for of in (LOSS, GRADIENTS)]
    return [
        lines[0]["title"],
        *("" if x is None else time_cell(x, scale) for x in every),
        *("" if x is None else mebibytes(reading.memory(x)) for x in every),
        "" if every[-1] is None else _share(every[-1]),
        *(scientific(x) for x in worst),
        _overview_note(every, labels),
    ]


def _overview_note(every: Sequence[Line | None], labels: Sequence[str]) -> str:
    """Everything that is said of an entrant, once, and in which cases unless it is in all."""
    found: dict[str, list[str]] = {}
    for line, label in zip(every, labels, strict=True):
        for word in [] if line is None else _notes(line, brief=True):
            found.setdefault(word, []).append(label)
    count = sum(line is not None for line in every)
    return "; ".join(word if len(where) == count else f"{', '.join(where)}: {word}"
                     for word, where in found.items())  # fmt: skip


def _regimes(report: Report, suite: str) -> list[tuple[str, Table]]:
    """Entrants over all regimes of inputs, by everything else."""
    groups: dict[Case, list[Case]] = {}
    for case in report.cases(suite):
        groups.setdefault(case.with_(regime=""), []).append(case)
    return [(f"{reading.setting(one)}, {len(cases)} kinds of inputs", _errors(report, suite, cases))
            for one, cases in groups.items()]  # fmt: skip


def _errors(report: Report, suite: str, cases: Sequence[Case]) -> Table:
    lines: dict[str, list[tuple[Case, Line]]] = {}
    for case in cases:
        for line in reading.taking_part(report, suite, case):
            lines.setdefault(line["entrant"], []).append((case, line))
    rows = []
    for found in lines.values():
        row = [found[0][1]["title"]]
        for of in (LOSS, GRADIENTS):
            pairs = [
                (e, case.regime) for case, x in found if (e := reading.error(x, of)) is not None
            ]
            worst = errors.worst([e for e, _ in pairs])
            where = next((regime for e, regime in pairs if e is worst), "")
            row += [scientific(worst), where if worst is not None else ""]
        row.append("; ".join(dict.fromkeys(note(x) for _, x in found if note(x))))
        rows.append(row)
    head = ["", "worst loss error", "on", "worst gradient error", "on", "note"]
    return Table(head, rows, note=True).without_empty()


def faster_lines(report: Report, suite: str) -> list[str]:
    """Where we lose, a line for each entrant."""
    found: dict[str, list[tuple[Case, Line, float]]] = {}
    for case, line, share in reading.faster(report, suite):
        if line["nearest"]:  # its time says nothing about the same loss
            continue
        found.setdefault(line["entrant"], []).append((case, line, share))
    lines = []
    for every in found.values():
        case, line, share = min(every, key=lambda one: one[2])
        more = f", less than it in {len(every)} cases" if len(every) > 1 else ""
        lines.append(f"faster than ours: {line['title']} takes {share:.2f} of its time in "
                     f"{case.name}{more}")  # fmt: skip
    return lines


# ------------------------------------------------------------------------- left out, and goals


def conclusion(report: Report, suite: str) -> str:
    """Return the text below the tables of a suite: errors, faster methods, those left out."""
    glances = [] if _has_times(report, suite) else [
        f"{suite}: {title}\n{cells.text()}\n" for title, cells in overviews(report, suite)
    ]  # fmt: skip
    lines = faster_lines(report, suite) + left_out_lines(report, suite)
    return "\n".join([*glances, *(lines or [f"{suite}: no method was left out"])])


def left_out_lines(report: Report, suite: str) -> list[str]:
    """A line for each reason."""
    reasons: dict[tuple[str, str], int] = {}
    number: dict[str, int] = {}
    for (of, _, _), line in report.results.items():
        if of == suite:
            number[line["title"]] = number.get(line["title"], 0) + 1
            if line["status"] == "skipped":
                key = line["title"], line["why"]
                reasons[key] = reasons.get(key, 0) + 1
    return [
        f"left out of {suite}: {title}: {why}"
        + ("" if count == number[title] else f" (in {count} of {number[title]} cases)")
        for (title, why), count in reasons.items()
    ]


def goals_cells(report: Report) -> Table:
    """Every goal that there are figures for, and the worst of them."""
    head = ["goal", "", "worst here", "in", "reached in", ""]
    return Table(head, goals.summary(goals.checks(report)))


def goals_table(report: Report) -> str:
    """The same for a terminal."""
    cells = goals_cells(report)
    return cells.text() if cells.rows else "goals: no figures for any of them"
