"""All methods that can be measured, ours first; a new peer is a function in ``peers``."""

from collections.abc import Collection

from ..cases import ACCURACY, GUARD, STEP, Case
from . import ours, peers  # noqa: F401  they fill METHODS
from .base import METHODS, Loss, Method
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

    Memory budgets are compared in one suite only. Errors are measured on so many inputs that
    compiling for each would take longer than all the rest.
    """
    found = {}  # by key: of two levels of one loss the second one
    for name, method in METHODS.items():
        is_usual = not (suite == ACCURACY and method.compiles)
        is_usual &= suite == "heads" or method.key not in BUDGETED
        keys = chosen or USUAL.get(suite) or ([method.key] if is_usual else [])
        is_step = case.level == STEP and "gradients" in method.compared
        if method.key in keys and (method.level == case.level or is_step):
            found[method.key] = name
    return tuple(found.values())


__all__ = ["METHODS", "Loss", "Method", "taking_part"]
