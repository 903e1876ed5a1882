"""``python -m benchmarks.publish [--check]``: documents from the committed results.

Writes README's headline and table, the picture, and the tables of docs/benchmarks.md. With
``--check`` nothing is written: every difference is a line, and the exit status is then 1.

README and the picture are of the last machine by the names of its files, cpu_avx2 before
cpu_avx512 before gpu; docs/benchmarks.md has all of them, the last one first.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

from . import pictures, reading, records, tables
from .cases import HEADS, LOGITS, Case
from .cells import MISSING, Table, figure, mebibytes, unit_of
from .entrants.ours import IN_PLACE, KDLOSS, WITH_HEADS
from .reading import COMPILE, COMPOSITIONS, EAGER
from .records import Line, Report
from .report import Parser, between_markers, markers
from .suites import DTYPES

WIDTH = 120  # of a line of text
ROOT = Path(__file__).resolve().parents[1]
NAME, HEADLINE = "benchmarks", "headline"  # of its markers
README, DOCUMENT, PICTURE = "README.md", "docs/benchmarks.md", "docs/benchmarks.svg"
#: The case of README's table, and its columns.
ROWS, VOCABULARY = 512, 128256
#: Its rows by suite, but for the fastest peer and the floor.
SHOWN = {LOGITS: (IN_PLACE, KDLOSS, COMPILE, EAGER), HEADS: (WITH_HEADS, COMPILE)}


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Writes or checks; returns the exit status."""
    parser = Parser(prog="python -m benchmarks.publish", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, say what differs")
    check = parser.parse_args(arguments).check
    try:
        reports = read_all(root)
        wrong = list(_differences(root, reports)) if check else list(_write(root, reports))
    except ValueError as error:
        wrong = [str(error)]
    for line in wrong:
        print(line)
    return 1 if wrong else 0


def read_all(root: Path) -> list[Report]:
    """The committed results, one report for each machine, in the order of the files' names."""
    files = sorted((root / "benchmarks" / "results").glob("*.jsonl"))
    if not files:
        raise ValueError("benchmarks/results: there are no results (*.jsonl)")
    machines: dict[tuple[object, ...], list[Path]] = {}
    for path in files:
        found = records.read([path]).environment
        key = tuple(found.get(name) for name in ("device", "instruction_set", "threads"))
        machines.setdefault(key, []).append(path)
    return [records.read(paths) for paths in machines.values()]


def _texts(reports: Sequence[Report]) -> Iterator[tuple[str, str, str]]:
    """Documents, the names of their markers, and what must stand between those."""
    yield README, HEADLINE, headline(reports[-1])
    yield README, NAME, readme_table(reports[-1])
    yield DOCUMENT, NAME, "\n\n".join(map(document, reversed(reports)))


def _write(root: Path, reports: Sequence[Report]) -> Iterator[str]:
    """Yields what could not be."""
    picture = pictures.published(reports[-1], chosen(reports[-1]))
    for name, marker, text in _texts(reports):
        path, (begin, _) = root / name, markers(marker)
        content = path.read_text() if path.exists() else ""
        if begin not in content:
            yield f"{name}: has no {begin}"
            continue
        path.write_text(between_markers(content, text, marker))
        print(f"{name}: {marker} written")
    (root / PICTURE).write_text(picture)
    print(f"{PICTURE}: written")


def _differences(root: Path, reports: Sequence[Report]) -> Iterator[str]:
    """A line for each."""
    for name, marker, text in _texts(reports):
        path, (begin, end) = root / name, markers(marker)
        content = path.read_text() if path.exists() else ""
        if content.count(begin) != 1 or content.count(end) != 1:
            yield f"{name}: expected one {begin} and after it one {end}"
            continue
        there = content.split(begin)[1].split(end)[0].strip("\n")
        for has, wanted in zip_longest(there.split("\n"), text.split("\n")):
            if has != wanted:
                yield f"{name}: has {_said(has)}, the results say {_said(wanted)}"
    path = root / PICTURE
    digest = pictures.digest_of(reports[-1], chosen(reports[-1]))
    if not path.exists() or digest not in path.read_text():
        yield f"{PICTURE}: was not made from these results"


def _said(line: str | None) -> str:
    return "no such line" if line is None else repr(line)


# ------------------------------------------------------------------------------------- README


def headline(report: Report) -> str:
    """Return a sentence: ours in place against plain torch, in the first dtype of the table."""
    case = _case(report, LOGITS, DTYPES[0])
    ours, *others = (None if case is None else reading.entrant(report, LOGITS, case, key)
                     for key in (IN_PLACE, COMPILE, EAGER))  # fmt: skip
    time = reading.seconds(ours)
    if case is None or ours is None or time is None:
        return "There are no results of this size."
    found = [(name, line, seconds)
             for name, line in zip(("`torch.compile`", "eager torch"), others, strict=True)
             if line is not None and (seconds := reading.seconds(line)) is not None]  # fmt: skip
    times = " and ".join(f"{_time(seconds)} for {name}" for name, _, seconds in found)
    peaks = " and ".join(_cells(line)[1] for _, line, _ in found)
    against = (f" against {times}", f" against {peaks}") if found else ("", "")
    found_on = report.environment
    where = f"{found_on['device']} ("
    if case.device == "cpu":
        device = str(found_on["device"]).removeprefix("CPU: ")
        where = f"{found_on['threads']} threads of {device} ({found_on['instruction_set']}; "
    return _filled(
        f"On {where}{ROWS} × {VOCABULARY} logits, {case.dtype}, forward + backward): "
        f"**{_time(time)}** in place{against[0]}; "
        f"memory beyond the logits: {_cells(ours)[1]}{against[1]}."
    )


def _filled(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def readme_table(report: Report) -> str:
    """Return a few rows: ours, plain torch, the fastest peer and the lower bound."""
    rows = [row for suite in SHOWN for row in _rows(report, suite)]
    head = ["", *(text for dtype in DTYPES for text in (dtype, "memory"))]
    cells = Table(head, rows)
    lost = [line for suite in SHOWN for line in _lost(report, suite)]
    where = _filled(f"{reading.machine(report.environment)}; {_what(report)}:")
    faster = "; ".join(lost) or "no method that computes the same"
    return "\n".join(
        [where, "", cells.markdown(), "", _filled(f"Faster than ours here: {faster}.")]
    )


def _what(report: Report) -> str:
    """The sizes of the table, in words."""
    hidden = next((case for dtype in DTYPES if (case := _case(report, HEADS, dtype))), None)
    states = "" if hidden is None else (f", hidden states of {hidden.student_hidden} (student) "
                                        f"and {hidden.teacher_hidden} (teacher)")  # fmt: skip
    return (f"N = {ROWS}, V = {VOCABULARY}, T = 2, `forward_kl` + cross-entropy, forward + "
            f"backward{states}; memory: the peak beyond the inputs")  # fmt: skip


def _case(report: Report, suite: str, dtype: str) -> Case | None:
    return next(
        (case for case in report.cases(suite)
         if (case.n, case.v, case.dtype, case.temperature, case.divergence)
         == (ROWS, VOCABULARY, dtype, 2.0, "forward_kl")), None,
    )  # fmt: skip


def _rows(report: Report, suite: str) -> Iterator[list[str]]:
    cases = [_case(report, suite, dtype) for dtype in DTYPES]
    peer = best_peer(report, suite)
    level = "" if suite == LOGITS else ", from hidden states"
    for key in (*SHOWN[suite], *([peer] if peer else [])):
        lines = [None if case is None else reading.entrant(report, suite, case, key)
                 for case in cases]  # fmt: skip
        title = next((line["title"] for line in lines if line is not None), None)
        if title is not None:
            where = "" if key in (KDLOSS, IN_PLACE, WITH_HEADS) else level
            yield [title + where, *(cell for line in lines for cell in _cells(line))]
    floors = [None if case is None else reading.floor(report, suite, case) for case in cases]
    title = reading.floor_titles(report, suite, [case for case in cases if case is not None])
    if title:
        shown = [MISSING if time is None else _time(time) for time in floors]
        yield [title, *(cell for time in shown for cell in (time, ""))]


def _cells(line: Line | None) -> tuple[str, str]:
    """Time and memory."""
    if line is None or line["status"] == "skipped":
        return MISSING, ""
    time, peak = reading.seconds(line), reading.memory(line)
    shown = str(line["status"]) if time is None else _time(time)
    return shown, MISSING if peak is None else f"{mebibytes(peak)} MiB"


def _time(seconds: float) -> str:
    unit, scale = unit_of([seconds])
    return f"{figure(seconds / scale)} {unit}"


def best_peer(report: Report, suite: str) -> str | None:
    """The fastest that is neither ours nor plain torch and computes the same, in float32 first."""
    for dtype in reversed(DTYPES):
        case = _case(report, suite, dtype)
        for line in [] if case is None else reading.taking_part(report, suite, case):
            is_peer = not line["is_ours"] and line["entrant"] not in COMPOSITIONS
            if is_peer and not line["nearest"] and reading.seconds(line) is not None:
                return str(line["entrant"])
    return None


def _lost(report: Report, suite: str) -> Iterator[str]:
    cases = [_case(report, suite, dtype) for dtype in DTYPES]
    for case, line, share in reading.faster(report, suite):
        if case in cases and not line["nearest"]:
            yield f"{line['title']} ({case.dtype}: {share:.2f} of the time)"


# ------------------------------------------------------------------------- picture, document


def chosen(report: Report) -> dict[str, tuple[list[Case], list[str]]]:
    """What the picture shows: by suite, a sweep over the vocabulary, and README's entrants."""
    found = {}
    for suite, keys in SHOWN.items():
        peer = best_peer(report, suite)
        sweeps = [cases for cases in reading.sweeps(report, suite, "v")
                  if cases[0].n == ROWS and cases[0].divergence == "forward_kl"]  # fmt: skip
        if sweeps:  # the one with most times; the first of those
            cases = max(sweeps, key=lambda cases: _times(report, suite, cases))
            found[suite] = cases, [*keys, EAGER, *([peer] if peer else [])]
    return found


def _times(report: Report, suite: str, cases: Sequence[Case]) -> int:
    lines = [line for case in cases for line in report.of(suite, case)]
    return sum(line["status"] == "measured" and line["time"] is not None for line in lines)


def document(report: Report) -> str:
    """Return the results of a machine: every suite, goals, faster methods and those left out."""
    parts = [f"### {reading.machine(report.environment)}"]
    for suite in report.suites:
        parts.append(f"#### {suite}")
        for title, cells in tables.overviews(report, suite):
            parts += [f"{title}:", cells.markdown()]
        lines = tables.faster_lines(report, suite) + tables.left_out_lines(report, suite)
        parts += tables.lines_of([f"* {line}" for line in lines])
    goals = tables.goals_cells(report)
    if goals.rows:
        parts += ["#### Goals", goals.markdown()]
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
