"""``python -m benchmarks.gpu_times operators|launch``: where the time of a call goes.

operators: each operator over the time of a copy. The lower bound is its traffic in (N, V) matrices
at the bandwidth of a copy, timed first: three for a gradient (two reads, one write), two for a
forward alone. An operator that has nothing to do is compared with the three that it does not move.
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

from fused_kd import KDLoss
from fused_kd.divergences import CODES, DIVERGENCES
from fused_kd.options import KDOptions, temperature_tensor

from .cases import Case
from .gpu_session import Session
from .problems import LogitsProblem

#: What is measured, in this order: a row of 50257 entries begins at any address.
BF16 = [("bf16", v) for v in (151_936, 32_000, 262_144, 50_257, 128_256)]
SIZES = [BF16[0], ("fp32", 151_936), *BF16[1:3], ("fp32", 262_144), *BF16[3:]]
ROWS, TINY, FEW_ROWS = 8192, [("bf16", 33), ("fp32", 33)], 5

Calls = dict[str, tuple[int, Callable[[], object]]]  # by name: matrices that it has to move, call


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the measurement; return 1 if a call failed."""
    parser = argparse.ArgumentParser("gpu_times", description=__doc__)
    parser.add_argument("what", choices=("operators", "launch"))
    what, session = parser.parse_args(arguments).what, Session()
    sizes, rows = (SIZES, ROWS) if session.is_gpu else (TINY, FEW_ROWS)
    cases = [Case(rows, v, dtype, device=session.device) for dtype, v in sizes]
    for backend in session.backends:
        if what == "launch":
            _launch(backend, *cases[:2])
            continue
        for case, divergences in zip(cases, [DIVERGENCES, *[DIVERGENCES[:1]] * len(cases)]):
            if not session.skips(f"{backend} {case.name}"):
                _time(session, backend, case, divergences)
    return session.status


def _time(session: Session, backend: str, case: Case, divergences: Sequence[str]) -> None:
    """Measure all operators with the first divergence, one with the others, and whole calls."""
    problem = session.call(case.name, partial(LogitsProblem, case))
    if problem is None:  # the memory did not suffice
        return
    copy = session.time(f"{case.name} copy of a matrix", problem.lower_bound().call)
    if copy is None:
        return
    student, teacher, _ = problem.arguments()
    print(f"{2 * student.nbytes / copy / 1e12:.3f} TB/s")
    problem.restore()
    loss = partial(KDLoss, temperature=case.temperature, backend=backend)
    calls: Calls = {
        "KDLoss": (3, problem.call(loss())),
        "KDLoss in place": (3, problem.call(loss(inplace=True))),
    }
    for divergence in divergences:
        build = partial(operators, student, teacher, backend, divergence)
        for name, call in (session.call(divergence, build) or {}).items():
            if name == "forward_backward" or divergence == divergences[0]:
                calls[f"{divergence} {name}"] = call
    for name, (matrices, call) in calls.items():
        what = f"{backend} {case.name} {name}"
        if not session.skips(what):
            session.time(what, call, matrices / 2 * copy, problem.restore)


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


def _launch(backend: str, *cases: Case) -> None:
    """Launch forward_backward of both sizes twice, then backward of the first."""
    sides = [LogitsProblem(case).arguments()[:2] for case in cases]
    first, second = (operators(*pair, backend, DIVERGENCES[0]) for pair in sides)
    for _, call in (first["forward_backward"], second["forward_backward"], first["backward"]):
        call()  # without the limit of a call: a profiler repeats it


if __name__ == "__main__":
    sys.exit(main())
