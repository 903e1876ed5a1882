"""All methods that can be measured, ours first; a new peer is a function in ``peers``."""

from collections.abc import Collection

from ..cases import GUARD, HEADS, STEP, TOPK, Case
from . import ours, peers, topk_peers  # noqa: F401  they fill METHODS
from .base import BUCKET, DENSE, METHODS, Loss, Method, after_heads, one_line
from .ours import BUDGETED, DENSE_TEACHER, FORWARD, HARD, IN_PLACE, KDLOSS, WITH_HEADS

__all__ = ["BUCKET", "DENSE", "DENSE_TEACHER", "HARD", "METHODS", "Loss", "Method"]
__all__ += ["after_heads", "one_line", "taking_part"]

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

    Of two methods with one key the later is measured. Unless chosen, budgets take part in suite
    heads only, and with a top-k teacher ours alone at a temperature that is not 1.
    """
    keys, names = chosen or USUAL.get(suite), {}
    for name, method in METHODS.items():
        fits = method.level == case.level
        if case.level == STEP:
            fits = method.level != TOPK and "gradients" in method.compared
        is_usual = suite == HEADS or method.key not in BUDGETED
        is_usual &= case.level != TOPK or method.is_ours or case.temperature == 1
        if fits and (method.key in keys if keys else is_usual):
            names[method.key] = name
    return tuple(names.values())
