"""Measure errors against float64, rewrite the table of docs/numerics.md: ``make accuracy``."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_kd import env, extension, kd_loss
from fused_kd.divergences import DIVERGENCES
from fused_kd.options import KDOptions
from fused_kd.testing import DTYPES, REGIMES, conditioning, evaluate, make_inputs, truth_and_eager

ROWS, VOCABULARIES, TEMPERATURES = 8, (1009, 32003), (1.0, 2.0)
PAGE = Path(__file__).resolve().parents[1] / "docs" / "numerics.md"


def errors(regime: str, v: int, dtype: torch.dtype, **keywords: Any) -> Tensor:
    """Return the errors of loss, gradient in norm and its worst entry, each by ours and eager.

    (3, 2, rows) in the units of `conditioning`; rows without finite exact values are left out.
    """
    inputs, upstream = make_inputs(regime, ROWS, v, dtype), torch.linspace(0.6, 1.7, ROWS)
    truth, eager = truth_and_eager(inputs, upstream, **keywords)
    unit, info = conditioning(inputs, truth, upstream, KDOptions(**keywords)), torch.finfo(dtype)
    rounding = 0.0 if dtype == torch.float32 else info.eps / 2
    exact = torch.where(unit.clear, truth.grad, 0.0)  # (N, V), 0 if the sign is undetermined
    # (N,): what undetermined signs change in an entry, and the rounding of float16's subnormals
    step = unit.undetermined + info.smallest_normal * (info.eps / 2)
    in_norm = rounding * exact.norm(dim=1) + unit.grad + step * v**0.5
    by_element = rounding * exact.abs() + (unit.grad + step)[:, None]
    methods = []
    for rows, grad in (evaluate(kd_loss, inputs, upstream, **keywords), eager):
        error = torch.where(unit.clear, grad.double() - truth.grad, 0.0).abs()
        norm, element = error.norm(dim=1) / in_norm, (error / by_element).amax(1)
        methods.append(torch.stack([(rows.double() - truth.rows).abs() / unit.loss, norm, element]))
    return torch.stack(methods, 1)[..., truth.rows.isfinite() & truth.grad.isfinite().all(1)]


if __name__ == "__main__":
    table, lost = "", {}
    for dtype, divergence in product(DTYPES, DIVERGENCES):
        worst, cells = torch.zeros(3, 2, 1, dtype=torch.float64), [dtype, f"`{divergence}`"]
        for regime, v, t in product(REGIMES, VOCABULARIES, TEMPERATURES):
            error = errors(regime, v, DTYPES[dtype], temperature=t, divergence=divergence)
            for method in (~error.isfinite()).any(2).any(0).nonzero():
                lost[f"* {('ours', 'eager')[method]}, {' '.join(cells)}: `{regime}`\n"] = None
            worst = torch.cat([worst, error.nan_to_num(0.0, 0.0)], 2).amax(2, keepdim=True)
        table += f"| {' | '.join(cells + [f'{x:.2f}' for x in worst.flatten()])} |\n"
    table += "\nNot finite where the exact value is (left out above):\n\n" + "".join(lost)
    machine = env.report()["processor"]["name"], extension.cpu.build_info()["instruction_set"]
    table += f"\n`make accuracy`: {', '.join(machine)}, torch {torch.__version__}\n"
    below = re.compile(r"(?<=---: \|\n)[^#]*(?=<!-- accuracy:end)")  # the table's head
    PAGE.write_text(below.sub(lambda _: table, PAGE.read_text()))
