"""``python -m benchmarks.gpu_times operators|launch``: time operators, or launch some to profile.

operators: prints each call's time and its ratio to a lower bound, the traffic in (N, V) matrices at
the bandwidth of a copy: three for a gradient (two reads, one write), two for a forward alone. An
operator that has nothing to do is compared with the three that it does not move.
launch: launches four kernels of each backend for a profiler; measures nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial

import torch
from torch import Tensor

from fused_kd import KDLoss
from fused_kd.divergences import CODES, DIVERGENCES
from fused_kd.options import KDOptions, temperature_tensor

from .cases import Case
from .measuring import clock
from .methods import one_line
from .problems import LogitsProblem

#: Dtypes and vocabularies, in the order of measuring; rows of 50257 entries are not aligned.
BF16 = [("bf16", v) for v in (151_936, 32_000, 262_144, 50_257, 128_256)]
SIZES = [BF16[0], ("fp32", 151_936), *BF16[1:3], ("fp32", 262_144), *BF16[3:]]
ROWS, TINY, FEW_ROWS = 8192, [("bf16", 33), ("fp32", 33)], 5
#: Calls that count, after those that compile and allocate.
REPEATS, WARM_UP = 10, 2
COPY, BOTH = "copy of a matrix", "forward_backward"

Calls = dict[str, tuple[int, Callable[[], object]]]  # by name: matrices moved, call


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure on GPU_CHECK_DEVICE with GPU_CHECK_BACKENDS; return 1 if a call failed, else 0."""
    parser = argparse.ArgumentParser("gpu_times", description=__doc__)
    parser.add_argument("what", choices=("operators", "launch"))
    what, read = parser.parse_args(arguments).what, os.environ.get
    device, backends = read("GPU_CHECK_DEVICE", "cuda"), read("GPU_CHECK_BACKENDS", "cuda triton")
    is_gpu, succeeded = device == "cuda", []
    rows, sizes = (ROWS, SIZES) if is_gpu else (FEW_ROWS, TINY)
    cases = [Case(rows, v, dtype, device=device) for dtype, v in sizes]
    for backend in backends.split() if is_gpu else ["cpu"]:
        if what == "launch":  # forward_backward at two sizes; at the first again, and backward
            sides = [LogitsProblem(case).arguments()[:2] for case in cases[:2]]
            first, second = (operators(*pair, backend, DIVERGENCES[0]) for pair in sides)
            for calls, name in ((first, BOTH), (second, BOTH), (first, "backward")):
                calls[name][1]()
            continue
        for case in cases:
            succeeded += _time(backend, case, DIVERGENCES if case == cases[0] else DIVERGENCES[:1])
    return 0 if all(succeeded) else 1


def _time(backend: str, case: Case, divergences: Sequence[str]) -> Iterator[bool]:
    """Print each call's time, ratio to the lower bound, and bandwidth; yield whether it succeeded.

    Calls: a copy, KDLoss, and all operators; of later divergences forward_backward alone.
    """
    size = f"{backend} {case.dtype} V={case.v}"
    try:
        problem = LogitsProblem(case)
    except torch.OutOfMemoryError:
        print(f"LEFT OUT {size}: the memory does not suffice")
        return
    student, teacher, _ = problem.arguments()
    loss = partial(KDLoss, temperature=case.temperature, backend=backend)
    calls: Calls = {
        COPY: (2, problem.lower_bound().call),
        "KDLoss": (3, problem.call(loss())),
        "KDLoss in place": (3, problem.call(loss(inplace=True))),
    }
    for divergence in divergences:
        for name, call in operators(student, teacher, backend, divergence).items():
            if name == BOTH or divergence == divergences[0]:
                calls[f"{divergence} {name}"] = call

    def once(call: Callable[[], object]) -> float:
        problem.restore()
        return clock(call, case.device)

    seconds = {}
    for name, (matrices, call) in calls.items():
        if time.time() > float(os.environ.get("GPU_CHECK_UNTIL", "inf")):
            print(f"LEFT OUT {size} {name}: the time is up", flush=True)
            continue
        try:
            times = [once(call) for _ in range(WARM_UP + REPEATS)]
            seconds[name] = statistics.median(times[WARM_UP:])
            bound = matrices / 2 * seconds[COPY]
        except Exception as error:
            print(f"FAILED {size} {name}: {one_line(error)}", flush=True)
            yield False
            continue
        what, speed = f"{size} {name}", matrices * student.nbytes / seconds[name] / 1e12
        ratio = f"{1e3 * seconds[name]:10.5f} ms {seconds[name] / bound:8.3f} x bound"
        print(f"{what:<60} {ratio} {speed:6.3f} TB/s", flush=True)
        yield True


def operators(student: Tensor, teacher: Tensor, backend: str, divergence: str) -> Calls:
    """Return calls of a backend's operators on logits (N, V), which they do not overwrite."""
    n, v = student.shape
    labels = torch.arange(n, device=student.device) % v
    weight = torch.full((n,), 0.5 / n, device=student.device)
    rows = (student[None], teacher[None], None, labels, weight, weight)  # None: token_ids
    temperature = temperature_tensor(KDOptions(temperature=2.0))
    numbers = (CODES[divergence], temperature, 0.5, True, 0.0)  # beta, scale_t2, label_smoothing
    unchanged, changed = (torch.tensor(x, device=student.device) for x in (1.0, 0.3))

    def call(name: str, *arguments: object) -> tuple[Tensor, ...]:
        full = f"triton_{name}" if backend == "triton" else name
        return getattr(torch.ops.fused_kd, full).default(*arguments)

    @cache
    def made() -> tuple[Tensor, ...]:  # statistics and gradient
        return call(BOTH, *rows, *numbers)[2:]

    def rescale(factor: Tensor) -> tuple[Tensor, ...]:
        return call("rescale_", *rows, made()[0], *numbers, factor, made()[1])

    return {
        BOTH: (3, lambda: call(BOTH, *rows, *numbers)),
        "forward": (2, lambda: call("forward", *rows, *numbers)),
        "backward": (3, lambda: call("backward", *rows, made()[0], *numbers)),
        "rescale_ by 1 (nothing to do)": (3, lambda: rescale(unchanged)),
        "rescale_ by 0.3 (made again in 16 bits)": (3, lambda: rescale(changed)),
        "scale_ by 1 (nothing to do)": (3, lambda: call("scale_", made()[1], unchanged)),
    }


if __name__ == "__main__":
    sys.exit(main())
