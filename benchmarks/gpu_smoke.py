"""``python -m benchmarks.gpu_smoke``: is every kernel right at every size of a cluster?

Each divergence, pair of dtypes and number of blocks is compared with the float64 reference on the
same device: per-row losses, the gradient from statistics, the gradient made in the forward, and
that gradient times a number that is no power of two. One line for each failure. A lost context ends
the process with status 3, a call that does not return with status 4.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_kd import kd_loss
from fused_kd.divergences import DIVERGENCES

from . import records
from .cases import DTYPES
from .device import Budget
from .errors import distance
from .gpu_guard import Guard
from .gpu_options import make_parser, parse, usable

#: Vocabularies whose rows take this many blocks of a cluster, with 228 KiB of shared memory in a
#: multiprocessor (H100, H200, B200) and both sides of that dtype; 0: no cluster holds them.
LADDER = {
    "bf16": {1: 1003, 2: 32_000, 4: 50_257, 8: 151_936, 16: 262_144, 0: 1_000_000},
    "fp32": {1: 1024, 2: 16_001, 4: 32_000, 8: 50_257, 16: 151_936, 0: 262_144},
}
#: Less than a vector, and where each pair of dtypes is tried.
SHORT, MIXED = 7, 8_008
#: The same without a GPU.
TINY = {"bf16": {1: 33, 2: 70}, "fp32": {1: 33, 2: 70}}
TINY_MIXED = 40
#: Relative errors beyond which something is wrong: of losses, and of gradients in norm by dtype.
#: Rounding once gives at most 2^-9 of an entry in bfloat16, 2^-12 in float16.
WRONG_LOSS, WRONG = 5e-5, {"fp32": 2e-5, "bf16": 6e-3, "fp16": 1e-3}
#: float16's gradients need a loss scale, or they fall below its numbers.
SCALE = {"fp16": 4096.0}
#: Seconds that one case may take, compilation included.
PATIENCE = 20.0


@dataclass(frozen=True)
class Case:
    """Three rows, the first of them ignored."""

    divergence: str
    student: str  # keys of DTYPES
    teacher: str
    v: int
    blocks: int | None = None  # of a cluster; None: not what it is about

    @property
    def keywords(self) -> dict[str, Any]:
        return {"divergence": self.divergence, "temperature": 2.0, "beta": 0.3}

    def __str__(self) -> str:
        where = "" if self.blocks is None else f" ({self.blocks or 'no cluster'})"
        return f"{self.divergence} {self.student}-{self.teacher} V={self.v}{where}"


def cases(device: str) -> list[Case]:
    """Return all cases, ordered so that the first few tell most.

    Every number of blocks with one divergence, every pair of dtypes, then the other divergences.
    """
    ladder, mixed = (LADDER, MIXED) if device == "cuda" else (TINY, TINY_MIXED)
    found = []
    for divergence in DIVERGENCES:
        # many blocks first: that they wait for each other is what no emulation can vouch for
        for dtype, rungs in ladder.items():
            for blocks, v in reversed(rungs.items()):
                found.append(Case(divergence, dtype, dtype, v, blocks))
            found.append(Case(divergence, dtype, dtype, SHORT))
        found += [Case(divergence, s, t, mixed) for s in DTYPES for t in DTYPES]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases; return 1 if one was wrong."""
    options = parse(make_parser("gpu_smoke", __doc__, writes=True), arguments)
    budget, guard = Budget(options.seconds), Guard(options.device, PATIENCE)
    with options.output.open("w") as file:
        writer = records.Writer(file)
        for backend in usable(options):
            _backend(backend, guard, budget, writer, options.device)
    return 1 if guard.failed else 0


def _backend(
    backend: str, guard: Guard, budget: Budget, writer: records.Writer, device: str
) -> None:
    every = cases(device)
    worst, done = dict[str, float](), 0
    for case in every:
        if not budget.allows(0):
            print(f"LEFT OUT {backend}: {len(every) - done} of {len(every)} cases, the time is up, "
                  f"from {case} on", flush=True)  # fmt: skip
            break
        found = guard(f"{backend} {case}", lambda case=case: measure(case, backend, device))
        done += 1
        if found is None:
            continue
        for what, error in found.items():
            limit = WRONG_LOSS if what == "losses" else WRONG[case.student]
            key = f"{case.student} {'losses' if what == 'losses' else 'gradients'}"
            worst[key] = max(worst.get(key, 0.0), error)
            if not error <= limit:  # a NaN is below nothing
                guard.fail(f"{backend} {case}, {what}: error {error:.3g}, allowed {limit:g}")
        writer.write("smoke", backend=backend, case=str(case), errors=found)
    errors = ", ".join(f"{key} {error:.2g}" for key, error in sorted(worst.items()))
    print(f"{backend}: {done} cases, worst errors: {errors}", flush=True)


def measure(case: Case, backend: str, device: str) -> dict[str, float]:
    """Return the relative errors of one case by what was computed."""
    student, teacher, labels, weight = inputs = _inputs(case, device)
    exact = student.double().requires_grad_()
    rows = _loss(
        exact, teacher.double(), labels, backend="reference", reduction="none", **case.keywords
    )
    (want,) = torch.autograd.grad(rows, exact, weight.double())
    rows = rows.detach()
    found = compute(*inputs, backend=backend, **case.keywords)
    return {
        "losses": max(distance(found.losses, rows), distance(found.losses_with_graph, rows)),
        "gradient of rows": distance(found.of_rows, want),
        "gradient of the sum": distance(found.of_sum, want),
        "0.3 of it": distance(found.scaled, 0.3 * want),
    }


class Computed(NamedTuple):
    """What one backend makes of a case."""

    losses: Tensor  # (3,), from the forward alone
    losses_with_graph: Tensor  # (3,)
    of_rows: Tensor  # (3, V), the gradient of the weighted rows, from statistics
    of_sum: Tensor  # (3, V), of their sum, made in the forward
    scaled: Tensor  # (3, V), 0.3 times that, made again where rounding twice would show


def launch(case: Case, backend: str, device: str) -> None:
    """Make the calls of a case and look at nothing."""
    compute(*_inputs(case, device), backend=backend, **case.keywords)


def compute(
    student: Tensor, teacher: Tensor, labels: Tensor, weight: Tensor, **keywords: Any
) -> Computed:
    """Make every call of a backend that a case consists of."""
    with torch.no_grad():
        losses = _loss(student, teacher, labels, reduction="none", **keywords)
    leaf = student.detach().requires_grad_()
    rows = _loss(leaf, teacher, labels, reduction="none", **keywords)
    totals = [
        _loss(leaf, teacher, labels, reduction="sum", token_weight=weight, **keywords)
        for _ in range(2)
    ]
    (of_rows,) = torch.autograd.grad(rows, leaf, weight)
    (of_sum,) = torch.autograd.grad(totals[0], leaf)
    (scaled,) = torch.autograd.grad(totals[1], leaf, torch.tensor(0.3, device=student.device))
    return Computed(losses, rows.detach(), of_rows, of_sum, scaled)


def _inputs(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return student, teacher, labels, weights."""
    generator = torch.Generator(device).manual_seed(case.v)
    student, teacher = (
        (3 * torch.randn(3, case.v, generator=generator, device=device)).to(DTYPES[dtype])
        for dtype in (case.student, case.teacher)
    )
    labels = torch.randint(case.v, (3,), generator=generator, device=device)
    labels[0] = -100
    weight = SCALE.get(case.student, 1.0) * torch.tensor([0.5, 1.0, 1.5], device=device)
    return student, teacher, labels, weight


def _loss(*inputs: Tensor, **keywords: Any) -> Tensor:
    loss = kd_loss(*inputs, **keywords)  # type: ignore[misc]
    assert isinstance(loss, Tensor)
    return loss


if __name__ == "__main__":
    sys.exit(main())
