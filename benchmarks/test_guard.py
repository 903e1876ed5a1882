"""Regression guards: ``pytest benchmarks --benchmark-only``. Ratios of one run, no absolute times.

The table of pytest-benchmark shows KDLoss's own times; what fails a test is its ratio to something
that moves with the machine, against ``baseline.json`` (made by ``python -m benchmarks.guard
--write``).
"""

from __future__ import annotations

from typing import Any

import pytest

from fused_kd.backends import why_not

from . import guard
from .device import environment
from .guard import GUARDS, Guard
from .problems import LogitsProblem

#: A ratio above the limit is measured again this often: a regression stays, a disturbance goes.
TRIES = 3
ROUNDS = 5  # of pytest-benchmark's own table

reason = why_not("cpu", "cpu")
pytestmark = pytest.mark.skipif(reason is not None, reason=f"backend cpu: {reason}")


@pytest.fixture(scope="module")
def baseline() -> dict[str, Any]:
    """Of the instruction set in use, with the limit's factor for this processor."""
    here = environment()
    found = guard.read_baseline().get(here["instruction_set"])
    if found is None:
        pytest.skip(
            f"baseline.json has nothing for {here['instruction_set']}: "
            "run python -m benchmarks.guard --write"
        )
    is_same = found["processor"] == here["processor"]
    return {**found, "slack": guard.SLACK if is_same else guard.SLACK_ELSEWHERE}


@pytest.mark.parametrize("one", GUARDS, ids=lambda g: g.name.replace(" ", "-").replace("/", "over"))
def test_ratio(one: Guard, baseline: dict[str, Any], benchmark: Any) -> None:
    problem = LogitsProblem(one.case)
    ours, _ = one.pair(problem)
    with guard.one_thread():
        benchmark.pedantic(
            ours.call, setup=lambda: (ours.restore(), None)[1], rounds=ROUNDS, warmup_rounds=1
        )
    expected = baseline["ratios"][one.name]
    limit = baseline["slack"] * expected
    measured: list[float] = []
    while len(measured) < TRIES and (not measured or min(measured) > limit):
        measured.append(guard.measure(one, problem))
    benchmark.extra_info.update(ratio=min(measured), baseline=expected, limit=limit)
    assert min(measured) <= limit, (
        f"{one.name}: ratio {min(measured):.3f} in {TRIES} tries; the baseline is {expected:.3f} "
        f"(on {baseline['processor']}), the limit {baseline['slack']} times that. A regression, or "
        "a change that is meant: then run python -m benchmarks.guard --write"
    )
