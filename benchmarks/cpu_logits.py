"""``python -m benchmarks.cpu_logits``: KDLoss on CPU logits against eager, compiled, and a copy.

All in one run for each dtype: forward and backward of the whole public call, in place and out of
place, and the forward alone; every divergence at several temperatures; growth with N and V; peak
memory beyond the inputs. Beside each ratio stands its goal.
"""

from __future__ import annotations

import os
import sys

# One thread per core, decided before torch starts them: left alone, Linux was seen to keep both of
# two threads on one core for a whole run.
os.environ.setdefault("OMP_PROC_BIND", "spread")

import argparse
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch

from fused_kd.backends import why_not
from fused_kd.options import DIVERGENCES
from fused_kd.testing import cpu_peak

from . import cases
from .cases import (
    COMPILED,
    COPY,
    DTYPES,
    EAGER,
    FORWARD,
    GOALS,
    IN_PLACE,
    OUT_OF_PLACE,
    Bench,
    Case,
)
from .measuring import Contestant, Timing, interleave, process_peak, ratio
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

SECTIONS = ("main", "divergences", "growth", "memory")
HEADING = "fused_kd on CPU logits: forward + backward of the public call, unless it says otherwise"
#: The slow contestants take this share of the repeats.
SLOW_SHARE = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is asked for; returns the exit status."""
    options = _parse(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with Results(options.json) as results:
        repeats = f"{options.repeats}, interleaved; median [quartiles]"
        show_environment(HEADING, repeats, results)
        for dtype in options.dtypes:
            _run_dtype(Case(options.n, options.v, dtype, options.temperature), options, results)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m benchmarks.cpu_logits", description=__doc__)
    add = parser.add_argument
    add("--n", type=positive_int, default=512, help="rows (default: %(default)s)")
    add("--v", type=positive_int, default=128256, help="vocabulary (default: %(default)s)")
    add("--temperature", type=positive_float, default=2.0, help="default: %(default)s")
    add("--dtypes", nargs="+", choices=list(DTYPES), default=["bf16", "fp32"], metavar="DTYPE",
        help="of bf16 fp32 fp16 (default: bf16 fp32)")  # fmt: skip
    add("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION",
        help=f"of {' '.join(SECTIONS)} (default: all)")  # fmt: skip
    add("--skip", nargs="+", choices=("eager", "compile"), default=[], metavar="PEER",
        help="eager, compile: leave these out")  # fmt: skip
    add("--repeats", type=positive_int, help="of the fast contestants (default: 21, quick: 7)")
    add("--threads", type=positive_int, help="default: torch's choice")
    add("--json", type=writable_file, metavar="FILE", help="results as JSON lines")
    add("--quick", action="store_true", help="fewer repeats, one temperature, no growth")
    options = parser.parse_args(arguments)
    reason = why_not("cpu", "cpu")
    if reason is not None:
        parser.error(f"the cpu backend cannot run: {reason}")
    options.repeats = options.repeats or (7 if options.quick else 21)
    if options.quick:
        options.sections = [s for s in options.sections if s != "growth"]
    return options


def _run_dtype(case: Case, options: argparse.Namespace, results: Results) -> None:
    doubled = 2 if "growth" in options.sections else 1
    bench = Bench(doubled * case.n * case.v, case.dtype, rows=doubled * case.n)
    sections: dict[str, Callable[..., None]] = {
        "main": _main_section,
        "divergences": _divergence_section,
        "growth": _growth_section,
        "memory": _memory_section,
    }
    for name in SECTIONS:
        if name in options.sections:
            title = f"{name}: {case.dtype}, N = {case.n}, V = {case.v}, T = {case.temperature:g}"
            print(f"\n{title}", flush=True)
            sections[name](bench, case, options, results)


def _main_section(bench: Bench, case: Case, options: argparse.Namespace, results: Results) -> None:
    timings = _time(_main_contestants(bench, case, options), options, case.dtype)
    _print_timings(timings, case, results)
    rows = []
    for goal in GOALS:
        if goal.numerator not in timings or goal.denominator not in timings:
            continue
        value = ratio(timings[goal.numerator], timings[goal.denominator]) / goal.factor
        limit, reached = goal.limit[case.dtype], goal.reached(value, case.dtype)
        rows.append([goal.what, f"{value:.2f}", _limit(limit, goal.at_least), verdict(reached)])
        results.write("ratio", section="main", **_sizes(case), name=goal.what, value=value,
                      limit=limit, at_least=goal.at_least, reached=reached)  # fmt: skip
    print("\n" + table(["ratio", "here", "goal", ""], rows), flush=True)


def _main_contestants(
    bench: Bench, case: Case, options: argparse.Namespace
) -> Iterator[Contestant]:
    restore, slow = bench.restore(case), -(-options.repeats // SLOW_SHARE)
    in_place, out_of_place = cases.fused(case, inplace=True), cases.fused(case, inplace=False)
    yield Contestant(IN_PLACE, bench.step(in_place, case), restore)
    yield Contestant(OUT_OF_PLACE, bench.step(out_of_place, case), restore)
    yield Contestant(FORWARD, bench.forward(out_of_place, case), restore)
    yield Contestant(COPY, bench.copy(case), restore)
    if "compile" not in options.skip:
        yield Contestant(COMPILED, bench.step(cases.compiled(case), case), restore, slow)
    if "eager" not in options.skip:
        yield Contestant(EAGER, bench.step(cases.eager(case), case), restore, slow)


def _divergence_section(
    bench: Bench, case: Case, options: argparse.Namespace, results: Results
) -> None:
    base = case.with_(temperature=2.0, divergence="forward_kl")
    temperatures = (case.temperature,) if options.quick else cases.TEMPERATURES
    wanted = [
        case.with_(temperature=t, divergence=name) for name in DIVERGENCES for t in temperatures
    ]
    every = list(dict.fromkeys([base, *wanted]))
    timings = _time(_in_place(bench, every), options, case.dtype)
    rows = []
    for one in every:
        timing, limit = timings[_name(one)], cases.DIVERGENCE_LIMIT[one.divergence]
        value = ratio(timing, timings[_name(base)])
        reached = value <= limit
        rows.append([one.divergence, f"{one.temperature:g}", *timing.cells(),
                     f"{value:.2f}", _limit(limit, False), verdict(reached)])  # fmt: skip
        results.write("time", section="divergences", **_sizes(one), **timing.as_dict(),
                      over_base=value, limit=limit, reached=reached)  # fmt: skip
    head = ["in place", "T", "ms", "[quartiles]", "/ forward_kl T=2", "goal", ""]
    print(table(head, rows), flush=True)


def _growth_section(
    bench: Bench, case: Case, options: argparse.Namespace, results: Results
) -> None:
    sizes = {
        "N": [case.with_(n=max(1, case.n * k // 2)) for k in (1, 2, 4)],
        "V": [case.with_(v=max(1, case.v * k // 2)) for k in (1, 2, 4)],
    }
    every = list(dict.fromkeys(sizes["N"] + sizes["V"]))
    timings = _time(_in_place(bench, every), options, case.dtype)
    rows = []
    for letter, line in sizes.items():
        for small, large in pairwise(line):
            before, after = timings[_name(small)], timings[_name(large)]
            value = ratio(after, before)
            reached = abs(value - cases.GROWTH) <= cases.GROWTH_TOLERANCE
            what = f"{letter} {getattr(small, letter.lower())} → {getattr(large, letter.lower())}"
            goal = f"{cases.GROWTH:.1f} ± {cases.GROWTH_TOLERANCE:.1f}"
            rows.append([what, *before.cells(), *after.cells(),
                         f"{value:.2f}", goal, verdict(reached)])  # fmt: skip
            results.write("ratio", section="growth", **_sizes(large), name=what, value=value,
                          limit=cases.GROWTH, tolerance=cases.GROWTH_TOLERANCE,
                          reached=reached)  # fmt: skip
    print(
        table(["in place", "ms", "[quartiles]", "ms", "[quartiles]", "ratio", "goal", ""], rows),
        flush=True,
    )


def _memory_section(
    bench: Bench, case: Case, options: argparse.Namespace, results: Results
) -> None:
    rows = []
    for name, inplace in ((OUT_OF_PLACE, False), (IN_PLACE, True)):
        call, restore = bench.step(cases.fused(case, inplace), case), bench.restore(case)
        call()
        restore()
        peak = cpu_peak(call).highest
        restore()
        resident = process_peak(call)
        restore()
        gradient = 0 if inplace else case.matrix_bytes
        limit = gradient + cases.MEMORY_SLACK
        rows.append([name, megabytes(peak), megabytes(resident), megabytes(gradient),
                     f"< {megabytes(limit)}", verdict(peak < limit)])  # fmt: skip
        results.write("memory", **_sizes(case), name=name, allocator_peak=peak,
                      process_peak=resident, gradient=gradient, limit=limit,
                      reached=peak < limit)  # fmt: skip
    head = ["beyond the inputs", "allocator's peak", "process's peak", "gradient", "goal", ""]
    print(table(head, rows), flush=True)


def _time(
    contestants: Iterator[Contestant], options: argparse.Namespace, label: str
) -> dict[str, Timing]:
    ready = list(contestants)
    total = sum(1 + (c.repeats or options.repeats) for c in ready)
    with Progress(label, total) as progress:
        return interleave(ready, options.repeats, progress.advance)


def _in_place(bench: Bench, every: Sequence[Case]) -> Iterator[Contestant]:
    for one in every:
        call = bench.step(cases.fused(one, inplace=True), one)
        yield Contestant(_name(one), call, bench.restore(one))


def _name(case: Case) -> str:
    return f"{case.divergence} T={case.temperature:g} {case.n}x{case.v}"


def _print_timings(timings: dict[str, Timing], case: Case, results: Results) -> None:
    rows = []
    for name, timing in timings.items():
        reads_only = name in (FORWARD, COPY)
        moved = case.expected_bytes["forward" if reads_only else "forward_backward"]
        rate = "" if name in (EAGER, COMPILED) else f"{moved / timing.median / 1e9:.1f}"
        rows.append([name, *timing.cells(), rate])
        results.write("time", section="main", **_sizes(case), name=name, least_bytes=moved,
                      **timing.as_dict())  # fmt: skip
    floor = 1.5 * timings[COPY].median
    rows.append(["floor in place: 1.5 copies", f"{1e3 * floor:.1f}", "", ""])
    rows.append(["floor forward only: 1 copy", f"{1e3 * timings[COPY].median:.1f}", "", ""])
    print(table(["", "ms", "[quartiles]", "GB/s (least traffic)"], rows))


def _sizes(case: Case) -> dict[str, Any]:
    return {"n": case.n, "v": case.v, "dtype": case.dtype, "temperature": case.temperature,
            "divergence": case.divergence}  # fmt: skip


def _limit(limit: float, at_least: bool) -> str:
    return f"{'≥' if at_least else '≤'} {limit:g}"


if __name__ == "__main__":
    sys.exit(main())
