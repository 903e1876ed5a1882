"""``python -m benchmarks.gpu_times operators|heads|launch``: where the time of a call goes.

operators: each operator over the time of a copy. The lower bound is its traffic in (N, V) matrices
at the bandwidth of a copy, timed first: three for a gradient (two reads, one write), two for a
forward alone. An operator that has nothing to do is compared with the three that it does not move.
heads: the loss of heads by rows of a chunk, over the four products of whole matrices.
launch: three kernels for a profiler, after two others; nothing is measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

import torch
from torch import Tensor

from fused_kd import Head, KDLoss
from fused_kd.divergences import CODES, DIVERGENCES
from fused_kd.options import KDOptions, temperature_tensor
from fused_kd.testing import DTYPES

from .cases import Case
from .gpu_session import Output, Session
from .problems import HeadsProblem

#: What is measured, in this order: a row of 50257 entries begins at any address.
BF16 = [("bf16", v) for v in (151_936, 32_000, 262_144, 50_257, 128_256)]
SIZES = [BF16[0], ("fp32", 151_936), *BF16[1:3], ("fp32", 262_144), *BF16[3:]]
ROWS, TINY, FEW_ROWS = 8192, [("bf16", 33), ("fp32", 33)], 5
#: Rows, vocabulary, hidden sizes of student and teacher; rows of a chunk.
HEADS, CHUNKS = (8192, 151_936, 2048, 4096), (2048, 4096, 8192)
TINY_HEADS, FEW_CHUNKS = (5, 33, 8, 12), (2, 5)

Calls = dict[str, tuple[int, Callable[[], object]]]  # by name: matrices that it has to move, call


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the measurement; return 1 if a call failed."""
    run = {"operators": _time_operators, "heads": _time_heads, "launch": _launch}
    parser = argparse.ArgumentParser("gpu_times", description=__doc__)
    parser.add_argument("what", choices=run)
    what, session = parser.parse_args(arguments).what, Session()
    run[what](session)
    return session.status


def _time_operators(session: Session) -> None:
    for backend, size in product(session.backends, SIZES if session.is_gpu else TINY):
        if not session.skips(f"{backend} {size}"):
            _time_size(session, backend, *size)


def _time_size(session: Session, backend: str, dtype: str, v: int) -> None:
    """Measure all operators with the first divergence; at the first size one with all others."""
    size = f"{dtype} V={v}"
    sides = session.call(size, lambda: [_logits(session, dtype, v) for _ in range(3)])
    if sides is None:  # the memory did not suffice
        return
    student, teacher, original = sides
    copy = session.time(f"{size} copy of a matrix", lambda: student.copy_(teacher))
    if copy is None:
        return
    print(f"{2 * student.nbytes / copy / 1e12:.3f} TB/s")
    student.copy_(original)
    calls = whole_calls(student, teacher, backend)
    for divergence in DIVERGENCES if (dtype, v) in (SIZES[0], TINY[0]) else DIVERGENCES[:1]:
        build = partial(operators, student, teacher, backend, divergence)
        for name, call in (session.call(divergence, build) or {}).items():
            if name == "forward_backward" or divergence == DIVERGENCES[0]:
                calls[f"{divergence} {name}"] = call
    for name, (matrices, call) in calls.items():
        what = f"{backend} {size} {name}"
        restore = (lambda: student.copy_(original)) if "in place" in name else (lambda: None)
        if not session.skips(what):
            session.time(what, call, matrices / 2 * copy, restore)


def _logits(session: Session, dtype: str, v: int) -> Tensor:
    shape = (ROWS if session.is_gpu else FEW_ROWS, v)
    return torch.empty(shape, dtype=DTYPES[dtype], device=session.device).normal_(std=2.0)


def operators(student: Tensor, teacher: Tensor, backend: str, divergence: str) -> Calls:
    """Return calls of the operators of a backend on logits (N, V)."""
    n, v = student.shape
    labels = torch.arange(n, device=student.device) % v
    weight = torch.full((n,), 0.5 / n, device=student.device)
    rows = (student[None], teacher[None], labels, weight, weight)
    temperature = temperature_tensor(KDOptions(temperature=2.0))
    beta, scale_t2, label_smoothing = 0.5, True, 0.0
    numbers = (CODES[divergence], temperature, beta, scale_t2, label_smoothing)
    unchanged, changed = (torch.tensor(x, device=student.device) for x in (1.0, 0.3))

    def call(name: str, *arguments: object) -> tuple[Tensor, ...]:
        full = f"triton_{name}" if backend == "triton" else name
        return getattr(torch.ops.fused_kd, full).default(*arguments)

    _, _, stats, gradient = call("forward_backward", *rows, *numbers)
    rescale = ("rescale_", *rows, stats, *numbers)
    return {
        "forward_backward": (3, lambda: call("forward_backward", *rows, *numbers)),
        "forward": (2, lambda: call("forward", *rows, *numbers)),
        "backward": (3, lambda: call("backward", *rows, stats, *numbers)),
        "rescale_ by 1 (nothing to do)": (3, lambda: call(*rescale, unchanged, gradient)),
        "rescale_ by 0.3 (made again in 16 bits)": (3, lambda: call(*rescale, changed, gradient)),
        "scale_ by 1 (nothing to do)": (3, lambda: call("scale_", gradient, unchanged)),
    }


def whole_calls(student: Tensor, teacher: Tensor, backend: str) -> Calls:
    """Return forward and backward of KDLoss as a user calls it."""
    labels = torch.arange(len(student), device=student.device) % student.shape[1]
    leaf = student.detach().requires_grad_()

    def call(inplace: bool) -> None:
        logits = Output.apply(leaf)
        loss = KDLoss(temperature=2.0, inplace=inplace, backend=backend)
        torch.autograd.grad(loss(logits, teacher, labels), logits)

    return {"KDLoss": (3, lambda: call(False)), "KDLoss in place": (3, lambda: call(True))}


def _time_heads(session: Session) -> None:
    sizes, chunks = (HEADS, CHUNKS) if session.is_gpu else (TINY_HEADS, FEW_CHUNKS)
    n, v, *hidden = sizes
    problem = HeadsProblem(
        Case(n, v, "bf16", 2.0, DIVERGENCES[0], "heads", *hidden, session.device)
    )
    bound = session.time(f"{problem.case.name}, four products", problem.lower_bound().call)
    for backend, rows in product(session.backends, chunks):
        what = f"{backend}, {rows} rows a chunk"
        if session.skips(what):
            continue
        loss = KDLoss(temperature=2.0, chunk_rows=rows, backend=backend)
        call = problem.call(lambda h, w, t, u, y, loss=loss: loss(Head(h, w), Head(t, u), y))
        if session.is_gpu:
            torch.cuda.reset_peak_memory_stats()
        session.time(what, call, bound)
        if session.is_gpu:
            print(f"peak {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB with the inputs")


def _launch(session: Session) -> None:
    """Launch forward_backward of both sizes twice, then backward of the first."""
    for backend in session.backends:
        first, second = (
            operators(*(_logits(session, *size) for _ in range(2)), backend, DIVERGENCES[0])
            for size in (SIZES if session.is_gpu else TINY)[:2]
        )
        for _, call in (first["forward_backward"], second["forward_backward"], first["backward"]):
            call()  # without the limit of a call: a profiler repeats it


if __name__ == "__main__":
    sys.exit(main())
