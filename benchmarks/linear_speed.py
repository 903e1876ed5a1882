"""Forward and backward of the linear level beside its floor and its peers, on a CPU.

Where a processor has no 16-bit products, torch's may be a hundred times slower than float32: every
contestant is first timed on a few rows, which predicts its time at N. What would exceed the limit
is not run: a straight line through the probes stands for it, and says so. What would not fit into
memory is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from . import peers
from .cases import COMPILED, EAGER
from .linear_cases import (
    OURS,
    PRODUCTS,
    Heads,
    LinearCase,
    Loss,
    compiled,
    eager,
    make_heads,
    ours,
    products,
    step,
)
from .measuring import Contestant, Timing, available_memory, interleave, time_once
from .report import Progress, Results, table, verdict

#: The same products on the same values in float32.
PRODUCTS_FP32 = "four products, fp32"
#: Weight-shaped float32 buffers that a contestant may hold beside its matrices.
WEIGHTS = 3
#: Rows of the probes; the last is left to those that are fast. Seconds for which a short one is
#: repeated, and from which a contestant is slow.
PROBE_ROWS, SHORT = (4, 16, 64), 2.0
#: Ours over the four products, at most; over the others it must be below 1.
GOAL = 1.15
#: Seconds that the repeats of one contestant may take together, and their number.
SECONDS_EACH, MOST_REPEATS = 20.0, 7


@dataclass(frozen=True)
class Entry:
    """Something to time on heads of any number of rows."""

    name: str
    prepare: Callable[[Heads], Callable[[], object]]
    matrices: float  # float32 (rows, V) at its peak, as measured
    most_rows: int | None = None  # of these matrices; None: all
    is_compiled: bool = False  # its first call on a number of rows compiles

    def bytes(self, case: LinearCase) -> int:
        """Of those matrices, and of a few buffers like the student's weight."""
        rows = min(case.n, self.most_rows or case.n)
        return int(4 * case.v * (self.matrices * rows + WEIGHTS * case.student_hidden))


@dataclass
class Speed:
    """Seconds of one contestant on all rows: measured, predicted from fewer, or why not."""

    timing: Timing | None = None
    predicted: float | None = None
    why: str = ""

    @property
    def seconds(self) -> float | None:
        return self.predicted if self.timing is None else self.timing.median


@dataclass
class Bench:
    """The heads of one dtype, as many rows as any part needs, and what the probes found."""

    case: LinearCase
    limit: float  # seconds of a call
    heads: Heads = field(init=False)
    probes: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.heads = make_heads(self.case)

    def probed(self, entry: Entry) -> list[tuple[int, float]]:
        """(rows, seconds) of calls on few rows, made once."""
        if entry.name not in self.probes:
            points = self.probes[entry.name] = []
            for rows in sorted({min(rows, self.case.n) for rows in PROBE_ROWS}):
                if len(points) > 1 and points[-1][1] > SHORT:
                    break
                call = entry.prepare(self.heads.first(rows))
                if entry.is_compiled:
                    call()
                seconds = [time_once(call)[0]]
                while sum(seconds) < SHORT:  # what is disturbed would be multiplied
                    seconds.append(time_once(call)[0])
                points.append((rows, min(seconds)))
        return self.probes[entry.name]

    def predict(self, entry: Entry, rows: int) -> float:
        return predict(self.probed(entry), rows)


def predict(points: list[tuple[int, float]], rows: int) -> float:
    """Seconds on so many rows, by the straight line through the last two points (or the origin)."""
    (n, t), (m, s) = points[-1], points[-2] if len(points) > 1 else (0, 0.0)
    return t + max(0.0, (t - s) / (n - m)) * (rows - n)


def entries(case: LinearCase, skip: list[str]) -> Iterator[Entry]:
    """Ours, the floor, and the peers."""

    def whole(loss: Loss) -> Callable[[Heads], Callable[[], object]]:
        return lambda heads: step(loss, heads)

    def four_fp32(heads: Heads) -> Callable[[], object]:
        return products(heads.to(torch.float32))

    yield Entry(OURS, whole(ours(case)), 2, most_rows=512)
    yield Entry(PRODUCTS, products, 2)
    if case.dtype != "fp32":
        yield Entry(PRODUCTS_FP32, four_fp32, 2)
    if "compile" not in skip:
        yield Entry(COMPILED, whole(compiled(case)), 2.5, is_compiled=True)
    if "eager" not in skip:
        yield Entry(EAGER, whole(eager(case)), 9)
    yield from liger_entries(case, skip)


def liger_entries(case: LinearCase, skip: list[str]) -> Iterator[Entry]:
    """Both of Liger's, where it is installed."""
    if "liger" in skip or peers.liger_linear_why_not() is not None:
        return
    kinds = (peers.LIGER_LINEAR_COMPILED, 4.5, True), (peers.LIGER_LINEAR, 9, False)
    for name, matrices, is_compiled in kinds:
        if is_compiled and "compile" in skip:
            continue
        loss = peers.liger_linear(case, is_compiled)
        yield Entry(name, lambda heads, f=loss: step(f, heads), matrices, 2047, is_compiled)  # type: ignore[misc]


def run(bench: Bench, rows: int, skip: list[str], repeats: int | None, results: Results) -> None:
    """One table: all contestants on the first `rows` rows."""
    case = bench.case.with_(n=rows)
    every = list(entries(case, skip))
    with Progress(f"{case.dtype}, N = {rows}", 3 * len(every)) as progress:
        figures = {}
        for entry in every:
            progress.advance(f"probe of {entry.name}")
            figures[entry.name] = _plan(bench, entry, rows)
        torch.compiler.reset()  # after the probes: this size is compiled for itself
        ready = []
        for entry in every:
            if not figures[entry.name].why:
                progress.advance(f"preparation of {entry.name}")
                ready.append(_contestant(bench, entry, rows, repeats))
        # calls take seconds: no warm-up beside the probes, and none is made again
        timings = interleave(ready, 1, progress.advance, warm_up=0, patience=0)
    for name, timing in timings.items():
        figures[name].timing = timing
    _show(case, figures, bench, results)


def _contestant(bench: Bench, entry: Entry, rows: int, repeats: int | None) -> Contestant:
    """Ready to be timed, as often as there is time for."""
    call = entry.prepare(bench.heads.first(rows))
    if entry.is_compiled:
        call()
    number = int(SECONDS_EACH / bench.predict(entry, rows))
    return Contestant(entry.name, call, repeats=repeats or max(1, min(MOST_REPEATS, number)))


def _plan(bench: Bench, entry: Entry, rows: int) -> Speed:
    needed, free = entry.bytes(bench.case.with_(n=rows)), available_memory()
    if needed > free:
        return Speed(why=f"left out: needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free")
    seconds = bench.predict(entry, rows)
    if seconds <= bench.limit:
        return Speed()
    probed = ", ".join(str(n) for n, _ in bench.probed(entry))
    return Speed(predicted=seconds, why=f"extrapolated from N = {probed}")


def _show(case: LinearCase, figures: dict[str, Speed], bench: Bench, results: Results) -> None:
    mine = figures[OURS].seconds
    lines = []
    for name, figure in figures.items():
        seconds, timing = figure.seconds, figure.timing
        ratio = None if mine is None or seconds is None else mine / seconds
        line: dict[str, Any] = {} if timing is None else timing.as_dict()
        results.write("time", section="speed", **case.sizes(), name=name, note=figure.why,
                      predicted_s=figure.predicted, ours_over_it=ratio,
                      probes=bench.probes.get(name), **line)  # fmt: skip
        if timing is not None:
            cells = timing.cells(unit=1.0, digits=2)
        else:
            cells = ["-" if seconds is None else f"~ {seconds:.1f}", figure.why]
        rate = "" if seconds is None else f"{case.flops / seconds / 1e9:.1f}"
        lines.append([name, *cells, rate, *_ratio(name, ratio, timing is None)])
    head = ["", "s", "[quartiles]", "GFLOP/s", "LinearKDLoss / it", "goal", ""]
    print(table(head, lines), flush=True)


def _ratio(name: str, ratio: float | None, is_predicted: bool) -> list[str]:
    if ratio is None or name == OURS:
        return ["", "", ""]
    limit = GOAL if name in (PRODUCTS, PRODUCTS_FP32) else 1.0
    mark = "~ " if is_predicted else ""
    return [f"{mark}{ratio:.3f}", f"≤ {limit:g}", mark + verdict(ratio <= limit)]
