"""All methods that can be measured, ours first; a new peer is a function in ``peers``."""

from collections.abc import Collection

from ..cases import ACCURACY, GUARD, HEADS, STEP, Case
from . import ours, peers  # noqa: F401  they fill METHODS
from .base import METHODS, Loss, Method, after_heads, one_line
from .ours import BUDGETED, FORWARD, IN_PLACE, KDLOSS, WITH_HEADS

#: Methods that take part in a suite unless the options name others; else all of the level.
_MEASURED = KDLOSS, IN_PLACE, WITH_HEADS, "eager", "compile"
USUAL = {
    "training-step": (*_MEASURED, "checkpoint", "liger-chunked", "liger-chunked-compiled"),
    "growth": _MEASURED,
    GUARD: (KDLOSS, IN_PLACE, FORWARD),
}


def taking_part(suite: str, case: Case, chosen: Collection[str]) -> tuple[str, ...]:
    """Return the keys of METHODS of those that are measured in a case; chosen: by the options.

    Memory budgets are compared in one suite only. The suite of errors has that many inputs that
    compiling for each would take longer than all the rest.
    """
    keys = chosen or USUAL.get(suite)
    names = {}  # by key: of two levels of one loss the second one
    for name, method in METHODS.items():
        is_step, is_budgeted = case.level == STEP, method.key in BUDGETED
        is_left_out = method.compiles if suite == ACCURACY else is_budgeted and suite != HEADS
        fits = "gradients" in method.compared if is_step else method.level == case.level
        if fits and (method.key in keys if keys else not is_left_out):
            names[method.key] = name
    return tuple(names.values())


__all__ = ["METHODS", "Loss", "Method", "after_heads", "one_line", "taking_part"]
