"""The suites: their cases, and the methods that each measures."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import product

from fused_kd.divergences import DIVERGENCES
from fused_kd.testing import REGIMES

from .cases import HEADS, LOGITS, STEP, Case
from .methods import METHODS, Method
from .methods.ours import BUDGETED, FORWARD, IN_PLACE, KDLOSS, WITH_HEADS
from .training_step import whole_sequences

#: Sizes that the options replace: those of real vocabularies, and heads of small models.
USUAL = {
    "dtype": ("bf16", "fp32"),
    "v": (32000, 128256, 262144),
    "n": (512,),
    "divergence": ("forward_kl",),
    "hidden": (1024, 2048),
}


def _grid(options: Namespace, level: str = LOGITS, regime: str = "randn", **own: object):
    """Yield all combinations of the options' sizes, else of the suite's own, else of USUAL."""
    sizes = {name: getattr(options, name) or own.get(name, USUAL[name]) for name in USUAL}
    hidden = sizes.pop("hidden") if level != LOGITS else (sizes.pop("hidden"), (0, 0))[1]
    for dtype, v, n, divergence, t in product(*sizes.values(), options.temperature):
        rows = whole_sequences(n) if level == STEP else n
        yield Case(rows, v, dtype, t, divergence, level, *hidden, options.device, regime)


def _heads(options: Namespace) -> Iterator[Case]:
    return _grid(options, HEADS)


def _step(options: Namespace) -> Iterator[Case]:
    return _grid(options, STEP, dtype=["fp32"], v=[32000], hidden=(512, 1024))


def _growth(options: Namespace) -> Iterator[Case]:
    """Double N at the middle vocabulary, and V at the middle number of rows; both levels."""
    every_n = options.n or (128, 256, 512, 1024)
    every_v = options.v or (32064, 64128, 128256, 256512)
    n, v = every_n[len(every_n) // 2], every_v[len(every_v) // 2]
    for level, sizes in product((LOGITS, HEADS), ((every_n, [v]), ([n], every_v))):
        sweep = Namespace(**{**vars(options), "n": sizes[0], "v": sizes[1]})
        yield from _grid(sweep, level, dtype=["fp32"], hidden=(256, 512))


def _accuracy(options: Namespace) -> Iterator[Case]:
    for regime in REGIMES:
        yield from _grid(options, regime=regime, v=[8192], n=[16])


def _guard(options: Namespace) -> Iterator[Case]:
    """Yield sizes far larger than the caches, and small ones of every divergence."""
    yield from _grid(options, n=[128], v=[128256])
    yield from _grid(options, dtype=["bf16"], n=[64], v=[32768], divergence=DIVERGENCES)


@dataclass(frozen=True)
class Suite:
    """A set of cases that belong into one table or picture."""

    what: str  # in a few words
    cases: Callable[[Namespace], Iterator[Case]]
    #: Methods that take part unless the options name others; None: all of the level.
    methods: tuple[str, ...] | None = None

    def takes(self, case: Case, chosen: Collection[str], skipped: Collection[str]) -> list[str]:
        """Return the keys of METHODS of those that are measured in a case."""
        levels = (LOGITS, HEADS) if case.level == STEP else (case.level,)
        keys = chosen or self.methods or [m.key for m in METHODS.values() if self._is_usual(m)]
        found = {  # by key: of two levels of one loss the second one
            method.key: name
            for level in levels
            for name, method in METHODS.items()
            if method.level == level
            and method.key in keys
            and method.key not in skipped
            and (case.level != STEP or "gradients" in method.compared)
        }
        return list(found.values())

    def _is_usual(self, method: Method) -> bool:
        """Return True if a method is measured without being named in the options.

        Memory budgets are compared in one suite only. Errors are measured on so many inputs that
        compiling for each would take longer than all the rest.
        """
        if method.key in BUDGETED:
            return self.cases == _heads
        return self.cases != _accuracy or not method.compiles


_STEP = ("eager", "compile", "checkpoint", KDLOSS, IN_PLACE, WITH_HEADS, "liger-chunked",
         "liger-chunked-compiled")  # fmt: skip
_GROWTH = (KDLOSS, IN_PLACE, WITH_HEADS, "eager", "compile")
ACCURACY, GUARD = "accuracy", "guard"
SUITES = {
    "logits": Suite("time, memory and error of losses on logits", _grid),
    "heads": Suite("the same of hidden states and lm_heads, and by memory budget", _heads),
    "training-step": Suite("a whole step of a small model with each loss", _step, _STEP),
    "growth": Suite("time and memory as N and V double", _growth, _GROWTH),
    ACCURACY: Suite("errors on inputs that have broken some implementation", _accuracy),
    GUARD: Suite("what bench-guard compares with a baseline", _guard, (KDLOSS, IN_PLACE, FORWARD)),
}
