"""The lower bound of a case's time on this machine, measured among the methods of the case.

Logits: reading both (N, V) matrices once and writing one, at the bandwidth of a copy. Hidden
states: the four matrix products, whole, in the dtype of the case, or in float32 where that is
faster (a processor without 16-bit products emulates them). Methods that compute a different loss
have no lower bound.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import device
from .cases import HEADS, LOGITS, Case
from .entrants.base import Entrant
from .entrants.ours import FORWARD
from .measuring import Timing
from .problems import HeadsProblem, LogitsProblem, Problem

NAME = "floor"
#: The 16-bit products are slow if they take more than SLOW times as long as those of float32. Other
#: methods take at most SLOW times as long as the products, or EAGER_COPIES times as long as the
#: copy: if that exceeds the limit of a call, a few rows are tried first.
SLOW, EAGER_COPIES = 4.0, 200.0
#: Rows on which that is tried, and the seconds and calls for which a short call is repeated.
TRIED_ROWS, SHORT, MOST_CALLS = 8, 1.0, 1000


@dataclass
class Floor:
    """What stands for the machine: a call to be timed among the entrants."""

    name: str  # copy or products
    call: Callable[[], object]
    seconds: float  # of the call, roughly; exactly after take()
    is_slow: bool = False  # others may exceed the limit of a call
    why: str = ""
    timing: Timing | None = None

    def take(self, timing: Timing | None) -> None:
        """What the call took among the others."""
        self.timing = timing
        if timing is not None:
            self.seconds = timing.median

    def seconds_of(self, entrant: str, case: Case) -> float:
        """The least that this entrant can take."""
        if case.level == HEADS:
            return self.seconds
        reads_only = entrant.startswith(FORWARD)
        return self.seconds if reads_only else 1.5 * self.seconds  # a copy moves two matrices

    def as_dict(self, case: Case) -> dict[str, Any]:
        """For a line of results."""
        done = case.flops if case.level == HEADS else 2 * case.matrix_bytes
        return {"name": self.name, "why": self.why, "seconds": self.seconds_of("", case),
                "rate": done / self.seconds,
                "time": None if self.timing is None else self.timing.as_dict()}  # fmt: skip


def floor(problem: Problem, limit_seconds: float) -> Floor | None:
    """The floor of a case, its call made once already; a training step has none."""
    case = problem.case
    if isinstance(problem, LogitsProblem):
        seconds = fastest(problem.floor(), 0.0, case.device)
        return Floor("copy", problem.floor(), seconds, EAGER_COPIES * seconds > limit_seconds)
    if not isinstance(problem, HeadsProblem):
        return None
    dtype, why, is_slow = None, "", False
    if case.dtype != "fp32" and case.device == "cpu":
        rows = min(TRIED_ROWS, case.n)
        narrow = fastest(problem.floor(rows), SHORT)
        wide = fastest(problem.floor(rows, torch.float32), SHORT)
        if narrow > SLOW * wide:
            dtype, is_slow = torch.float32, SLOW * narrow * case.n / rows > limit_seconds
            why = f"in float32; in {case.dtype} they take {narrow / wide:.0f} times as long"
    call = problem.floor(dtype=dtype)
    seconds = fastest(call, 0.0, case.device)
    return Floor("products", call, seconds, is_slow or SLOW * seconds > limit_seconds, why)


def fastest(call: Callable[[], object], seconds: float, where: str = "cpu") -> float:
    """Return the seconds of the fastest call of those that `seconds` of wall-clock time allow.

    At least one call is made, and at most MOST_CALLS. The measured seconds do not count: for a call
    of a few microseconds, measuring it takes most of the time.
    """
    clock, budget = device.clock(where), device.Budget(seconds)
    best = clock(call)[0]
    for _ in range(MOST_CALLS - 1):
        if not budget.allows(0.0):
            break
        best = min(best, clock(call)[0])
    return best


def work(case: Case, entrant: Entrant) -> dict[str, int]:
    """What it takes at least: bytes of traffic, or floating-point operations of the products."""
    if case.level == LOGITS:
        kind = "forward" if entrant.key.startswith(FORWARD) else "forward_backward"
        return {"bytes": case.expected_bytes[kind]}
    if case.level != HEADS:
        return {}
    has_teacher = entrant.keywords(case).get("soft_weight") != 0
    return {"flops": case.flops - (0 if has_teacher else case.teacher_flops)}
