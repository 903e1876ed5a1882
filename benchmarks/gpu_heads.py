"""``python -m benchmarks.gpu_heads``: the loss of heads by rows of a chunk, over four products.

The floor is the four products of whole matrices in the same dtype, timed first.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fused_kd.options import MIB

from .cases import HEADS, Case
from .device import Budget, peak_bytes, room
from .entrants.ours import with_heads
from .gpu_options import make_parser, parse, usable
from .gpu_timing import Times
from .problems import HeadsProblem

SIZE, TINY = (8192, 151_936, 2048, 4096), (5, 33, 8, 12)
CHUNK_ROWS, FEW_ROWS = (2048, 4096, 8192), (2, 5)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure each height of a chunk; return 1 if a call failed."""
    options = parse(make_parser("gpu_heads", __doc__, writes=True), arguments)
    is_real, budget = options.device == "cuda", Budget(options.seconds)
    n, v, student, teacher = SIZE if is_real else TINY
    case = Case(n, v, "bf16", level=HEADS, student_hidden=student, teacher_hidden=teacher,
                device=options.device)  # fmt: skip
    if case.input_bytes > room(case.device):
        print(f"LEFT OUT {case.name}: the memory does not suffice", flush=True)
        return 0
    with options.output.open("w") as file:
        times = Times(options.device, file)
        problem = HeadsProblem(case)
        group = f"{case.dtype} V={v} H={student}/{teacher}"
        floor = times.measure("four products", problem.floor())
        rate = None if floor is None else f"{case.flops / floor / 1e12:.1f}"
        times.show("four products", floor, None, group=group, teraflops=rate)
        for backend in usable(options):
            for rows in CHUNK_ROWS if is_real else FEW_ROWS:
                if not budget.allows(0):
                    print(f"LEFT OUT {backend}, {rows} rows a chunk: the time is up", flush=True)
                    continue
                _measure(problem, backend, rows, floor, times)
    return 1 if times.guard.failed else 0


def _measure(
    problem: HeadsProblem, backend: str, rows: int, floor: float | None, times: Times
) -> None:
    loss = with_heads(problem.case, chunk_rows=rows, backend=backend)
    call, what = problem.call(loss), f"{backend}, {rows} rows a chunk"
    seconds = times.measure(what, call)
    peak = times.guard(f"{what}, memory", lambda: peak_bytes(call, times.device))
    about = {} if peak is None else {"peak_mib": round(peak / MIB)}
    times.show(what, seconds, floor, **about)


if __name__ == "__main__":
    sys.exit(main())
