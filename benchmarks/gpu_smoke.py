"""Check every kernel at every size of a cluster: the cases of tests/test_gpu_smoke.py.

Each divergence, pair of dtypes and number of blocks is compared with the float64 reference: the
losses of the rows, every way to the gradient, and the margins of NaN around the logits, which must
stay unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_kd import kd_loss
from fused_kd.divergences import DIVERGENCES
from fused_kd.testing import DTYPES, Inputs, evaluate

from .problems import Output

#: Vocabularies, by the dtype of both sides and by the blocks of a cluster that hold a row, with 228
#: KiB of shared memory on a multiprocessor (H100, H200, B200); 0: no cluster holds it. Many blocks
#: first: blocks that wait for each other are what no emulation can vouch for.
LADDER = {
    "bf16": {0: 1_000_000, 16: 262_144, 8: 151_936, 4: 50_257, 2: 32_000, 1: 1003},
    "fp32": {0: 262_144, 16: 151_936, 8: 50_257, 4: 32_000, 2: 16_001, 1: 1024},
}
#: A vocabulary of less than a vector; those of pairs of dtypes: rows aligned, and not.
SHORT, MIXED = 7, (8_008, 8_003)
#: LADDER and MIXED without a GPU.
TINY, TINY_MIXED = {"bf16": {2: 70, 1: 33}, "fp32": {2: 70, 1: 33}}, (40, 41)
ROWS = 3
#: Relative errors beyond which something is wrong: of losses, and of gradients in norm by dtype.
#: Rounding once gives at most 2^-9 of an entry in bfloat16, 2^-12 in float16.
WRONG_LOSS, WRONG = 5e-5, {"fp32": 2e-5, "bf16": 6e-3, "fp16": 1e-3}
#: By the student's dtype: float16's gradients need a loss scale, or they underflow.
SCALE = {"fp16": 4096.0}


class Case(NamedTuple):
    """Three rows, the first ignored; if V is odd, not aligned and with label smoothing."""

    divergence: str
    student: str  # keys of DTYPES
    teacher: str
    v: int

    @property
    def keywords(self) -> dict[str, Any]:
        smoothing = 0.1 * (self.v % 2)
        formula = {"divergence": self.divergence, "label_smoothing": smoothing}
        return {"temperature": 2.0, "beta": 0.3, **formula}


def cases(device: str) -> list[Case]:
    """Return all cases, the most informative first; tiny ones unless the device is "cuda"."""
    ladder, mixed = (LADDER, MIXED) if device == "cuda" else (TINY, TINY_MIXED)
    sizes = [(x, x, v) for x, rungs in ladder.items() for v in (*rungs.values(), SHORT)]
    pairs = list(product(DTYPES, DTYPES))
    return [
        Case(divergence, *rest)
        for i, divergence in enumerate(DIVERGENCES)
        for rest in (*sizes, *((*pair, mixed[(i + j) % 2]) for j, pair in enumerate(pairs)))
    ]


def measure(case: Case, backend: str, device: str) -> dict[str, float]:
    """Return a case's errors by what was computed, as shares of what is allowed; over 1: wrong."""
    student, teacher, labels, weight = inputs = make(case, device)
    double = Inputs(student.double().cpu(), teacher.double().cpu(), labels.cpu())
    exact = evaluate(kd_loss, double, weight.cpu(), backend="reference", **case.keywords)
    shares = {}
    for what, value, factor in compute(*inputs, backend=backend, **case.keywords):
        is_loss = value.dim() == 1
        true = factor * (exact.rows if is_loss else exact.grad)
        error = (value.double().cpu() - true).norm() / true.norm().clamp(min=1e-30)
        shares[what] = float(error) / (WRONG_LOSS if is_loss else WRONG[case.student])
    buffer = student._base
    assert buffer is not None
    kept = int(buffer.isnan().sum()) + student.numel()
    return {**shares, "margins": 0.0 if kept >= buffer.numel() else math.inf}


def compute(
    student: Tensor, teacher: Tensor, labels: Tensor, weight: Tensor, **keywords: Any
) -> Iterator[tuple[str, Tensor, float]]:
    """Yield (name, value, factor): rows' losses, then their weighted sum's gradient times `factor`.

    Times 1 the gradient is computed in the forward; times 2 that one is scaled; times 0.3 it is
    computed again, since rounding twice would show. In place it overwrites `student`.
    """
    with torch.no_grad():
        yield "losses", kd_loss(student, teacher, labels, reduction="none", **keywords), 1.0
    rows = evaluate(kd_loss, Inputs(student, teacher, labels), weight, **keywords)
    yield "losses with a graph", rows.rows, 1.0
    yield "gradient of rows", rows.grad, 1.0
    keywords = {"reduction": "sum", "token_weight": weight, **keywords}
    ways = [(False, 1.0), (False, 2.0), (False, 0.3)]
    if keywords["backend"] != "triton":  # would compile each; the tests have them too
        ways += [(False, 0.7, 0.4), (True, 0.3)]
    for inplace, *factors in ways:
        logits = Output.apply(student.detach().requires_grad_())
        loss = kd_loss(logits, teacher, labels, inplace=inplace, **keywords)
        for i, factor in enumerate(factors):
            upstream, retain = loss.new_tensor(factor), i + 1 < len(factors)
            (gradient,) = torch.autograd.grad(loss, logits, upstream, retain_graph=retain)
            yield f"gradient times {factor}{' in place' * inplace}", gradient, factor


def make(case: Case, device: str) -> tuple[Tensor, ...]:
    """Return student, teacher, labels and weights; NaNs are before, between and after the rows."""
    draw, offset, sides = torch.Generator().manual_seed(case.v), case.v % 2, []
    stride = (case.v + 31) // 16 * 16 + offset
    for dtype in (DTYPES[case.student], DTYPES[case.teacher]):
        buffer = torch.full((offset + ROWS * stride + 64,), math.nan, dtype=dtype, device=device)
        rows = buffer.as_strided((ROWS, case.v), (stride, 1), offset)
        sides.append(rows.copy_(3 * torch.randn(rows.shape, generator=draw)))
    labels = torch.randint(case.v, (ROWS + 1,), generator=draw).to(device)[1:]  # not aligned
    labels[0] = -100
    weight = SCALE.get(case.student, 1.0) * torch.linspace(0.5, 1.5, ROWS, device=device)
    return *sides, labels, weight
