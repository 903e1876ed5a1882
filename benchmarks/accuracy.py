"""``python -m benchmarks.accuracy [--write docs/numerics.md]``: worst errors against float64.

KDLoss and the eager composition, over the regimes of ``fused_kd.testing`` (where the exact values
are finite), temperatures 1 and 2, hard and soft term at 0.5 each, upstream gradients that are not
1. Units are those of the error rule (``fused_kd.testing.conditioning``), per row:

* loss: eps32·(1 + max|z-m|) of each term, weighted as the term is, plus eps32 of the loss;
* gradient in norm: ‖g-g*‖ over eps32·‖g*‖, or for 16-bit logits over half a unit in the last
  place, (eps16/2)·‖g*‖, plus what float32 arithmetic costs the row at least;
* gradient by element: the largest |g_v-g*_v| over the same with |g*_v| in the 16-bit term: 1 is
  what rounding to the dtype alone may cost.

Entries of "tvd" whose sign is undetermined are left out; their effect on the others is added to the
slack.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fused_kd import KDLossParts, kd_loss
from fused_kd.backends import why_not
from fused_kd.divergences import DIVERGENCES
from fused_kd.options import BACKENDS, KDOptions
from fused_kd.testing import REGIMES, Inputs, Result, conditioning, make_inputs, truth_and_eager

from .cases import DTYPES
from .device import environment
from .report import Parser, Progress, markdown_table, show, writable_file

NAME = "accuracy"  # of its markers
TEMPERATURES = (1.0, 2.0)
#: Rows and vocabulary: one block and a tail; several blocks and a tail.
SHAPES = ((8, 1009), (4, 32003))
MEASURES = ("loss", "norm", "element")


@dataclass
class Worst:
    """The largest error of one contestant, by measure, and the regime it was seen in."""

    error: dict[str, float] = field(default_factory=lambda: dict.fromkeys(MEASURES, 0.0))
    regime: dict[str, str] = field(default_factory=dict)
    not_finite: set[str] = field(default_factory=set)  # regimes where it is not, and the truth is

    def add(self, regime: str, errors: dict[str, Tensor]) -> None:
        for measure, per_row in errors.items():
            finite = per_row[per_row.isfinite()]
            if len(finite) < len(per_row):
                self.not_finite.add(regime)
            worst = float(finite.max()) if len(finite) else 0.0
            if worst >= self.error[measure]:
                self.error[measure], self.regime[measure] = worst, regime


def errors_of(
    got: Result, truth: Result, inputs: Inputs, upstream: Tensor, options: KDOptions
) -> dict[str, Tensor]:
    """Errors of every row whose exact loss and gradient are finite, in units, by measure."""
    unit = conditioning(inputs, truth, upstream, options)
    dtype = got.grad.dtype
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    exact = torch.where(unit.clear, truth.grad, 0.0)  # (N, V)
    error = torch.where(unit.clear, got.grad.double() - truth.grad, 0.0).abs()
    # subnormals of float16 are rounded to a fixed step
    step = torch.finfo(dtype).smallest_normal * (torch.finfo(dtype).eps / 2)
    # undetermined signs and steps are per entry: in norm they count root-V times
    per_entry = unit.undetermined + step  # (N,)
    in_norm = unit.grad + per_entry * error.shape[1] ** 0.5
    found = {
        "loss": (got.rows.double() - truth.rows).abs() / unit.loss,
        "norm": error.norm(dim=1) / (rounding * exact.norm(dim=1) + in_norm),
        "element": (error / (rounding * exact.abs() + (unit.grad + per_entry)[:, None])).amax(1),
    }
    finite = truth.rows.isfinite() & truth.grad.isfinite().all(1)
    return {measure: value[finite] for measure, value in found.items()}


def fused_result(inputs: Inputs, upstream: Tensor, backend: str, **keywords: Any) -> Result:
    """Rows of the loss; the gradient of Σ upstream·row, the way that training takes it."""
    rows = kd_loss(*inputs, reduction="none", backend=backend, **keywords)
    student = inputs.student.clone().requires_grad_()
    total = kd_loss(student, inputs.teacher, inputs.labels, token_weight=upstream,
                    reduction="sum", backend=backend, **keywords)  # fmt: skip
    assert not isinstance(rows, KDLossParts)
    assert not isinstance(total, KDLossParts)
    total.backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    return Result(rows, student.grad)


def cases(quick: bool) -> Iterator[tuple[str, float, tuple[int, int]]]:
    for regime in REGIMES:
        for temperature in TEMPERATURES:
            for shape in SHAPES[:1] if quick else SHAPES:
                yield regime, temperature, shape


def measure(
    dtype: str, divergence: str, backend: str, quick: bool, progress: Progress
) -> tuple[Worst, Worst]:
    """Ours and the eager composition's."""
    ours, theirs = Worst(), Worst()
    for regime, temperature, (n, v) in cases(quick):
        keywords = {"temperature": temperature, "divergence": divergence}
        inputs = make_inputs(regime, n, v, DTYPES[dtype])
        upstream = torch.linspace(0.6, 1.7, n)
        truth, eager = truth_and_eager(inputs, upstream, **keywords)
        got = fused_result(inputs, upstream, backend, **keywords)
        options = KDOptions(**keywords)  # type: ignore[arg-type]
        for worst, result in ((ours, got), (theirs, eager)):
            worst.add(regime, errors_of(result, truth, inputs, upstream, options))
        progress.advance(f"{dtype} {divergence} {regime}")
    return ours, theirs


def accuracy_table(backend: str, quick: bool) -> str:
    """In Markdown."""
    total = len(DTYPES) * len(DIVERGENCES) * len(list(cases(quick)))
    rows, failures = [], []
    with Progress("accuracy", total) as progress:
        for dtype in DTYPES:
            for divergence in DIVERGENCES:
                ours, theirs = measure(dtype, divergence, backend, quick, progress)
                cells = [f"{w.error[m]:.2f}" for m in MEASURES for w in (ours, theirs)]
                rows.append([dtype, f"`{divergence}`", *cells])
                for who, worst in (("KDLoss", ours), ("eager", theirs)):
                    if worst.not_finite:
                        where = ", ".join(f"`{regime}`" for regime in sorted(worst.not_finite))
                        failures.append(f"{who}, {dtype} `{divergence}`: {where}")
    head = ["dtype", "divergence", "loss", "loss, eager", "gradient in norm", "eager",
            "gradient by element", "eager"]  # fmt: skip
    text = markdown_table(head, rows, left=2)
    if failures:
        lines = "\n".join(f"* {line}" for line in failures)
        text += f"\n\nNot finite where the exact value is (left out above):\n\n{lines}"
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table, or writes it; returns the exit status."""
    parser = Parser(prog="python -m benchmarks.accuracy", description=__doc__)
    add = parser.add_argument
    add("--write", type=writable_file, metavar="FILE", help="between the markers of this file")
    add("--backend", choices=BACKENDS, default="cpu", help="default: %(default)s")
    add("--quick", action="store_true", help="the small shape only")
    options = parser.parse_args(arguments)
    reason = why_not(options.backend, "cpu")
    if reason is not None:
        parser.error(f"the {options.backend} backend cannot run: {reason}")
    parser.check_markers(options.write, NAME)
    torch.set_num_threads(1)
    found = environment()
    text = accuracy_table(options.backend, options.quick)
    note = (f"`python -m benchmarks.accuracy`, backend {options.backend}, "
            f"{found['instruction_set']}, torch {found['torch']}")  # fmt: skip
    show(f"{text}\n\n{note}", options.write, NAME)
    return 0


if __name__ == "__main__":
    sys.exit(main())
