"""The numbers that must be reached, as checks on a report; nothing that was not measured counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fused_kd.engines.memory import CPU_BUDGET, GPU_ROWS, GPU_SHARE
from fused_kd.options import MIB
from fused_kd.plan import plan

from .cases import DTYPES, HEADS, LOGITS, Case
from .entrants.ours import BUDGETED, FORWARD, IN_PLACE, KDLOSS, WITH_HEADS
from .reading import (
    COMPILE,
    EAGER,
    GRADIENTS,
    GROWTH,
    LOSS,
    entrant,
    error,
    memory,
    reference,
    seconds,
)
from .records import Line, Report
from .report import verdict

CPU, CUDA, TRITON = "cpu", "cuda", "-triton"


def _by_dtype(narrow: float, fp32: float) -> dict[str, float]:
    return {"bf16": narrow, "fp16": narrow, "fp32": fp32}


#: Time of a composition of plain torch over ours, at least; CPU, logits.
SPEEDUPS = {
    (COMPILE, IN_PLACE): _by_dtype(18, 18),
    (COMPILE, KDLOSS): _by_dtype(10, 8),
    (EAGER, IN_PLACE): _by_dtype(80, 80),
    (EAGER, KDLOSS): _by_dtype(50, 50),
}
#: Time over the floor, at most.
OVER_FLOOR = {
    (CPU, IN_PLACE): _by_dtype(1.6, 1.2),
    (CPU, FORWARD): _by_dtype(1.3, 1.3),
    (CPU, WITH_HEADS): _by_dtype(1.15, 1.15),
    (CUDA, KDLOSS): _by_dtype(1.15, 1.15),
    (CUDA, IN_PLACE): _by_dtype(1.15, 1.15),
    (CUDA, KDLOSS + TRITON): _by_dtype(1.5, 1.5),
    (CUDA, IN_PLACE + TRITON): _by_dtype(1.5, 1.5),
    (CUDA, WITH_HEADS): _by_dtype(1.1, 1.1),
    (CUDA, WITH_HEADS + TRITON): _by_dtype(1.1, 1.1),
}
#: Smaller matrices stay in the caches, where a copy is no floor; a GPU is to be filled.
LEAST_BYTES = 16 * MIB
GPU_LEAST_ROWS, GPU_LEAST_VOCABULARY = 8192, 128256
#: Time of a divergence, at any temperature, over that of forward_kl at T = 2, at most.
DIVERGENCES = {"forward_kl": 2.0, "reverse_kl": 2.0, "mse": 2.0, "jsd": 3.0, "tvd": 3.0}
#: Time after N or V is doubled over the time before, and from which sizes on.
DOUBLED, DOUBLED_TOLERANCE = 2.0, 0.1
DOUBLED_FROM = {"n": 256, "v": 64128}
#: Bytes beyond gradients, accumulator and budget: logits, hidden states.
MEMORY_SLACK = {LOGITS: MIB, HEADS: 8 * MIB}
#: Our error over eager's, at most, and what rounding alone may cost.
ERROR_FACTOR, ERROR_SLACK = 1.1, 2 * torch.finfo(torch.float32).eps
ERROR_GOAL = f"≤ {ERROR_FACTOR} × eager's + 2 eps"


@dataclass(frozen=True)
class Check:
    """A figure and its goal.

    Args:
        what: the figure.
        goal: for people.
        shown: the figure, for people.
        share: of what the goal allows; above 1 (or not a number) it is not reached.
        case: where it was measured.
    """

    what: str
    goal: str
    shown: str
    share: float
    case: Case

    @property
    def reached(self) -> bool:
        return self.share <= 1

    @classmethod
    def at_most(cls, what: str, value: float, limit: float, case: Case) -> Check:
        return cls(what, f"≤ {limit:g}", f"{value:.2f}", value / limit, case)

    @classmethod
    def at_least(cls, what: str, value: float, limit: float, case: Case) -> Check:
        return cls(what, f"≥ {limit:g}", f"{value:.1f}", limit / value, case)


def checks(report: Report) -> list[Check]:
    """Everything that the report has the figures for."""
    found: list[Check] = []
    for suite in report.suites:
        for case in report.cases(suite):
            if suite == GROWTH:
                found += _growth(report, case)
                continue
            found += _errors(report, suite, case)
            if case.level in (LOGITS, HEADS):
                found += _memory(report, suite, case)
            if _is_large(case):
                found += _over_floor(report, suite, case)
                found += _speedups(report, suite, case)
                found += _divergences(report, suite, case)
    return found


def summary(every: Sequence[Check]) -> list[list[str]]:
    """Cells: what, goal, the worst figure and where, how often it is reached, the verdict."""
    grouped: dict[tuple[str, str], list[Check]] = {}
    for check in every:
        grouped.setdefault((check.what, check.goal), []).append(check)
    rows = []
    first = {what: i for i, (what, _) in reversed(list(enumerate(grouped)))}
    for (what, goal), group in sorted(grouped.items(), key=lambda item: first[item[0][0]]):
        worst = max(group, key=lambda check: check.share if check.share == check.share else 1e300)
        count = sum(check.reached for check in group)
        rows.append([what, goal, worst.shown, worst.case.name, f"{count} of {len(group)}",
                     verdict(count == len(group))])  # fmt: skip
    return rows


def _is_large(case: Case) -> bool:
    if case.level not in (LOGITS, HEADS):
        return False
    if case.device == CPU:
        return case.matrix_bytes >= LEAST_BYTES
    return case.n >= GPU_LEAST_ROWS and (
        case.level == HEADS or case.v >= GPU_LEAST_VOCABULARY
    )  # fmt: skip


def _speedups(report: Report, suite: str, case: Case) -> Iterator[Check]:
    if case.device != CPU or case.level != LOGITS or case.divergence != "forward_kl":
        return
    for (other, ours), limits in SPEEDUPS.items():
        above, below = (entrant(report, suite, case, key) for key in (other, ours))
        slow, fast = seconds(above), seconds(below)
        if slow and fast:
            what = f"{_title(above)} / {_title(below)}"
            yield Check.at_least(what, slow / fast, limits[case.dtype], case)


def _over_floor(report: Report, suite: str, case: Case) -> Iterator[Check]:
    if case.divergence != "forward_kl":
        return
    for (device, key), limits in OVER_FLOOR.items():
        line = entrant(report, suite, case, key)
        if device == case.device and line is not None and line["floor_share"]:
            what = f"{_title(line)} / its lower bound"
            yield Check.at_most(what, 1 / line["floor_share"], limits[case.dtype], case)


def _divergences(report: Report, suite: str, case: Case) -> Iterator[Check]:
    base = case.with_(divergence="forward_kl", temperature=2.0)
    times = [seconds(entrant(report, suite, one, IN_PLACE)) for one in (case, base)]
    if case != base and times[0] and times[1]:
        what = f"{case.divergence} / forward_kl at T = 2, in place"
        yield Check.at_most(what, times[0] / times[1], DIVERGENCES[case.divergence], case)


def _growth(report: Report, case: Case) -> Iterator[Check]:
    """Against the case of half the size."""
    for size, least in DOUBLED_FROM.items():
        half = getattr(case, size) // 2
        other = case.with_(**{size: half})
        if half < least or 2 * half != getattr(case, size) or case.v < DOUBLED_FROM["v"]:
            continue
        for line in report.of(GROWTH, case):
            before = seconds(entrant(report, GROWTH, other, line["entrant"]))
            after = seconds(line)
            if line["is_ours"] and before and after:
                value = after / before
                what = f"{line['title']}, {size.upper()} doubled"
                goal = f"{DOUBLED} ± {DOUBLED_TOLERANCE}"
                share = abs(value - DOUBLED) / DOUBLED_TOLERANCE
                yield Check(what, goal, f"{value:.2f}", share, case)


def _memory(report: Report, suite: str, case: Case) -> Iterator[Check]:
    """What is left of the peak without what must be there."""
    for line in report.of(suite, case):
        peak, allowed = memory(line), _allowance(line, case, report.environment)
        if not line["is_ours"] or peak is None or allowed is None:
            continue
        due = _due(line, case, allowed)
        rest, limit = peak - due, allowed + MEMORY_SLACK[case.level]
        beyond = {LOGITS: "gradient", HEADS: "gradients and accumulator"}[case.level]
        what = f"{line['title']}: memory beyond inputs" + ("" if due == 0 else f", {beyond}")
        yield Check(what, f"≤ {limit / MIB:g} MiB", f"{rest / MIB:.2f} MiB", rest / limit, case)


def _due(line: Line, case: Case, budget: int) -> int:
    """Bytes of gradients, and of the float32 sum of a 16-bit one where there are several chunks."""
    if case.level == HEADS:
        sizes = case.n, case.v, case.student_hidden, case.teacher_hidden, DTYPES[case.dtype]
        is_sum = case.dtype != "fp32" and plan(*sizes, memory_budget=budget).chunks > 1
        return case.gradient_bytes + (4 * case.v * case.student_hidden if is_sum else 0)
    makes_none = line["entrant"].startswith((IN_PLACE, FORWARD))
    return 0 if makes_none else case.gradient_bytes


def _allowance(line: Line, case: Case, environment: dict[str, Any]) -> int | None:
    """Bytes of the memory budget; None: unknown."""
    if case.level == LOGITS:
        return 0
    if line["entrant"] in BUDGETED:
        return MIB * BUDGETED[line["entrant"]]
    if case.device == CPU:
        return CPU_BUDGET
    whole = environment.get("memory_bytes")
    return None if whole is None else min(whole // GPU_SHARE, 8 * case.v * GPU_ROWS)


def _errors(report: Report, suite: str, case: Case) -> Iterator[Check]:
    """Yield our errors over eager's, unless eager has none (an exact value of 0)."""
    ours = reference(report, suite, case) or next(
        (x for x in report.of(suite, case) if x["entrant"] in (KDLOSS, WITH_HEADS)), None
    )
    eager = entrant(report, suite, case, EAGER)
    if ours is None or eager is None:
        return
    for of in (LOSS, GRADIENTS):
        mine, theirs = error(ours, of), error(eager, of)
        if mine is None or theirs is None or not theirs < float("inf"):
            continue
        limit = ERROR_FACTOR * theirs + ERROR_SLACK
        yield Check(f"{ours['title']}: error of the {of}", ERROR_GOAL, f"{mine:.1e}",
                    mine / limit, case)  # fmt: skip


def _title(line: Line | None) -> str:
    return "" if line is None else str(line["title"])
