"""Regression guards: ``pytest benchmarks --benchmark-only``. Ratios of one run, no absolute times.

The suite "guard" on one thread must show no regression against ``baseline_SET.jsonl`` of the
instruction set in use, which ``python -m benchmarks run guard --threads 1 --overwrite --output``
that file replaces (on a quiet machine, after a change that is meant).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fused_kd.backends import why_not

from . import __main__ as cli
from . import compare, device, one_case, records, schema

#: How far a ratio may grow, on the baseline's processor and on another one.
SLACK, SLACK_ELSEWHERE = 0.5, 2.0
#: A ratio above the limit is measured again this often: a regression stays, a disturbance goes.
TRIES = 3
TASKS = [*cli.tasks(cli.make_parser().parse_args(["run", "guard", "--threads", "1"]))]


@pytest.mark.skipif(why_not("cpu", "cpu") is not None, reason=f"cpu: {why_not('cpu', 'cpu')}")
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.case.name.replace(" ", "-"))
def test_no_ratio_to_the_lower_bound_grew(task, benchmark, request) -> None:
    here = device.environment()
    request.addfinalizer(lambda: torch.set_num_threads(here["threads"]))
    path = Path(__file__).with_name(f"baseline_{here['instruction_set']}.jsonl")
    if not path.exists():
        pytest.skip(f"there is no {path.name}: python -m benchmarks run guard makes one")
    baseline = records.read([path])
    before, key = records.Report(baseline.runs), (task.suite, task.case)
    for record in (baseline.bounds[key], *baseline.of(*key)):
        before.add(record)
    is_same = baseline.environment["processor"] == here["processor"]

    after = records.Report([schema.Run(here, {}, [])])

    def keep_best(record: schema.Record | str | None) -> None:
        old = after.results.get((*key, getattr(record, "method", "")))
        if old is None or (record.bound_share or 0.0) > (old.bound_share or 0.0):
            after.add(record)

    benchmark.pedantic(lambda: one_case.run_task(task, keep_best))
    for left in reversed(range(TRIES)):
        text, ok = compare.compare(before, after, SLACK if is_same else SLACK_ELSEWHERE)
        if ok or not left:
            break
        one_case.run_task(task, keep_best)
    assert ok, text
