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

import torch
from torch import Tensor

from fused_kd import Head, KDLoss
from fused_kd.divergences import CODES, DIVERGENCES
from fused_kd.options import KDOptions, temperature_tensor
from fused_kd.testing import DTYPES

from .gpu_session import Output, Session

#: What is measured, in this order: a row of 50257 entries begins at any address.
BF16 = [("bf16", v) for v in (151_936, 32_000, 262_144, 50_257, 128_256)]
SIZES = [BF16[0], ("fp32", 151_936), *BF16[1:3], ("fp32", 262_144), *BF16[3:]]
ROWS, TINY, FEW_ROWS = 8192, [("bf16", 33), ("fp32", 33)], 5
#: Rows, vocabulary, hidden sizes of student and teacher; rows of a chunk.
HEADS, CHUNKS = (8192, 151_936, 2048, 4096), (2048, 4096, 8192)
TINY_HEADS, FEW_CHUNKS = (5, 33, 8, 12), (2, 5)

Calls = dict[str, tuple[int, Callable[[], object]]]  # by name: matrices that it has to move, call


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; return 1 if a call failed."""
    parser = argparse.ArgumentParser("gpu_times", description=__doc__)
    parser.add_argument("what", choices=("operators", "heads", "launch"))
    what, session = parser.parse_args(arguments).what, Session()
    sizes, rows = (SIZES, ROWS) if session.is_gpu else (TINY, FEW_ROWS)
    if what == "heads":
        _time_heads(session)
        return 1 if session.failed else 0
    for backend in session.backends:
        if what == "launch":
            _launch(backend, [_logits(session, rows, *size) for size in sizes[:2]])
            continue
        for i, (dtype, v) in enumerate(sizes):
            size, divergences = f"{dtype} V={v}", DIVERGENCES if i == 0 else DIVERGENCES[:1]
            if session.skips(f"{backend} {size}"):
                break
            sides = session.call(size, lambda dtype=dtype, v=v: _logits(session, rows, dtype, v))
            if sides is not None:  # else the memory did not suffice
                _time_operators(session, backend, size, sides, divergences)
    return 1 if session.failed else 0


def _normal(session: Session, dtype: str, *shape: int, std: float = 2.0) -> Tensor:
    return torch.empty(shape, dtype=DTYPES[dtype], device=session.device).normal_(std=std)


def _logits(session: Session, rows: int, dtype: str, v: int) -> tuple[Tensor, Tensor]:
    return _normal(session, dtype, rows, v), _normal(session, dtype, rows, v)


def _time_operators(
    session: Session,
    backend: str,
    size: str,
    sides: tuple[Tensor, Tensor],
    divergences: Sequence[str],
) -> None:
    """Measure all operators with the first divergence, forward_backward with the others."""
    student, teacher = sides
    original = student.clone()
    copy = session.time(f"{size} copy of a matrix", lambda: student.copy_(teacher))
    if copy is None:
        return
    print(f"{2 * original.nbytes / copy / 1e12:.3f} TB/s")
    student.copy_(original)
    calls = whole_calls(student, teacher, backend)
    for name in divergences:
        of = session.call(name, lambda name=name: operators(student, teacher, backend, name))
        kept = of if name == divergences[0] else {"forward_backward"}
        calls |= {f"{name} {key}": of[key] for key in kept} if of else {}
    for name, (matrices, call) in calls.items():
        if session.skips(f"{backend} {size} {name}"):
            return
        restore = (lambda: student.copy_(original)) if "in place" in name else (lambda: None)
        session.time(f"{backend} {size} {name}", call, matrices / 2 * copy, restore)


def operators(student: Tensor, teacher: Tensor, backend: str, divergence: str) -> Calls:
    """Return calls of the operators of a backend on logits (N, V)."""
    n, v = student.shape
    labels = torch.arange(n, device=student.device) % v
    weight = torch.full((n,), 0.5 / n, device=student.device)
    rows = (student[None], teacher[None], labels, weight, weight)
    temperature = temperature_tensor(KDOptions(temperature=2.0))
    beta, scale_t2, label_smoothing = 0.5, True, 0.0
    numbers = (CODES[divergence], temperature, beta, scale_t2, label_smoothing)
    one, other = (torch.tensor(x, device=student.device) for x in (1.0, 0.3))

    def call(name: str, *arguments: object) -> tuple[Tensor, ...]:
        full = f"triton_{name}" if backend == "triton" else name
        return getattr(torch.ops.fused_kd, full).default(*arguments)

    _, _, stats, gradient = call("forward_backward", *rows, *numbers)
    rescale = ("rescale_", *rows, stats, *numbers)
    return {
        "forward_backward": (3, lambda: call("forward_backward", *rows, *numbers)),
        "forward": (2, lambda: call("forward", *rows, *numbers)),
        "backward": (3, lambda: call("backward", *rows, stats, *numbers)),
        "rescale_ by 1 (nothing to do)": (3, lambda: call(*rescale, one, gradient)),
        "rescale_ by 0.3 (made again in 16 bits)": (3, lambda: call(*rescale, other, gradient)),
        "scale_ by 1 (nothing to do)": (3, lambda: call("scale_", gradient, one)),
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
    n, v, student, teacher = sizes
    hidden, teacher_hidden = (_normal(session, "bf16", n, h, std=1) for h in (student, teacher))
    weight, head = (_normal(session, "bf16", v, h, std=2 / h**0.5) for h in (student, teacher))
    labels = torch.arange(n, device=session.device) % v

    def products() -> None:
        logits = hidden @ weight.t()  # and in place of their gradient, which has its shape
        torch.mm(teacher_hidden, head.t())
        torch.mm(logits, weight)
        torch.mm(logits.t(), hidden)

    bound = session.time(f"bf16 N, V, H, H' = {sizes}, four products", products)
    leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    for backend in session.backends:
        for rows in chunks:
            what = f"{backend}, {rows} rows a chunk"
            if session.skips(what):
                return
            loss = KDLoss(temperature=2.0, chunk_rows=rows, backend=backend)

            def call(loss: KDLoss = loss) -> None:
                value = loss(Head(*leaves), Head(teacher_hidden, head), labels)
                torch.autograd.grad(value, leaves)

            if session.is_gpu:
                torch.cuda.reset_peak_memory_stats()
            session.time(what, call, bound)
            if session.is_gpu:
                print(f"peak {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB with the inputs")


def _launch(backend: str, logits: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Launch forward_backward of both sizes twice, then backward of the first."""
    first, second = (operators(*sides, backend, DIVERGENCES[0]) for sides in logits)
    for _, call in (first["forward_backward"], second["forward_backward"], first["backward"]):
        call()  # without the limit of a call: a profiler repeats it


if __name__ == "__main__":
    sys.exit(main())
