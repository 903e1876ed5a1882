"""What tables, pictures and comparisons ask of a report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from fused_kd.options import MIB

from .cases import HEADS, LOGITS, Case
from .entrants.ours import KDLOSS, OURS
from .records import Line, Report

#: Bytes by which the two counts of memory may differ: heap that is used again, code that is loaded.
PEAK_SLACK = 16 * MIB
LOSS, GRADIENTS = "loss", "gradients"
EAGER, COMPILE = "eager", "compile"
#: Plain torch, in the forms that a user writes; what else is not ours is a peer.
COMPOSITIONS = (EAGER, COMPILE, "checkpoint")
#: The suite whose cases differ in two ways, and is looked at along both.
GROWTH = "growth"
#: Lower bounds of the time, as shown.
FLOORS = {"copy": "1.5 copies", "products": "the four products"}


def seconds(line: Line | None) -> float | None:
    """The median, on all rows of the case."""
    if line is None or line["time"] is None:
        return None
    return float(line["time"]["median_s"])


def memory(line: Line | None, kind: str = "allocator_bytes") -> int | None:
    """A peak in bytes beyond the inputs; None: unknown."""
    found: int | None = ((line or {}).get("memory") or {}).get(kind)
    return found


def error(line: Line, of: str) -> float | None:
    """Relative to float64; None: not compared. Not finite: it is wrong."""
    found: float | None = (line["error"] or {}).get(of)
    return found


def is_noisy(line: Line) -> bool:
    """Too few undisturbed repetitions: the figure may be too high."""
    time = line["time"]
    return time is not None and time["undisturbed"] < time["repeats"]


def peaks_differ(line: Line) -> bool:
    """Whether the process and the allocator disagree by more than a tenth and a few pages."""
    both = [memory(line, kind) for kind in ("allocator_bytes", "process_bytes")]
    if both[0] is None or both[1] is None:
        return False
    return abs(both[0] - both[1]) > max(both[0], both[1]) / 10 + PEAK_SLACK


def taking_part(report: Report, suite: str, case: Case) -> list[Line]:
    """All but the skipped: ours as they come, then the others by time, then those without one."""

    def place(line: Line) -> tuple[bool, float]:
        time = seconds(line)
        return not line["is_ours"], 0 if line["is_ours"] else math.inf if time is None else time

    return sorted((x for x in report.of(suite, case) if x["status"] != "skipped"), key=place)


def entrant(report: Report, suite: str, case: Case, key: str) -> Line | None:
    return report.results.get((suite, case.name, key))


def reference(report: Report, suite: str, case: Case) -> Line | None:
    """Ours, that the others are compared with."""
    ours = [x for x in report.of(suite, case) if x["is_ours"] and seconds(x) is not None]
    usual = OURS.get(case.level, KDLOSS)
    return next((x for x in ours if x["entrant"] == usual), ours[0] if ours else None)


def floor(report: Report, suite: str, case: Case) -> float | None:
    """The least seconds that the case can take."""
    line = report.floors.get((suite, case.name))
    return None if line is None else float(line["seconds"])


def floor_title(report: Report, suite: str, case: Case) -> str:
    line = report.floors.get((suite, case.name))
    return "" if line is None else f"lower bound: {FLOORS.get(line['name'], line['name'])}"


def floor_share(line: Line) -> float | None:
    """The least time over its own; None where it computes something else, or there is no floor."""
    found: float | None = None if line["nearest"] else line["floor_share"]
    return found


def floor_titles(report: Report, suite: str, cases: Sequence[Case]) -> str:
    """Of several cases in a row: with the reason, of the last, why it is not their dtype's."""
    titles = [title for case in cases if (title := floor_title(report, suite, case))]
    whys = [line.get("why") for case in cases
            if (line := report.floors.get((suite, case.name))) is not None]  # fmt: skip
    reasons = [f" ({why})" for why in whys if why]
    return "".join([*titles[:1], *reasons[-1:]])


def sweeps(report: Report, suite: str, size: str) -> list[list[Case]]:
    """Cases that differ in one size alone ("v" or "n"), in its order."""
    found: dict[Case, list[Case]] = {}
    for case in report.cases(suite):
        found.setdefault(case.with_(**{size: 0}), []).append(case)
    every = [sorted(cases, key=lambda case: getattr(case, size)) for cases in found.values()]
    return [cases for cases in every if suite != GROWTH or len(cases) > 1]


def faster(report: Report, suite: str) -> Iterator[tuple[Case, Line, float]]:
    """Yield the methods that take less time than ours, and their share of it."""
    for case in report.cases(suite):
        ours = seconds(reference(report, suite, case))
        for line in taking_part(report, suite, case):
            time = seconds(line)
            if ours and time is not None and not line["is_ours"] and time < ours:
                yield case, line, time / ours


def setting(case: Case, *without: str) -> str:
    """A case in words, without some of its sizes."""
    words = {
        "level": {LOGITS: "logits", HEADS: "hidden states"}.get(case.level, "training step"),
        "dtype": case.dtype,
        "n": f"N = {case.n}",
        "v": f"V = {case.v}",
        "hidden": "" if case.level == LOGITS
        else f"H = {case.student_hidden} and {case.teacher_hidden}",
        "divergence": case.divergence,
        "temperature": f"T = {case.temperature:g}",
        "device": "" if case.device == "cpu" else case.device,
    }  # fmt: skip
    return ", ".join(text for name, text in words.items() if text and name not in without)


def name(suite: str, case: Case) -> str:
    """Of a case of a suite; the suites of the levels are in the name already."""
    return case.name if suite == case.level else f"{suite}: {case.name}"


def machine(environment: dict[str, Any]) -> str:
    """What the figures depend on, in a line."""
    named = {"threads": "{} threads", "instruction_set": "{}", "torch": "torch {}",
             "driver": "driver {}", "commit": "commit {}"}  # fmt: skip
    facts = [text.format(environment[name]) for name, text in named.items()
             if environment.get(name)]  # fmt: skip
    return ", ".join([str(environment.get("device", "unknown device")), *facts])
