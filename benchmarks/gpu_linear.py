"""``python -m benchmarks.gpu_linear``: LinearKDLoss on a GPU beside its floor and its peers.

Forward and backward from hidden states with both GPU backends' row kernels; the four bare products
on whole matrices, which are the floor; the eager composition, ``torch.compile`` of it, Liger's
chunked loss, and torch's chunked cross-entropy (the hard term alone), where there are such. Each
with its peak of memory. Contestants take turns; times are the device's own, by events.

Written as they come: JSON lines; then a table.
"""

from __future__ import annotations

import os

# What eager needs at large sizes leaves no room for fragments.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from . import peers
from .cases import COMPILED, EAGER
from .gpu import clock, peak_bytes, release, room
from .gpu_logits import COMPILE_SECONDS, FALLBACK_ROWS, WRONG, Run, begin, parse
from .gpu_results import GOAL_ROWS, Figure, Line, heading
from .linear_cases import (
    PRODUCTS,
    Heads,
    LinearCase,
    Loss,
    compiled,
    distance,
    eager,
    make_heads,
    ours,
    outcome,
    products,
    step,
)
from .measuring import Contestant, interleave
from .report import Results, megabytes, table, verdict

#: Ours over the four products, at most.
GOAL = 1.1
#: Seconds that a case takes besides compilation.
CASE_SECONDS = 20.0
#: Rows on which a contestant is compared with the eager composition.
CHECKED_ROWS = 32
#: A peer's error may be so many times what ours may: it rounds the logits to 16 bits.
PEER_FACTOR = 5


def planned(quick: bool) -> list[LinearCase]:
    """The most wanted first."""
    if quick:
        return [LinearCase(5, 33, 8, 12, "bf16"), LinearCase(4, 40, 8, 12, "fp32")]
    return [LinearCase(8192, v, 2048, 4096, "bf16") for v in (151936, 128256)]


@dataclass
class Measured:
    """One case and what came out for its contestants."""

    case: LinearCase
    figures: dict[str, Figure] = field(default_factory=dict)
    ours: list[str] = field(default_factory=list)

    def over(self, name: str, other: str = PRODUCTS) -> float | None:
        """Time over that of another, where both were measured."""
        if name not in self.figures or other not in self.figures:
            return None
        return self.figures[name].seconds / self.figures[other].seconds

    def goal(self, name: str) -> list[str]:
        """And whether it is reached."""
        value = self.over(name)
        if name not in self.ours or value is None or self.case.n < GOAL_ROWS:
            return ["", ""]
        return [f"≤ {GOAL:g}", verdict(value <= GOAL)]

    def beyond(self, name: str) -> int:
        """Peak bytes that are neither gradients nor, for ours, the accumulator."""
        accumulator = self.case.accumulator_bytes if name in self.ours else 0
        return self.figures[name].peak - self.case.gradient_bytes - accumulator

    def as_dict(self, name: str) -> dict[str, Any]:
        figure, value = self.figures[name], self.over(name)
        return {**self.case.sizes(), "name": name, "rows_measured": figure.rows,
                "flops": self.case.flops, "over_products": value, "peak_bytes": figure.peak,
                "beyond_gradients": self.beyond(name),
                **{f"{mine}_over_it": self.over(mine, name) for mine in self.ours}}  # fmt: skip

    def text(self) -> str:
        case, lines = self.case, []
        for name, figure in self.figures.items():
            rate = case.flops / figure.seconds / 1e12
            fewer = name == peers.TORCH_LINEAR  # products, so no rate
            over = self.over(name)
            ratios = (self.over(mine, name) for mine in self.ours)
            lines.append([*figure.cells(name, case.n), "" if fewer else f"{rate:.1f}",
                          "" if over is None else f"{over:.3f}",
                          *self.goal(name), *("" if r is None else f"{r:.2f}" for r in ratios),
                          megabytes(figure.peak), megabytes(self.beyond(name))])  # fmt: skip
        title = (f"{case.dtype}, N = {case.n}, V = {case.v}, H_s = {case.student_hidden}, "
                 f"H_t = {case.teacher_hidden}, T = {case.temperature:g}")  # fmt: skip
        head = [title, "ms", "[quartiles]", "TFLOP/s", "/ products", "goal", "",
                *(f"{mine} / it" for mine in self.ours), "peak beyond the inputs",
                "and gradients"]  # fmt: skip
        return f"\n{table(head, lines)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs everything that fits into the time; returns the exit status."""
    options = parse("gpu_linear", __doc__, arguments)
    every: list[Measured] = []
    with Results(options.output / "gpu_linear.jsonl") as results:
        run, here = begin(options, results)
        try:
            for case in planned(quick=run.is_trial):
                _run_case(run, case, every)
                release(run.device)
        except Exception as error:  # what has been measured is shown all the same
            run.fail("the rest of the run", f"{type(error).__name__}: {error}")
    text = heading("LinearKDLoss on a GPU", here)
    text = "\n".join(
        [text, *(one.text() for one in every)] if every else [text, "nothing measured"]
    )
    (options.output / "gpu_linear.txt").write_text(text + "\n")
    print(f"\n{text}", flush=True)
    return 1 if run.failed else 0


def name_of(case: LinearCase) -> str:
    hidden = f"{case.student_hidden}/{case.teacher_hidden}"
    return f"{case.dtype} {case.n}x{case.v} hidden {hidden}"


def _run_case(run: Run, case: LinearCase, every: list[Measured]) -> None:
    if not run.budget.allows(CASE_SECONDS):
        run.leave_out(name_of(case), "the time is up")
        return
    # both weights, the gradient and its accumulator, and as much again for a few rows
    weights = 4 * case.v * (3 * case.student_hidden + case.teacher_hidden)
    if 2 * weights > room(run.device):
        run.leave_out(name_of(case), "its weights and their gradient do not fit into memory")
        return
    heads = make_heads(case, run.device)
    ready = [line for line in _contestants(run, case, heads) if line is not None]
    if not ready:
        return
    timings = interleave([one.contestant for one in ready], run.repeats, clock=clock(run.device))
    measured = Measured(case, ours=[name for name in run.backends if name in timings])
    for line in ready:
        measured.figures[line.name] = Figure.of(line, timings[line.name], case.n)
    for name, timing in timings.items():
        run.results.write("time", **measured.as_dict(name), **timing.as_dict())
    every.append(measured)
    print(measured.text(), flush=True)


def _contestants(run: Run, case: LinearCase, heads: Heads) -> Iterator[Line | None]:
    for backend in run.backends:
        loss = ours(case, backend=backend)
        yield _enter(run, case, heads, backend, loss, WRONG, is_ours=True)
    yield _line(run, case, heads, PRODUCTS, products, is_ours=False)
    why = peers.liger_linear_why_not()
    if why is not None:
        run.leave_out(peers.LIGER_LINEAR, why)
    else:
        yield _enter(run, case, heads, peers.LIGER_LINEAR, peers.liger_linear(case, False),
                     PEER_FACTOR * WRONG)  # fmt: skip
    if not run.is_trial:
        torch.compiler.reset()
        needed = COMPILE_SECONDS + CASE_SECONDS
        if not run.budget.allows(needed):
            run.leave_out(f"{COMPILED}, {name_of(case)}", "its time is left to other cases")
        else:
            yield _enter(run, case, heads, COMPILED, compiled(case))
            if why is None:
                yield _enter(run, case, heads, peers.LIGER_LINEAR_COMPILED,
                             peers.liger_linear(case, True))  # fmt: skip
    why = peers.torch_linear_why_not()
    if why is not None:
        run.leave_out(peers.TORCH_LINEAR, why)
    else:
        yield _enter(run, case, heads, peers.TORCH_LINEAR, peers.torch_linear())
    yield _enter(run, case, heads, EAGER, eager(case))


def _enter(
    run: Run,
    case: LinearCase,
    heads: Heads,
    name: str,
    loss: Loss,
    allowed: float | None = None,  # relative error; None: not looked at
    is_ours: bool = False,
) -> Line | None:
    """A contestant whose numbers are right and whose memory suffices, with its peak; or None."""
    report = run.fail if is_ours else run.leave_out
    what = f"{name}, {name_of(case)}"
    try:
        wrong = None if allowed is None else _wrong(loss, case, heads, allowed)
        if wrong is not None:
            report(what, wrong)
            return None
        line = _line(run, case, heads, name, lambda some: step(loss, some), is_ours)
        if line is None:
            report(what, "out of memory")
        return line
    except Exception as error:  # of a compiler, of a peer: the others go on
        report(what, f"{type(error).__name__}: {error}")
    return None


def _line(
    run: Run,
    case: LinearCase,
    heads: Heads,
    name: str,
    prepare: Callable[[Heads], Callable[[], object]],
    is_ours: bool,
) -> Line | None:
    """On all rows, or on fewer for the others where the memory does not suffice."""
    fewer = case.n if is_ours else min(case.n, FALLBACK_ROWS)
    for rows in dict.fromkeys((case.n, fewer)):
        call = prepare(heads.first(rows))
        try:
            call()  # compiles, tunes
            peak = peak_bytes(call, run.device)
        except torch.OutOfMemoryError:
            continue
        finally:
            release(run.device)
        is_fast = is_ours or name == PRODUCTS
        repeats = None if is_fast else -(-run.repeats // 3)
        return Line(Contestant(name, call, repeats=repeats), case.with_(n=rows), peak)
    return None


def _wrong(loss: Loss, case: LinearCase, heads: Heads, allowed: float) -> str | None:
    """How loss or gradients of a few rows differ from the eager composition, if they do."""
    few = heads.first(min(case.n, CHECKED_ROWS))
    got, want = outcome(loss, few), outcome(eager(case), few)
    for name, mine, theirs in zip(got._fields, got, want, strict=True):
        error = distance(mine, theirs)
        if not error < allowed:
            return f"{name} differs by {error:.3g} of its norm"
    return None


if __name__ == "__main__":
    sys.exit(main())
