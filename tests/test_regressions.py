"""The bugs of other projects, R-01 to R-65, that must not be ours: `pytest -k R-01` runs one.

The cases that concern logits on a CPU are in regression_*.py; the others are
listed here with what they wait for.
"""

from __future__ import annotations

import pytest
import regression_numbers  # noqa: F401  registers its cases
import regression_semantics  # noqa: F401
import regression_wiring  # noqa: F401
import torch
from fast import one_thread
from regression_registry import CASES

GPU, LINEAR, BENCHMARKS, INTEGRATIONS = (
    "issue 3, GPU backends",
    "issue 4, linear level",
    "issue 5, benchmarks",
    "issue 6, integrations",
)
# number: (what it waits for, what must then pass)
WAITING: dict[str, tuple[str, str]] = {
    "R-13": (LINEAR, "a row at an offset of 2^31 and more, in the linear path"),
    "R-15": (GPU, "no int32 index: the interpreter's overflow assertion on every Triton kernel"),
    "R-30": (LINEAR, "a frozen lm_head costs neither its gradient's memory nor its time"),
    "R-37": (LINEAR, "ignored labels across the borders of chunks"),
    "R-46": (LINEAR, "autocast × bias × parameter dtype in the products"),
    "R-47": (LINEAR, "the weight gradient's error is flat in the number of chunks"),
    "R-50": (GPU, "Triton compiles with the scalars as fp64; PTX has no .f64"),
    "R-51": (GPU, "the ahead-of-time matrix over Triton versions"),
    "R-55": (GPU, "two devices; the device guard is entered"),
    "R-56": (GPU, "the whole suite on a non-default stream"),
    "R-59": (INTEGRATIONS, "two gloo ranks: the gradient's ratio to one process is 1"),
    "R-60": (INTEGRATIONS, "the same under tensor parallelism; the docs say who reduces"),
    "R-61": (INTEGRATIONS, "an example test under DistributedDataParallel"),
    "R-64": (GPU, "no dummy pointer aliases a live tensor; the interpreter runs in CI"),
}


@pytest.mark.parametrize("number", [pytest.param(n, id=n) for n in sorted(CASES)])
def test_regression(number: str, backend: str) -> None:
    for case in CASES[number]:
        torch.manual_seed(0)
        with one_thread():
            case.test(backend)


def test_all_65_are_accounted_for() -> None:
    numbers = [f"R-{i:02d}" for i in range(1, 66)]
    assert sorted([*CASES, *WAITING]) == numbers  # each once
