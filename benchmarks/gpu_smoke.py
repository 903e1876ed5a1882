"""``python -m benchmarks.gpu_smoke``: is every kernel right at every size of a cluster?

Each divergence, pair of dtypes and number of blocks is compared with the float64 reference: the
losses of the rows, every way to the gradient, and the margins of NaN around the logits, which
nothing may write. One line for each failure. See gpu_session.py for the variables.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_kd import kd_loss
from fused_kd.divergences import DIVERGENCES
from fused_kd.testing import DTYPES, Inputs, evaluate

from .gpu_session import Output, Session

#: Vocabularies whose rows take this many blocks of a cluster, with 228 KiB of shared memory in a
#: multiprocessor (H100, H200, B200) and both sides of that dtype; 0: no cluster holds them. Many
#: blocks first: that they wait for each other is what no emulation can vouch for.
LADDER = {
    "bf16": {0: 1_000_000, 16: 262_144, 8: 151_936, 4: 50_257, 2: 32_000, 1: 1003},
    "fp32": {0: 262_144, 16: 151_936, 8: 50_257, 4: 32_000, 2: 16_001, 1: 1024},
}
#: Less than a vector. Where pairs of dtypes are tried: rows that are aligned, and that are not.
SHORT, MIXED = 7, (8_008, 8_003)
#: The same without a GPU.
TINY, TINY_MIXED = {"bf16": {2: 70, 1: 33}, "fp32": {2: 70, 1: 33}}, (40, 41)
ROWS = 3
#: Relative errors beyond which something is wrong: of losses, and of gradients in norm by dtype.
#: Rounding once gives at most 2^-9 of an entry in bfloat16, 2^-12 in float16.
WRONG_LOSS, WRONG = 5e-5, {"fp32": 2e-5, "bf16": 6e-3, "fp16": 1e-3}
#: float16's gradients need a loss scale, or they fall below its numbers.
SCALE = {"fp16": 4096.0}


class Case(NamedTuple):
    """Three rows of one kind, the first of them ignored; odd V: not aligned, labels smoothed."""

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
    """Return all cases, ordered so that the first few tell most.

    Every number of blocks with one divergence, every pair of dtypes, then the other divergences.
    """
    ladder, mixed = (LADDER, MIXED) if device == "cuda" else (TINY, TINY_MIXED)
    sizes = [(x, x, v) for x, rungs in ladder.items() for v in (*rungs.values(), SHORT)]
    pairs = list(product(DTYPES, DTYPES))
    return [
        Case(divergence, *rest)
        for i, divergence in enumerate(DIVERGENCES)
        for rest in (*sizes, *((*pair, mixed[(i + j) % 2]) for j, pair in enumerate(pairs)))
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases; return 1 if one was wrong."""
    parser = argparse.ArgumentParser("gpu_smoke", description=__doc__)
    text = "only the cases I, I+N, ... of a mixed order, for a sanitizer"
    parser.add_argument("--slice", nargs=2, type=int, metavar=("I", "N"), help=text)
    parser.add_argument("--planted", action="store_true", help="make one write out of bounds")
    options = parser.parse_args(arguments)
    if options.planted:
        _write_outside()
        return 0
    session = Session()
    every = cases(session.device)
    if options.slice:
        random.Random(0).shuffle(every)
        every = every[options.slice[0] :: options.slice[1]]
    for backend in session.backends:
        _run(session, backend, every)
    return session.status


def _run(session: Session, backend: str, every: Sequence[Case]) -> None:
    """Compare the cases with the reference until the time is up; print the worst errors."""
    worst: dict[str, float] = {}
    for i, case in enumerate(every):
        if session.skips(f"{backend}: {len(every) - i} of {len(every)} cases, from {case} on"):
            break
        what = f"{backend} {case}"
        errors = session.call(what, lambda case=case: measure(case, backend, session.device))
        session.write(case=what, errors=errors)
        for name, error in (errors or {}).items():
            key = f"{case.student} {name.split()[0]}"
            worst[key] = max(worst.get(key, 0.0), error)
            limit = WRONG_LOSS if name.startswith("losses") else WRONG[case.student]
            if not error <= limit:  # a NaN is below nothing
                session.fail(f"{what}, {name}: error {error:.3g}, allowed {limit:g}")
    print(f"{backend}, worst errors:", *(f"{k} {x:.2g}" for k, x in worst.items()), flush=True)


def measure(case: Case, backend: str, device: str) -> dict[str, float]:
    """Return the relative errors of a case, by what was computed."""
    student, teacher, labels, weight = inputs = make(case, device)
    double = Inputs(student.double().cpu(), teacher.double().cpu(), labels.cpu())
    exact = evaluate(kd_loss, double, weight.cpu(), backend="reference", **case.keywords)
    errors = {}
    for what, value, factor in compute(*inputs, backend=backend, **case.keywords):
        target = factor * (exact.rows if value.dim() == 1 else exact.grad)
        distance = (value.double().cpu() - target).norm() / target.norm().clamp(min=1e-30)
        errors[what] = float(distance)
    assert student._base is not None
    broken = student._base.numel() - student.numel() - int(student._base.isnan().sum())
    return {**errors, "entries written outside of the rows": float(broken)}


def compute(
    student: Tensor, teacher: Tensor, labels: Tensor, weight: Tensor, **keywords: Any
) -> Iterator[tuple[str, Tensor, float]]:
    """Yield the losses of the rows, and every way to the gradient of their weighted sum.

    Each as its name, the value, and the factor that it has. The gradient times 1 is made in the
    forward; times 2 that is scaled, times 0.3 it is computed again from the logits, since rounding
    twice would show. The last one is written over the student's logits.
    """
    with torch.no_grad():
        yield "losses", kd_loss(student, teacher, labels, reduction="none", **keywords), 1.0
    rows = evaluate(kd_loss, Inputs(student, teacher, labels), weight, **keywords)
    yield "losses with a graph", rows.rows, 1.0
    yield "gradient of rows", rows.grad, 1.0
    keywords = {"reduction": "sum", "token_weight": weight, **keywords}

    def gradient(loss: Any, factor: float, **more: Any) -> Tensor:
        return torch.autograd.grad(loss, leaf, loss.new_tensor(factor), **more)[0]

    leaf = student.detach().requires_grad_()
    for factor in (1.0, 2.0, 0.3):
        loss = kd_loss(leaf, teacher, labels, **keywords)
        yield f"gradient times {factor}", gradient(loss, factor, retain_graph=True), factor
    if keywords["backend"] == "triton":  # compiles for each of them, which the tests have too
        return
    yield "gradient of a second backward", gradient(loss, 0.7), 0.7
    loss = kd_loss(Output.apply(leaf), teacher, labels, inplace=True, **keywords)
    yield "gradient in place", gradient(loss, 0.3), 0.3


def make(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return student, teacher, labels and weights of a case."""
    draw = torch.Generator().manual_seed(case.v)
    student, teacher = (_between_margins(case, dtype, draw, device) for dtype in case[1:3])
    labels = torch.randint(case.v, (ROWS + 1,), generator=draw).to(device)[1:]  # not aligned
    labels[0] = -100
    weight = SCALE.get(case.student, 1.0) * torch.linspace(0.5, 1.5, ROWS, device=device)
    return student, teacher, labels, weight


def _between_margins(case: Case, dtype: str, draw: torch.Generator, device: str) -> Tensor:
    """Return normal numbers with NaN before, between and behind the rows."""
    offset = case.v % 2
    stride = (case.v + 31) // 16 * 16 + offset
    size, shape = offset + ROWS * stride + 64, (ROWS, case.v)
    buffer = torch.full((size,), float("nan"), dtype=DTYPES[dtype], device=device)
    return buffer.as_strided(shape, (stride, 1), offset).copy_(
        3 * torch.randn(shape, generator=draw)
    )


def _write_outside() -> None:
    """Write behind 64 floats of GPU memory, through an object that claims that there are 4096."""
    start = torch.zeros(64, device="cuda").data_ptr()
    claim = {"shape": (4096,), "typestr": "<f4", "version": 3, "data": (start, False)}
    longer = type("Longer", (), {"__cuda_array_interface__": claim})()
    torch.as_tensor(longer, device="cuda").add_(1)
    torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
