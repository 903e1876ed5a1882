"""The suites: their cases, and the methods that each measures."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import product

from fused_kd.testing import REGIMES

from .cases import HEADS, LOGITS, STEP, Case
from .entrants import ENTRANTS, Entrant
from .entrants.ours import BUDGETED, IN_PLACE, KDLOSS, WITH_HEADS
from .training_step import whole_sequences

#: Sizes where the options say nothing: those of real vocabularies, and heads of small models.
VOCABULARIES, DTYPES = (32000, 128256, 262144), ("bf16", "fp32")
ROWS, HIDDEN = 512, (1024, 2048)
STEP_VOCABULARY, STEP_HIDDEN = (32000,), (512, 1024)
#: Of the growth suite, doubled up to the limit, and what the other size is meanwhile.
GROWTH_ROWS, GROWTH_VOCABULARY, GROWTH_HIDDEN = (128, 1024), (32064, 256512), (256, 512)
#: Sizes of the accuracy suite.
ACCURACY_ROWS, ACCURACY_VOCABULARY = 16, 8192


@dataclass(frozen=True)
class Suite:
    """A set of cases that belong into one table or picture."""

    name: str
    what: str  # in a few words
    cases: Callable[[argparse.Namespace], Iterator[Case]]
    #: Entrants that take part unless the options name others; None: all of the level.
    entrants: tuple[str, ...] | None = None
    times: bool = True

    def takes(self, case: Case, chosen: Collection[str], skipped: Collection[str]) -> list[str]:
        """Keys of ENTRANTS of those that are measured in a case."""
        levels = (LOGITS, HEADS) if case.level == STEP else (case.level,)
        wanted = chosen or self.entrants or [e.key for e in ENTRANTS.values() if self._is_usual(e)]
        found = {  # by key: of two levels of one loss the second one
            entrant.key: name
            for name, entrant in sorted(ENTRANTS.items(), key=lambda e: e[1].level == HEADS)
            if entrant.level in levels and entrant.key in wanted and entrant.key not in skipped
        }
        return list(found.values())

    def _is_usual(self, entrant: Entrant) -> bool:
        """Return True if a method is measured without being named in the options.

        Memory budgets are compared in one suite only. Errors are measured on so many inputs that
        compiling for each would take longer than all the rest.
        """
        if entrant.key in BUDGETED:
            return self.name == HEADS
        return self.times or not entrant.compiles


def _grid(options: argparse.Namespace, level: str, **fixed: object) -> Iterator[Case]:
    """Every combination of the sizes."""
    hidden = (0, 0) if level == LOGITS else tuple(options.hidden)
    for dtype, v, n, t, divergence in product(
        options.dtype, options.v, options.n, options.temperature, options.divergence
    ):
        yield Case(n, v, dtype, t, divergence, level, *hidden, options.device, **fixed)  # type: ignore[arg-type]


def _defaults(options: argparse.Namespace, **values: object) -> argparse.Namespace:
    """The options, with a suite's own sizes where they say nothing."""
    filled = argparse.Namespace(**vars(options))
    for name, value in values.items():
        if getattr(filled, name) is None:
            setattr(filled, name, value)
    return filled


def _logits(options: argparse.Namespace) -> Iterator[Case]:
    return _grid(_defaults(options, dtype=DTYPES, v=VOCABULARIES, n=[ROWS]), LOGITS)


def _heads(options: argparse.Namespace) -> Iterator[Case]:
    return _grid(_defaults(options, dtype=DTYPES, v=VOCABULARIES, n=[ROWS], hidden=HIDDEN), HEADS)


def _step(options: argparse.Namespace) -> Iterator[Case]:
    """N up to whole sequences."""
    options = _defaults(options, dtype=["fp32"], v=STEP_VOCABULARY, n=[ROWS], hidden=STEP_HIDDEN)
    options.n = [whole_sequences(n) for n in options.n]
    return _grid(options, STEP)


def _growth(options: argparse.Namespace) -> Iterator[Case]:
    """N doubled at the middle vocabulary, V doubled at the middle number of rows; both levels."""
    options = _defaults(
        options, dtype=["fp32"], v=GROWTH_VOCABULARY, n=GROWTH_ROWS, hidden=GROWTH_HIDDEN
    )
    every_n, every_v = _doubled(*_ends(options.n)), _doubled(*_ends(options.v))
    middle = every_n[len(every_n) // 2], every_v[len(every_v) // 2]
    sizes = [(n, middle[1]) for n in every_n] + [(middle[0], v) for v in every_v]
    for level in (LOGITS, HEADS):
        for n, v in dict.fromkeys(sizes):
            one = argparse.Namespace(**{**vars(options), "n": [n], "v": [v]})
            yield from _grid(one, level)


def _ends(values: list[int]) -> tuple[int, int]:
    return min(values), max(values)


def _doubled(first: int, last: int) -> list[int]:
    found = [first]
    while 2 * found[-1] <= last:
        found.append(2 * found[-1])
    return found


def _accuracy(options: argparse.Namespace) -> Iterator[Case]:
    options = _defaults(options, dtype=DTYPES, v=[ACCURACY_VOCABULARY], n=[ACCURACY_ROWS])
    for regime in REGIMES:
        yield from _grid(options, LOGITS, regime=regime)


SUITES = {
    suite.name: suite
    for suite in (
        Suite("logits", "time, memory and error of losses on logits", _logits),
        Suite("heads", "the same of hidden states and lm_heads, and by memory budget", _heads),
        Suite("training-step", "a whole step of a small model with each loss", _step,
              ("eager", "compile", "checkpoint", KDLOSS, IN_PLACE, WITH_HEADS, "liger-chunked",
               "liger-chunked-compiled")),
        Suite("growth", "time and memory as N and V double", _growth,
              (KDLOSS, IN_PLACE, WITH_HEADS, "eager", "compile")),
        Suite("accuracy", "errors on inputs that have broken some implementation", _accuracy,
              times=False),
    )
}  # fmt: skip
