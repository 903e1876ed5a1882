"""The numbers that must be reached: a table of ratios and their limits, and the check of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from fused_kd.engines.memory import CPU_BUDGET, GPU_ROWS, GPU_SHARE
from fused_kd.options import MIB
from fused_kd.plan import plan

from .cases import DTYPES, HEADS, LOGITS, Case
from .methods.ours import BUDGETED, FORWARD, IN_PLACE, KDLOSS, WITH_HEADS
from .tables import seconds_of

if TYPE_CHECKING:
    from pandas import DataFrame

#: Our error over eager's, and what rounding alone may cost.
ERROR_FACTOR, ERROR_SLACK = 1.1, 2 * torch.finfo(torch.float32).eps
#: Bytes beyond gradients, accumulator and budget.
MEMORY_SLACK = {LOGITS: MIB, HEADS: 8 * MIB}

BOUND, COMPILE, EAGER = "time / lower bound", "time / torch.compile(eager)", "time / eager torch"
FORWARD_KL = "time / forward_kl at T = 2"
DOUBLED_N, DOUBLED_V = "time / half the N", "time / half the V"
MEMORY = "memory beyond inputs / allowed"
LOSS, GRADIENTS = (f"error of the {part} / allowed by eager's" for part in ("loss", "gradients"))
#: Smaller matrices stay in the caches, where a copy is no lower bound; a GPU is to be filled.
_LARGE = f"matrix_bytes >= {16 * MIB} and level != 'step' and divergence == 'forward_kl' and "
_CPU, _GPU = f"{_LARGE} device == 'cpu'", f"{_LARGE} device == 'cuda' and n >= 8192"
_IN_PLACE, _HEADS = f"method == '{IN_PLACE}'", f"method == '{WITH_HEADS}'"
#: Which results, which figure of them, and the most that it may be.
GOALS = (
    (f"{_CPU} and {_IN_PLACE} and dtype != 'fp32'", BOUND, 1.6),
    (f"{_CPU} and {_IN_PLACE} and dtype == 'fp32'", BOUND, 1.2),
    (f"{_CPU} and method == '{FORWARD}'", BOUND, 1.3),
    (f"{_CPU} and {_HEADS}", BOUND, 1.15),
    (f"{_CPU} and {_IN_PLACE}", COMPILE, 1 / 18),
    (f"{_CPU} and method == '{KDLOSS}' and dtype != 'fp32'", COMPILE, 1 / 10),
    (f"{_CPU} and method == '{KDLOSS}' and dtype == 'fp32'", COMPILE, 1 / 8),
    (f"{_CPU} and {_IN_PLACE}", EAGER, 1 / 80),
    (f"{_CPU} and method == '{KDLOSS}'", EAGER, 1 / 50),
    (f"{_GPU} and method in ('{KDLOSS}', '{IN_PLACE}')", BOUND, 1.15),
    (f"{_GPU} and method in ('{KDLOSS}-triton', '{IN_PLACE}-triton')", BOUND, 1.5),
    (f"{_GPU} and method in ('{WITH_HEADS}', '{WITH_HEADS}-triton')", BOUND, 1.1),
    (f"{_IN_PLACE} and divergence == 'forward_kl' and temperature != 2.0", FORWARD_KL, 2.0),
    (f"{_IN_PLACE} and divergence in ('reverse_kl', 'mse')", FORWARD_KL, 2.0),
    (f"{_IN_PLACE} and divergence in ('jsd', 'tvd')", FORWARD_KL, 3.0),
    ("suite == 'growth' and n >= 512 and v >= 64128", DOUBLED_N, 2.1),
    ("suite == 'growth' and n >= 256 and v >= 128256", DOUBLED_V, 2.1),
    ("level != 'step'", MEMORY, 1.0),
    (f"method in ('{KDLOSS}', '{WITH_HEADS}')", LOSS, 1.0),
    (f"method in ('{KDLOSS}', '{WITH_HEADS}')", GRADIENTS, 1.0),
)


def check(found: DataFrame, memory_bytes: int | None = None) -> DataFrame:
    """Return every goal that there are figures for, the worst of them, and how often it is met.

    Args:
        found: the frame of a report.
        memory_bytes: of the GPU.
    """
    import pandas

    found = _figures(found, memory_bytes)
    found = found[found.is_ours & (found.status == "measured")]
    rows = []
    for which, name, most in GOALS:
        for title, group in found.query(which).dropna(subset=name).groupby("title", sort=False):
            worst, met = group.loc[group[name].idxmax()], (group[name] <= most).sum()
            rows.append({
                "goal": f"{title}: {name}", "at most": f"{most:.3g}",
                "worst here": f"{worst[name]:.3g}", "in": worst["name"],
                "in cases": f"{met} of {len(group)}",
                "verdict": "reached" if met == len(group) else "NOT reached",
            })  # fmt: skip
    return pandas.DataFrame(rows).set_index("goal") if rows else pandas.DataFrame()


def _figures(found: DataFrame, memory_bytes: int | None) -> DataFrame:
    """Add the columns that goals are about."""
    seconds = dict(zip(found.key, found.seconds, strict=True))

    def base(change: Callable[[Case], Case]) -> list[float]:
        """Return the times of the same methods in other cases."""
        keys = zip(found.suite, map(change, found.case), found.method, strict=True)
        return [seconds.get(key, math.nan) for key in keys]

    reference = {"divergence": "forward_kl", "temperature": 2.0}
    eager = found[found.method == "eager"].drop_duplicates("name").set_index("name")
    errors = {
        name: found[part] / (ERROR_FACTOR * found.name.map(eager[part]) + ERROR_SLACK)
        for name, part in ((LOSS, "loss"), (GRADIENTS, "gradients"))
    }
    return found.assign(**errors, **{
        "matrix_bytes": [case.matrix_bytes for case in found.case],
        BOUND: 1 / found.share,
        COMPILE: found.seconds / seconds_of(found, "compile"),
        EAGER: found.seconds / seconds_of(found, "eager"),
        FORWARD_KL: found.seconds / base(lambda case: case.with_(**reference)),
        DOUBLED_N: found.seconds / base(lambda case: case.with_(n=case.n // 2)),
        DOUBLED_V: found.seconds / base(lambda case: case.with_(v=case.v // 2)),
        MEMORY: [_memory(row, memory_bytes or 0) for row in found.itertuples()],
    })  # fmt: skip


def _memory(row: Any, memory_bytes: int) -> float | None:
    """Return the peak beyond gradients and, of heads, the weight's accumulator, over the allowed.

    Allowed are the memory budget and a little.
    """
    case, budget = row.case, 0
    if not row.is_ours or case.level not in MEMORY_SLACK:
        return None
    due = 0 if row.method.startswith((IN_PLACE, FORWARD)) else case.gradient_bytes
    if case.level == HEADS:
        gpu = min(memory_bytes // GPU_SHARE, 8 * case.v * GPU_ROWS)
        budget = MIB * BUDGETED.get(row.method, 0) or (CPU_BUDGET if case.device == "cpu" else gpu)
        sizes = case.n, case.v, case.student_hidden, case.teacher_hidden, DTYPES[case.dtype]
        if case.dtype != "fp32" and plan(*sizes, memory_budget=budget).chunks > 1:
            due += 4 * case.v * case.student_hidden
    return (row.memory - due) / (budget + MEMORY_SLACK[case.level])
