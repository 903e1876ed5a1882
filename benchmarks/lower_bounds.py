"""The lower bound of a case's time on this machine, measured in turns with the methods.

Logits: reading both (N, V) matrices once and writing one, at the bandwidth of a copy. Hidden
states: the four matrix products, whole, in the dtype of the case, or in float32 if that is faster
(a processor without 16-bit products emulates them). Methods that compute a different loss have no
lower bound.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import device
from .cases import Case
from .problems import HeadsProblem, LogitsProblem, Problem

#: The 16-bit products are slow if they take more than SLOW times as long as those of float32. Other
#: methods take at most SLOW times as long as the products, or EAGER_COPIES times as long as the
#: copy: if that exceeds the limit of a call, a few rows are tried first.
SLOW, EAGER_COPIES = 4.0, 200.0
#: Rows on which that is tried, and the seconds and calls for which a short call is repeated.
TRIED_ROWS, SHORT, MOST_CALLS = 8, 1.0, 1000


@dataclass(frozen=True)
class LowerBound:
    """A call that no method of the case can be faster than, to be timed in turns with them."""

    name: str  # copy or products
    call: Callable[[], object]
    seconds: float  # of the call, roughly
    is_slow: bool  # methods may exceed the limit of a call
    why: str = ""

    def least(self, seconds: float, case: Case) -> tuple[float, float]:
        """Return the least seconds of a case and the rate, from the seconds of the call."""
        if self.name == "copy":  # of one matrix; three are moved
            return 1.5 * seconds, 2 * case.matrix_bytes / seconds
        return seconds, case.flops / seconds


def lower_bound(problem: Problem, limit_seconds: float) -> LowerBound | None:
    """Return the lower bound of a case after a first call; None for a training step."""
    case = problem.case
    if isinstance(problem, LogitsProblem):
        call = problem.lower_bound()
        seconds = fastest(call, 0.0, case.device)
        return LowerBound("copy", call, seconds, EAGER_COPIES * seconds > limit_seconds)
    if not isinstance(problem, HeadsProblem):
        return None
    dtype, why, is_slow = None, "", False
    if case.dtype != "fp32" and case.device == "cpu":
        rows = min(TRIED_ROWS, case.n)
        narrow = fastest(problem.lower_bound(rows), SHORT)
        fp32 = fastest(problem.lower_bound(rows, torch.float32), SHORT)
        if narrow > SLOW * fp32:
            dtype, is_slow = torch.float32, SLOW * narrow * case.n / rows > limit_seconds
            why = f"in float32; in {case.dtype} they take {narrow / fp32:.0f} times as long"
    call = problem.lower_bound(dtype=dtype)
    seconds = fastest(call, 0.0, case.device)
    return LowerBound("products", call, seconds, is_slow or SLOW * seconds > limit_seconds, why)


def fastest(call: Callable[[], object], seconds: float, where: str = "cpu") -> float:
    """Return the seconds of the fastest of the calls that `seconds` of wall-clock time allow.

    At least one call is made, and at most MOST_CALLS. The measured seconds do not count: for a call
    of a few microseconds, measuring it takes most of the time.
    """
    clock, budget = device.clock(where), device.Budget(seconds)
    times = [clock(call)[0]]
    while budget.allows(0.0) and len(times) < MOST_CALLS:
        times.append(clock(call)[0])
    return min(times)
