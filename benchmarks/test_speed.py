"""Time calls by pytest-benchmark: ``pytest benchmarks``, with its options (--benchmark-compare).

For a change of code on one machine: ``python -m benchmarks`` also measures memory and errors.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .cases import Case
from .methods import METHODS
from .problems import HeadsProblem, LogitsProblem

SIZES = {"n": 64, "v": 32000}
HIDDEN = {"student_hidden": 256, "teacher_hidden": 512}
NAMES = ["logits/kdloss-inplace", "logits/kdloss", "logits/eager"]
NAMES += ["heads/kdloss-heads", "heads/eager"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward(benchmark: Any, name: str, dtype: str) -> None:
    """Measure a forward and a backward of a method."""
    method = METHODS[name]
    sizes = SIZES | (HIDDEN if method.level == "heads" else {})
    case = Case(**sizes, dtype=dtype, level=method.level)
    if reason := method.why_not(case):
        pytest.skip(reason)
    problem = (HeadsProblem if method.level == "heads" else LogitsProblem)(case)
    call = problem.call(method.build(case))
    benchmark.group = f"{method.level} {dtype}, {torch.get_num_threads()} threads"
    benchmark.pedantic(call, setup=problem.restore, rounds=10, warmup_rounds=2)
