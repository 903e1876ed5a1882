"""``python -m benchmarks.gpu_memory_check``: small shapes that reach every path of the GPU kernels.

Meant to run under compute-sanitizer (``benchmarks.gpu_sanitizer`` does that), and right without it:
logits lie between NaN margins at an offset, every gradient must be finite and close to the CPU
reference's. For each case: the forward alone; loss and gradient at once, handed over, scaled by a
power of two and by another number, recomputed for a second backward, in place; and the backward of
per-row losses.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_kd import KDLossParts, kd_loss
from fused_kd.divergences import DIVERGENCES

from .cases import DTYPES
from .device import Budget
from .gpu_options import make_parser, parse, usable

#: V that reach: less than a vector; one block; clusters of 2, 4, 8, 16 blocks and several programs
#: a row; rows of float32 too long for any cluster.
LADDER = (7, 20_001, 40_000, 80_000, 128_256, 262_144)
TOO_LONG = 500_000
#: V with rows that are all aligned, and that are not.
ALIGNED, ODD = 1024, 1003
#: Relative error in norm beyond which a gradient is wrong: rounding to 16 bits is 0.4 %.
WRONG = 0.02


@dataclass(frozen=True)
class Small:
    """A few rows of one kind."""

    divergence: str
    student: str  # keys of DTYPES
    teacher: str
    v: int
    offset: int  # of the first row from an aligned address, in entries
    rows: int = 3

    @property
    def keywords(self) -> dict[str, Any]:
        return {"divergence": self.divergence, "temperature": 2.0, "label_smoothing": 0.1,
                "beta": 0.3}  # fmt: skip

    def __str__(self) -> str:
        kinds = f"{self.student}-{self.teacher}"
        return f"{self.divergence} {kinds} {self.rows}x{self.v} offset {self.offset}"


def cases(backend: str, device: str) -> list[Small]:
    """Mixed, so that leaving out the last ones leaves out something of everything."""
    ladder = LADDER if device == "cuda" else (7, 300)
    pairs = [(s, t) for s in DTYPES for t in DTYPES]
    if backend == "triton":  # each pair is compiled separately
        pairs = [("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16"), ("bf16", "fp32")]
    found = []
    for i, divergence in enumerate(DIVERGENCES):
        for j, (student, teacher) in enumerate(pairs):
            shapes = [(ALIGNED, 0), (ODD, 1)]
            for v, offset in shapes if backend != "triton" else [shapes[(i + j) % 2]]:
                found.append(Small(divergence, student, teacher, v, offset))
    for divergence in ("forward_kl", "jsd"):
        for dtype in ("bf16",) if backend == "triton" else ("bf16", "fp32"):
            found += [Small(divergence, dtype, dtype, v, 0, rows=2) for v in ladder]
        if device == "cuda":
            found.append(Small(divergence, "fp32", "fp32", TOO_LONG, 0, rows=2))
    random.Random(0).shuffle(found)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a slice of the cases; returns 1 if one was wrong."""
    parser = make_parser("gpu_memory_check", __doc__)
    add = parser.add_argument
    add("--slice", type=_slice, default=(0, 1), metavar="I/N", help="the cases i, i+n, i+2n, ...")
    add("--planted", action="store_true", help="instead: one write that a sanitizer must find")
    options = parse(parser, arguments)
    if options.planted:
        _write_outside()
        return 0
    budget = Budget(options.seconds)
    failed = 0
    for backend in usable(options):
        first, of = options.slice
        every = cases(backend, options.device)[first::of]
        done = 0
        for case in every:
            if not budget.allows(0):
                print(f"LEFT OUT {backend}: {len(every) - done} of {len(every)} cases, the time is "
                      "up", flush=True)  # fmt: skip
                break
            failed += _check(case, backend, options.device)
            done += 1
        print(f"{backend}: {done} cases", flush=True)
    return 1 if failed else 0


def _slice(text: str) -> tuple[int, int]:
    first, _, of = text.partition("/")
    if not (first.isdigit() and of.isdigit() and 0 <= int(first) < int(of)):
        raise argparse.ArgumentTypeError(f"must be I/N with 0 <= I < N; got {text!r}")
    return int(first), int(of)


class _Longer:
    """Memory of a GPU that claims to be longer than it is."""

    def __init__(self, inside: Tensor, entries: int) -> None:
        self.__cuda_array_interface__ = {"shape": (entries,), "typestr": "<f4", "version": 3,
                                         "data": (inside.data_ptr(), False)}  # fmt: skip


def _write_outside() -> None:
    inside = torch.zeros(64, device="cuda")
    torch.as_tensor(_Longer(inside, 4096), device="cuda").add_(1)
    torch.cuda.synchronize()


# ------------------------------------------------------------------------------------- one case


def _check(case: Small, backend: str, device: str) -> bool:
    """Whether something is wrong, which is printed."""
    generator = torch.Generator().manual_seed(case.v)
    shape = (case.rows, case.v)
    student, teacher = (
        (2 * torch.randn(shape, generator=generator)).to(DTYPES[kind])
        for kind in (case.student, case.teacher)
    )
    labels = torch.randint(case.v, (case.rows,), generator=generator)
    labels[0] = -100
    want, upstream = _expected(case, student, teacher, labels)
    inside_s, inside_t = (_between_margins(x, case.offset, device) for x in (student, teacher))
    # not at an aligned address either
    inside_y = torch.cat([labels[:1], labels]).to(device)[1:]
    wrong = []
    for name, gradient, factor in _gradients(
        case, inside_s, inside_t, inside_y, upstream.to(device), backend
    ):
        exact = factor * (want.per_row if name == "none" else want.sum)
        error = (gradient.float().cpu() - exact).norm() / exact.norm().clamp(min=1e-20)
        if not error < WRONG:
            wrong.append(f"{name}: error {float(error):.3g}")
    if not _margins_are_whole(inside_s):
        wrong.append("something was written outside the student's rows")
    for line in wrong:
        print(f"FAILED {backend} {case}, {line}", flush=True)
    return bool(wrong)


@dataclass(frozen=True)
class Expected:
    """The reference's gradients: of the sum of the rows, and of the weighted sum."""

    sum: Tensor  # (N, V)
    per_row: Tensor  # (N, V)


def _expected(
    case: Small, student: Tensor, teacher: Tensor, labels: Tensor
) -> tuple[Expected, Tensor]:
    upstream = torch.linspace(0.5, 1.5, case.rows)
    leaf = student.float().requires_grad_()
    rows = kd_loss(leaf, teacher.float(), labels, reduction="none", backend="reference",
                   **case.keywords)  # fmt: skip
    (of_sum,) = torch.autograd.grad(_plain(rows).sum(), leaf, retain_graph=True)
    (per_row,) = torch.autograd.grad(rows, leaf, upstream)
    return Expected(of_sum, per_row), upstream


def _gradients(
    case: Small, student: Tensor, teacher: Tensor, labels: Tensor, upstream: Tensor, backend: str
) -> Iterator[tuple[str, Tensor, float]]:
    """Every way to a gradient: its name, the gradient, and what it is multiplied by."""

    def call(logits: Tensor, **keywords: Any) -> Tensor:
        return _plain(
            kd_loss(logits, teacher, labels, backend=backend, **case.keywords, **keywords)
        )

    def grad(loss: Tensor, leaf: Tensor, factor: float, **keywords: Any) -> Tensor:
        (found,) = torch.autograd.grad(loss * factor, leaf, **keywords)
        return found

    with torch.no_grad():
        call(student, reduction="sum")
    for factor in (1.0, 2.0, 0.3):
        leaf = student.detach().requires_grad_()
        loss = call(leaf, reduction="sum")
        yield f"times {factor}", grad(loss, leaf, factor, retain_graph=True), factor
    yield "a second backward", grad(loss, leaf, 0.7), 0.7
    leaf = student.detach().requires_grad_()
    rows = call(leaf, reduction="none")
    yield "none", torch.autograd.grad(rows, leaf, upstream)[0], 1.0
    leaf = student.detach().requires_grad_()
    logits = _Output.apply(leaf)  # type: ignore[no-untyped-call]
    yield "in place", grad(call(logits, reduction="sum", inplace=True), leaf, 0.3), 0.3


class _Output(torch.autograd.Function):
    """The logits in their own memory, as the output of a layer."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, *gradient: Any) -> Any:
        return gradient[0]


def _between_margins(logits: Tensor, offset: int, device: str) -> Tensor:
    """The rows with NaN before, between and behind them."""
    rows, v = logits.shape
    stride = (v + 15) // 8 * 8 + (offset and 1)
    buffer = torch.full((offset + rows * stride + 64,), float("nan"), dtype=logits.dtype)
    view = buffer.as_strided((rows, v), (stride, 1), offset)
    view.copy_(logits)
    return buffer.to(device).as_strided((rows, v), (stride, 1), offset)


def _margins_are_whole(view: Tensor) -> bool:
    assert view._base is not None
    buffer = view._base.clone()
    buffer.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(float("nan"))
    return bool(buffer.isnan().all())


def _plain(loss: Tensor | KDLossParts) -> Tensor:
    assert isinstance(loss, Tensor)
    return loss


if __name__ == "__main__":
    sys.exit(main())
