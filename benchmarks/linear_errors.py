"""Errors of the linear level against float64, beside the eager composition's and Liger's."""

from __future__ import annotations

import argparse

import torch

from . import peers
from .cases import DTYPES, EAGER
from .linear_cases import (
    OURS,
    LinearCase,
    Loss,
    Outcome,
    distance,
    eager,
    make_heads,
    ours,
    outcome,
    show_title,
)
from .linear_speed import Bench
from .report import Results, table, verdict

#: Rows and vocabulary at most where float64 is computed, and heights of chunks that must agree.
ERROR_ROWS, ERROR_VOCABULARY, HEIGHTS = 64, 8192, (1, 5, 16, 64)
#: Ours over eager's error, and what rounding alone may cost, in units in the last place.
ERROR_FACTOR, ERROR_SLACK = 1.1, 8


def error_part(bench: Bench, options: argparse.Namespace, results: Results) -> None:
    """Errors of loss and gradients beside the peers', and whether the height of a chunk shows."""
    n, v = min(bench.case.n, ERROR_ROWS), min(bench.case.v, ERROR_VOCABULARY)
    case = bench.case.with_(n=n, v=v)
    show_title("error", case)
    heads = make_heads(case)
    exact = outcome(eager(case), heads.to(torch.float64))
    contestants: dict[str, Loss] = {OURS: ours(case), EAGER: eager(case)}
    if "liger" not in options.skip and peers.liger_linear_why_not() is None:
        contestants[peers.LIGER_LINEAR] = peers.liger_linear(case, compiled=False)
    errors = {name: _errors(outcome(loss, heads), exact) for name, loss in contestants.items()}
    slack = ERROR_SLACK * torch.finfo(torch.float32).eps
    lines = []
    for name, found in errors.items():
        goal = ""
        if name == OURS:
            good = all(mine <= ERROR_FACTOR * theirs + slack
                       for mine, theirs in zip(found, errors[EAGER], strict=True))  # fmt: skip
            goal = f"≤ eager's {verdict(good)}"
        lines.append([name, *(f"{x:.2e}" for x in found), goal])
        results.write("accuracy", section="error", **case.sizes(), name=name,
                      error=dict(zip(Outcome._fields, found, strict=True)))  # fmt: skip
    print(table(["relative, in norm", "loss", "by hidden", "by weight", "goal"], lines))
    print("\n" + table(*_heights(case, results)), flush=True)


def _errors(got: Outcome, exact: Outcome) -> list[float]:
    return [distance(x, y) for x, y in zip(got, exact, strict=True)]


def _heights(case: LinearCase, results: Results) -> tuple[list[str], list[list[str]]]:
    """Whether rows of the loss are the same bits, and how far the weight gradient moves."""
    heads = make_heads(case)
    bound = 2 * torch.finfo(DTYPES[case.dtype]).eps
    rows: dict[int, torch.Tensor] = {}
    weights: dict[int, torch.Tensor] = {}
    for height in (case.n, *HEIGHTS):
        with torch.no_grad():
            rows[height] = ours(case, chunk_rows=height, reduction="none")(*heads)
        weights[height] = outcome(ours(case, chunk_rows=height), heads).weight
    lines = []
    for height in HEIGHTS:
        same = torch.equal(rows[height], rows[case.n])
        moved = distance(weights[height], weights[case.n])
        lines.append([str(height), "yes" if same else "NO", f"{moved:.2e}", f"≤ {bound:.2e}",
                      verdict(same and moved <= bound)])  # fmt: skip
        results.write("accuracy", section="heights", **case.sizes(), chunk_rows=height,
                      same_rows=same, weight_moved=moved, limit=bound)  # fmt: skip
    return ["rows of a chunk", "losses bit-equal", "weight gradient moves", "goal", ""], lines
