"""All methods that can be measured, ours first; a new peer is a function in ``peers``."""

from collections.abc import Collection

from ..cases import GUARD, HEADS, STEP, Case
from . import ours, peers  # noqa: F401  they fill METHODS
from .base import METHODS, Loss, Method, after_heads, one_line
from .ours import BUDGETED, FORWARD, IN_PLACE, KDLOSS, WITH_HEADS

__all__ = ["METHODS", "Loss", "Method", "after_heads", "one_line", "taking_part"]

#: Keys that take part in a suite unless options name others; in other suites the level's all do.
USUAL = {
    "training-step": (
        *(KDLOSS, IN_PLACE, WITH_HEADS, "eager", "compile", "checkpoint"),
        *("liger-chunked", "liger-chunked-compiled"),
    ),
    GUARD: (KDLOSS, IN_PLACE, FORWARD),
}


def taking_part(suite: str, case: Case, chosen: Collection[str]) -> tuple[str, ...]:
    """Return the keys of METHODS to measure in a case; `chosen`: the options' Method.keys, or none.

    Of two methods with one key the later is measured; budgets, unless chosen, only in suite heads.
    """
    keys, names = chosen or USUAL.get(suite), {}
    for name, method in METHODS.items():
        fits = "gradients" in method.compared if case.level == STEP else method.level == case.level
        is_usual = suite == HEADS or method.key not in BUDGETED
        if fits and (method.key in keys if keys else is_usual):
            names[method.key] = name
    return tuple(names.values())
