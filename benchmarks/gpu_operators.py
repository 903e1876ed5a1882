"""``python -m benchmarks.gpu_operators``: what each operator takes by itself, over a copy's time.

The floor of an operator is its traffic in (N, V) matrices at the bandwidth of a copy, timed first:
three for a gradient (two reads, one write), two for a forward alone. An operator that has nothing
to do is compared with the three that it does not move. ``--launch`` calls three kernels once and
measures nothing: for a profiler.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_kd import KDLoss
from fused_kd.divergences import CODES, DIVERGENCES
from fused_kd.options import KDOptions, temperature_tensor

from .cases import Case
from .device import Budget, release, room
from .gpu_options import make_parser, parse, usable
from .gpu_timing import Times
from .problems import LogitsProblem

#: What is measured, in this order: a row of 50257 entries begins at any address.
SIZES = [("bf16", 151_936), ("fp32", 151_936), ("bf16", 32_000), ("bf16", 262_144),
         ("fp32", 262_144), ("bf16", 50_257), ("bf16", 128_256)]  # fmt: skip
ROWS = 8192
TINY, FEW_ROWS = [("bf16", 33), ("fp32", 33)], 5
#: Matrices that the operators hold besides a problem's three.
MORE_MATRICES = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every size; return 1 if a call failed."""
    parser = make_parser("gpu_operators", __doc__, writes=True)
    parser.add_argument("--launch", action="store_true", help="call three kernels, measure nothing")
    options = parse(parser, arguments)
    names = usable(options)
    if options.launch:
        for backend in names:
            _launch(backend, options.device)
        return 0
    budget = Budget(options.seconds)
    with options.output.open("w") as file:
        times = Times(options.device, file)
        for case in _cases(options.device):
            if not budget.allows(0):
                print(f"LEFT OUT {case.name}: the time is up", flush=True)
            elif case.input_bytes + MORE_MATRICES * case.matrix_bytes > room(case.device):
                print(f"LEFT OUT {case.name}: the memory does not suffice", flush=True)
            else:
                _measure(case, names, times, budget)
                release(case.device)
    return 1 if times.guard.failed else 0


def _cases(device: str) -> list[Case]:
    sizes, rows = (SIZES, ROWS) if device == "cuda" else (TINY, FEW_ROWS)
    return [Case(rows, v, dtype, device=device) for dtype, v in sizes]


def _measure(case: Case, names: Sequence[str], times: Times, budget: Budget) -> None:
    problem = LogitsProblem(case)
    group = f"{case.dtype} V={case.v}"
    copy = times.measure(f"{group} copy", problem.floor())
    if copy is None:
        return
    rate = f"{2 * case.matrix_bytes / copy / 1e12:.3f}"
    times.show("copy of a matrix", copy, None, group=group, terabytes_per_second=rate)
    problem.restore()
    for backend in names:
        where = f"{backend} {group}"
        for what, matrices, call, restore in _calls(problem, backend):
            if budget.allows(0):
                seconds = times.measure(f"{where} {what}", call, restore)
                times.show(what, seconds, matrices / 2 * copy, group=where)
        if case != _cases(case.device)[0]:
            continue
        for divergence in DIVERGENCES[1:]:
            what = f"forward_backward, {divergence}"
            call = Operators(problem, backend, divergence).forward_backward
            if budget.allows(0):
                times.show(what, times.measure(f"{where} {what}", call), 1.5 * copy, group=where)


Call = tuple[str, int, Callable[[], object], Callable[[], object] | None]


def _calls(problem: LogitsProblem, backend: str) -> list[Call]:
    """Return what to measure: name, matrices that it has to move, call, restore."""
    operators = Operators(problem, backend, DIVERGENCES[0])
    keywords: dict[str, Any] = {"temperature": 2.0, "backend": backend}
    whole, over = (KDLoss(inplace=inplace, **keywords) for inplace in (False, True))
    return [
        ("forward_backward", 3, operators.forward_backward, None),
        ("forward", 2, operators.forward, None),
        ("backward", 3, operators.backward, None),
        ("rescale_ by 1 (nothing to do)", 3, lambda: operators.rescale(1.0), None),
        ("rescale_ by 0.3 (made again in 16 bits)", 3, lambda: operators.rescale(0.3), None),
        ("scale_ by 1 (nothing to do)", 3, lambda: operators.scale(1.0), None),
        ("KDLoss, forward and backward", 3, problem.call(_loss(whole)), None),
        ("KDLoss in place, forward and backward", 3, problem.call(_loss(over)), problem.restore),
    ]


def _loss(module: KDLoss) -> Callable[..., Tensor]:
    def loss(*tensors: Tensor) -> Tensor:
        value = module(*tensors)
        assert isinstance(value, Tensor)
        return value

    return loss


class Operators:
    """The operators of one backend on the tensors of a problem."""

    def __init__(self, problem: LogitsProblem, backend: str, divergence: str) -> None:
        self._prefix = "triton_" if backend == "triton" else ""
        student, teacher, labels = problem.buffers
        weight = torch.full(labels.shape, 0.5 / len(labels), device=student.device)
        self._rows = (student[None], teacher[None], labels, weight, weight)
        options = KDOptions(divergence=divergence, temperature=2.0)
        self._numbers = (CODES[divergence], temperature_tensor(options), options.beta,
                         options.soft_scale == "t2", options.label_smoothing)  # fmt: skip
        self._made: tuple[Tensor, Tensor] | None = None
        self._factors = {x: torch.tensor(x, device=student.device) for x in (1.0, 0.3)}

    def _call(self, name: str, *arguments: Any) -> Any:
        return getattr(torch.ops.fused_kd, self._prefix + name).default(*arguments)

    def _stats_and_gradient(self) -> tuple[Tensor, Tensor]:
        """Those of forward_backward, made once."""
        if self._made is None:
            _, _, stats, gradient = self.forward_backward()
            self._made = stats, gradient
        return self._made

    def forward(self) -> Any:
        return self._call("forward", *self._rows, *self._numbers)

    def forward_backward(self) -> Any:
        return self._call("forward_backward", *self._rows, *self._numbers)

    def backward(self) -> Any:
        stats, _ = self._stats_and_gradient()
        return self._call("backward", *self._rows, stats, *self._numbers)

    def rescale(self, factor: float) -> None:
        stats, gradient = self._stats_and_gradient()
        scale = self._factors[factor]
        self._call("rescale_", *self._rows, stats, *self._numbers, scale, gradient)

    def scale(self, factor: float) -> None:
        _, gradient = self._stats_and_gradient()
        self._call("scale_", gradient, self._factors[factor])


def _launch(backend: str, device: str) -> None:
    """Call three kernels under a profiler that was told to wait for it."""
    problems = [LogitsProblem(case) for case in _cases(device)[:2]]
    ready = [Operators(problem, backend, DIVERGENCES[0]) for problem in problems]
    calls = [ready[0].forward_backward, ready[1].forward_backward, ready[0].backward]
    for call in calls:
        call()  # compiles, loads, allocates
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
    for call in calls:
        call()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()
    print(f"{backend}: {len(calls)} calls", flush=True)


if __name__ == "__main__":
    sys.exit(main())
