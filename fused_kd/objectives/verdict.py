"""What an evaluation says of one objective and of both, in words and in a sentence."""

from __future__ import annotations

import math
from typing import NamedTuple

from .statistics import Interval

#: What a verdict says of one objective.
STATES = ("converged", "stopped moving", "improving", "worsening", "undecided", "off")
#: What it says of both.
PAIRS = (
    "converged",
    "stopped moving",
    "trading off",
    "both improving",
    "improving",
    "worsening",
    "undecided",
)


class Verdict(NamedTuple):
    """What an evaluation says of both objectives."""

    hard: str  # of STATES
    soft: str
    pair: str  # of PAIRS
    reason: str  # a sentence for each objective, with its numbers
    stop: bool  # the pair is one that ends the run
    hard_interval: Interval | None  # of the improvement over the window; None: not known
    soft_interval: Interval | None


class Objective(NamedTuple):
    """What is known of one objective after an evaluation."""

    delta: float
    interval: Interval
    passed: int  # evaluations in a row whose interval was between -delta and delta
    patience: int
    looks: int  # evaluations in the window
    sequences: int
    has_decayed: bool  # the learning rate is below that at the window's start

    @property
    def state(self) -> str:
        """Return one of STATES, the first that fits."""
        if self.passed >= self.patience:
            return "stopped moving" if self.has_decayed else "converged"
        if self.interval.low > 0:
            return "improving"
        return "worsening" if self.interval.high < 0 else "undecided"

    @property
    def sentence(self) -> str:
        """Return the state with its numbers, and what would decide if it is undecided."""
        x = self.interval
        text = (
            f"{self.state}: improved by {x.improvement:.4g} over {self.looks} evaluations, in "
            f"[{x.low:.4g}, {x.high:.4g}], δ = {self.delta:g}"
        )
        return f"{text}; {self._what_decides()}" if self.state == "undecided" else text

    def _what_decides(self) -> str:
        x = self.interval
        if self.passed > 0:
            return f"within δ {self.passed} of {self.patience} times in a row"
        if self.sequences < 2:
            return "one sequence has no spread: at least two are needed"
        if not math.isfinite(x.half_width):
            return "the error probability of max_looks evaluations is spent"
        if x.by_sequences < x.half_width:
            return "the evaluations scatter about their trend: more of them would decide"
        # an interval of this half width is between -δ and δ, or excludes 0
        enough = max(self.delta - abs(x.improvement), abs(x.improvement))
        needed = math.ceil(self.sequences * (x.half_width / enough) ** 2)
        return f"about {needed} sequences would decide, instead of {self.sequences}"


def pair_of(hard: str, soft: str) -> str:
    """Return the verdict on both objectives: the first of PAIRS that fits."""
    both = {hard, soft} - {"off"}
    if both == {"converged"}:
        return "converged"
    if both <= {"converged", "stopped moving"}:
        return "stopped moving"
    if both == {"improving", "worsening"}:
        return "trading off"
    if hard == soft == "improving":
        return "both improving"
    return next((state for state in ("improving", "worsening") if state in both), "undecided")
