"""``python -m benchmarks.cpu_linear``: LinearKDLoss on a CPU beside its floor and its peers.

Parts, for each dtype: speed (forward + backward, ours, the four bare products on whole matrices,
eager, torch.compile, Liger's chunked JSD), memory (peaks by budget), curve (time by budget), error
(against float64, and whether the height of a chunk matters), growth (with N).
"""

from __future__ import annotations

import os
import sys

# One thread per core, decided before torch starts them (see benchmarks.cpu_logits).
os.environ.setdefault("OMP_PROC_BIND", "spread")

import argparse
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch

from fused_kd.backends import why_not
from fused_kd.testing import cpu_peak

from . import linear_speed, peers
from .cases import DTYPES, EAGER, GROWTH, GROWTH_TOLERANCE
from .linear_cases import (
    OURS,
    LinearCase,
    make_heads,
    ours,
    show_title,
    step,
)
from .linear_errors import error_part
from .linear_speed import Bench
from .measuring import Contestant, Timing, interleave, ratio
from .report import (
    Parser,
    Progress,
    Results,
    megabytes,
    positive_float,
    positive_int,
    show_environment,
    table,
    verdict,
    writable_file,
)

MIB = 2**20
#: Budgets of the two parts.
MEMORY_BUDGETS, CURVE_BUDGETS = (64, 256, 1024), (64, 128, 256, 512, 1024)
#: Bytes beyond inputs, gradients, accumulator and budget.
MEMORY_SLACK = 8 * MIB
#: The growth with N is measured on this share of the vocabulary.
GROWTH_SHARE = 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is asked for; returns the exit status."""
    options = _parse(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with Results(options.json) as results:
        what = "fused_kd from hidden states on a CPU: forward + backward of the public call"
        show_environment(what, "as many as fit, interleaved; median [quartiles]", results)
        why = peers.liger_linear_why_not()
        if why is not None:
            print(f"LEFT OUT {why}")
        curves = {dtype: _run_dtype(dtype, options, results) for dtype in options.dtypes}
    if options.plot is not None:
        _draw(curves, options)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m benchmarks.cpu_linear", description=__doc__)
    add = parser.add_argument
    add("--part", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART",
        help=f"of {' '.join(PARTS)} (default: all)")  # fmt: skip
    add("--n", nargs="+", type=positive_int, default=[512, 2048], help="rows (default: 512 2048)")
    add("--v", type=positive_int, default=128256, help="vocabulary (default: %(default)s)")
    add("--hidden", nargs=2, type=positive_int, default=[1024, 2048], metavar=("H_s", "H_t"),
        help="hidden sizes of student and teacher (default: 1024 2048)")  # fmt: skip
    add("--temperature", type=positive_float, default=2.0, help="default: %(default)s")
    add("--dtypes", nargs="+", choices=list(DTYPES), default=["fp32", "bf16"], metavar="DTYPE",
        help="of bf16 fp32 fp16 (default: fp32 bf16)")  # fmt: skip
    add("--skip", nargs="+", choices=("eager", "compile", "liger"), default=[], metavar="PEER",
        help="eager, compile, liger: leave these out")  # fmt: skip
    add("--limit-seconds", type=positive_float, default=120.0, metavar="S",
        help="of a call; slower ones are extrapolated (default: %(default)g)")  # fmt: skip
    add("--repeats", type=positive_int, help="of every contestant (default: by its time)")
    add("--threads", type=positive_int, help="default: torch's choice")
    add("--json", type=writable_file, metavar="FILE", help="results as JSON lines")
    add("--plot", type=writable_file, metavar="FILE", help="a picture of the curve")
    options = parser.parse_args(arguments)
    reason = why_not("cpu", "cpu")
    if reason is not None:
        parser.error(f"the cpu backend cannot run: {reason}")
    return options


def _run_dtype(dtype: str, options: argparse.Namespace, results: Results) -> dict[int, float]:
    """The curve's seconds by budget in MiB, if that part is run."""
    student, teacher = options.hidden
    rows, temperature = max(options.n), options.temperature
    case = LinearCase(rows, options.v, student, teacher, dtype, temperature)
    bench = Bench(case, options.limit_seconds)
    curve: dict[int, float] = {}
    for name, part in PARTS.items():
        if name in options.part:
            curve = part(bench, options, results) or curve
    return curve


def _speed(bench: Bench, options: argparse.Namespace, results: Results) -> None:
    for rows in options.n:
        show_title("speed", bench.case.with_(n=rows))
        linear_speed.run(bench, rows, options.skip, options.repeats, results)


# ------------------------------------------------------------------------------------ budgets


def _memory(bench: Bench, options: argparse.Namespace, results: Results) -> None:
    case = bench.case.with_(n=min(options.n))
    show_title("memory", case)
    lines = []
    for budget in MEMORY_BUDGETS:
        try:
            loss = ours(case, memory_budget=budget * MIB)
            peak = cpu_peak(step(loss, bench.heads.first(case.n))).highest
        except ValueError as error:  # it does not hold a row
            print(f"LEFT OUT {budget} MiB: {error}")
            continue
        limit = budget * MIB + MEMORY_SLACK
        name = f"{OURS}, {budget} MiB"
        lines.append(_peak(name, case, peak, case.accumulator_bytes, limit, results))
    slow = [e for e in linear_speed.entries(case, options.skip)
            if e.name in (EAGER, peers.LIGER_LINEAR)]  # fmt: skip
    for entry in slow:
        in_time = bench.predict(entry, case.n) <= bench.limit
        rows = case.n if in_time else bench.probed(entry)[0][0]
        peak = cpu_peak(entry.prepare(bench.heads.first(rows))).highest
        fewer = "" if rows == case.n else f", N = {rows} alone"
        lines.append(_peak(entry.name + fewer, case.with_(n=rows), peak, 0, None, results))
    head = ["allocator's peak", "beyond the inputs", "gradients", "accumulator", "the rest",
            "goal", ""]  # fmt: skip
    print(table(head, lines), flush=True)


def _peak(
    name: str, case: LinearCase, peak: int, accumulator: int, limit: int | None, results: Results
) -> list[str]:
    rest = peak - case.gradient_bytes - accumulator
    reached = None if limit is None else rest <= limit
    results.write("memory", section="memory", **case.sizes(), name=name, allocator_peak=peak,
                  gradients=case.gradient_bytes, accumulator=accumulator, rest=rest, limit=limit,
                  reached=reached)  # fmt: skip
    goal = ["", ""] if limit is None else [f"≤ {megabytes(limit)}", verdict(bool(reached))]
    counts = (peak, case.gradient_bytes, accumulator, rest)
    return [name, *(megabytes(count) for count in counts), *goal]


def _curve(bench: Bench, options: argparse.Namespace, results: Results) -> dict[int, float]:
    case = bench.case.with_(n=min(options.n))
    show_title("curve", case)
    heads = bench.heads.first(case.n)
    ready = [Contestant(str(budget), step(ours(case, memory_budget=budget * MIB), heads))
             for budget in CURVE_BUDGETS]  # fmt: skip
    timings = _timed(ready, options.repeats or 1, case)
    base = min(timing.median for timing in timings.values())
    lines = []
    for name, timing in timings.items():
        over = ratio(timing, base)
        lines.append([name, *timing.cells(1.0, 2), f"{over:.3f}"])
        results.write("time", section="curve", **case.sizes(), name=f"{name} MiB",
                      over_fastest=over, **timing.as_dict())  # fmt: skip
    print(table(["budget, MiB", "s", "[quartiles]", "/ fastest"], lines), flush=True)
    return {int(name): timing.median for name, timing in timings.items()}


def _timed(ready: list[Contestant], repeats: int, case: LinearCase) -> dict[str, Timing]:
    """Calls of seconds: without a warm-up, and none is made again."""
    with Progress(case.dtype, (1 + repeats) * len(ready)) as progress:
        return interleave(ready, repeats, progress.advance, warm_up=0, patience=0)


def _draw(curves: dict[str, dict[int, float]], options: argparse.Namespace) -> None:
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        print(f"LEFT OUT the picture: {error}")
        return
    figure, axis = plt.subplots(figsize=(6, 4))
    for dtype, curve in curves.items():
        axis.plot(list(curve), list(curve.values()), "o-", label=dtype)
    axis.set_xscale("log", base=2)
    axis.set_xticks(CURVE_BUDGETS, [str(budget) for budget in CURVE_BUDGETS])
    axis.set_ylim(bottom=0)
    axis.set_xlabel("memory budget, MiB")
    axis.set_ylabel("seconds, forward + backward")
    axis.set_title(f"LinearKDLoss, N = {min(options.n)}, V = {options.v}")
    axis.legend()
    figure.tight_layout()
    figure.savefig(options.plot, dpi=120)
    plt.close(figure)


def _growth(bench: Bench, options: argparse.Namespace, results: Results) -> None:
    base = bench.case.with_(n=min(options.n), v=max(1, bench.case.v // GROWTH_SHARE))
    show_title("growth", base)
    sizes = [base.n, 2 * base.n, 4 * base.n]
    heads = make_heads(base.with_(n=sizes[-1]))
    ready = [Contestant(str(n), step(ours(base), heads.first(n))) for n in sizes]
    timings = _timed(ready, options.repeats or 2, base)
    lines = []
    for small, large in pairwise(timings.values()):
        what, value = f"{small.name} → {large.name}", ratio(large, small)
        reached = abs(value - GROWTH) <= GROWTH_TOLERANCE
        lines.append([what, *small.cells(1.0, 2), *large.cells(1.0, 2), f"{value:.2f}",
                      f"{GROWTH:.1f} ± {GROWTH_TOLERANCE:.1f}", verdict(reached)])  # fmt: skip
        results.write("ratio", section="growth", **base.sizes(), name=what, value=value,
                      limit=GROWTH, tolerance=GROWTH_TOLERANCE, reached=reached)  # fmt: skip
    head = ["N", "s", "[quartiles]", "s", "[quartiles]", "ratio", "goal", ""]
    print(table(head, lines), flush=True)


PARTS: dict[str, Callable[[Bench, argparse.Namespace, Results], Any]] = {
    "speed": _speed,
    "memory": _memory,
    "curve": _curve,
    "error": error_part,
    "growth": _growth,
}


if __name__ == "__main__":
    sys.exit(main())
