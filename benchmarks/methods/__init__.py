"""All methods that can be measured, ours first; a new peer is a function in ``peers``."""

from collections.abc import Collection

from ..cases import ACCURACY, GUARD, Case
from . import ours, peers  # noqa: F401  they fill METHODS
from .base import METHODS, Loss, Method
from .ours import BUDGETED, FORWARD, IN_PLACE, KDLOSS, WITH_HEADS

#: Methods that take part in a suite unless the options name others; else all of the level.
USUAL = {
    "growth": (KDLOSS, IN_PLACE, WITH_HEADS, "eager", "compile"),
    GUARD: (KDLOSS, IN_PLACE, FORWARD),
}


def taking_part(suite: str, case: Case, chosen: Collection[str]) -> tuple[str, ...]:
    """Return the keys of METHODS of those that are measured in a case; chosen: by the options.

    Memory budgets are compared in one suite only. Errors are measured on so many inputs that
    compiling for each would take longer than all the rest.
    """
    methods = [method for method in METHODS.values() if method.level == case.level]
    usual = USUAL.get(suite) or [
        x.key for x in methods if suite == "heads" or x.key not in BUDGETED
    ]
    if suite == ACCURACY:
        methods = [x for x in methods if chosen or not x.compiles]
    return tuple(f"{x.level}/{x.key}" for x in methods if x.key in (chosen or usual))


__all__ = ["METHODS", "Loss", "Method", "taking_part"]
