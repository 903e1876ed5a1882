"""``python -m benchmarks.gpu_logits``: KDLoss on GPU logits against peers and the copy floor.

Forward and backward of the whole public call, in place and out of place, and the forward alone, for
both GPU backends; the eager composition, ``torch.compile`` of it, Liger where it can be imported;
and a large copy, whose bandwidth gives the floor: 2 reads and 1 write of an (N, V) matrix (forward
alone: 2 reads). Contestants take turns; the logits are restored before every call, outside the
timed region; times are the device's own, by events, while the host runs ahead. The second-level
cache is not flushed: every matrix is several times larger.

Written as they come: JSON lines; then tables and a picture.
"""

from __future__ import annotations

import os

# What eager needs at large sizes leaves no room for fragments.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_kd.options import DIVERGENCES

from . import cases, peers
from .cases import COMPILED, DTYPES, EAGER, Bench, Case
from .gpu import Budget, backends, clock, environment, peak_bytes, release, room
from .gpu_results import COPY, FORWARD_ONLY, IN_PLACE, LIGER, Line, Measured, show
from .measuring import Contestant, interleave
from .report import Parser, Results, positive_float, positive_int

VOCABULARIES = (151936, 128256, 262144, 32000)
ROWS = (8192, 4096)
#: Rows to which the slow peers fall back where they run out of memory.
FALLBACK_ROWS = 2048
#: (N, V) matrices that must fit: the student's logits twice, the teacher's, the gradient.
MATRICES = 4
#: Bytes of the copy that gives the bandwidth.
COPY_BYTES = 2**31
#: Seconds that a case takes, and that a compilation may.
CASE_SECONDS, COMPILE_SECONDS = 3.5, 20.0
#: Relative error beyond which a contestant computes something else.
WRONG = 0.02


@dataclass
class Run:
    """What every case needs to know, and what all of them found."""

    device: str
    output: Path
    results: Results
    budget: Budget
    repeats: int
    backends: list[str]
    is_trial: bool  # tiny sizes; nothing is compiled
    copy_bytes: int = COPY_BYTES
    measured: list[Measured] = field(default_factory=list)
    failed: bool = False

    def leave_out(self, what: str, why: object) -> None:
        words = " ".join(str(why).split())[:300]
        print(f"LEFT OUT {what}: {words}", flush=True)
        self.results.write("left_out", what=what, why=words)

    def fail(self, what: str, why: object) -> None:
        print(f"FAILED {what}: {' '.join(str(why).split())[:600]}", flush=True)
        self.failed = True


def planned(quick: bool) -> Iterator[Case]:
    """The most wanted first, but one dtype after the other: each has buffers of its own."""
    if quick:
        yield from (Case(5, 33, "bf16"), Case(3, 33, "bf16", divergence="jsd"), Case(5, 64, "fp32"))
        return
    for dtype in ("bf16", "fp32"):
        for v in VOCABULARIES:
            yield Case(ROWS[0], v, dtype)
        if dtype == "bf16":
            base = Case(ROWS[1], VOCABULARIES[0], dtype)
            for divergence in DIVERGENCES[1:]:
                yield base.with_(divergence=divergence)
        for v in VOCABULARIES:
            yield Case(ROWS[1], v, dtype)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs everything that fits into the time; returns the exit status."""
    options = parse("gpu_logits", __doc__, arguments)
    with Results(options.output / "gpu_logits.jsonl") as results:
        run, here = begin(options, results)
        try:
            _run_all(run, list(planned(quick=run.is_trial)))
        except Exception as error:  # what has been measured is shown all the same
            run.fail("the rest of the run", f"{type(error).__name__}: {error}")
        show(run.measured, here, options.output)
    return 1 if run.failed else 0


def parse(
    name: str, description: str | None, arguments: Sequence[str] | None
) -> argparse.Namespace:
    """The options of both GPU benchmarks; their folder is there afterwards."""
    parser = Parser(prog=f"python -m benchmarks.{name}", description=description)
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny sizes, to try it")
    add("--output", type=Path, default=Path("out/gpu_check"), metavar="DIR")
    add("--seconds", type=positive_float, default=240.0, help="default: %(default)s")
    add("--repeats", type=positive_int, help="of the fast contestants (default: 15)")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; --device cpu tries everything at tiny sizes")
    options.output.mkdir(parents=True, exist_ok=True)
    return options


def begin(options: argparse.Namespace, results: Results) -> tuple[Run, dict[str, Any]]:
    """What a benchmark starts with, and what its figures depend on."""
    found, is_trial = backends(options.device), options.device == "cpu"
    run = Run(
        device=options.device,
        output=options.output,
        results=results,
        budget=Budget(options.seconds),
        repeats=options.repeats or (2 if is_trial else 15),
        backends=[name for name, why in found.items() if why is None],
        is_trial=is_trial,
        copy_bytes=2**12 if is_trial else COPY_BYTES,
    )
    here = environment(options.device)
    results.write("environment", **here)
    for name, why in found.items():
        if why is not None:
            run.leave_out(f"backend {name}", why)
    return run, here


def _run_all(run: Run, every: list[Case]) -> None:
    bench: Bench | None = None
    for i, case in enumerate(every):
        if bench is None or bench.dtype != case.dtype:
            bench = None
            release(run.device)
            fitting = _fitting(run, [c for c in every if c.dtype == case.dtype])
            if fitting:
                entries = max(run.copy_bytes // DTYPES[case.dtype].itemsize, *fitting)
                bench = Bench(entries, case.dtype, max(c.n for c in every), device=run.device)
        if bench is None or case.matrix_bytes > bench.bytes:
            run.leave_out(name_of(case), "its logits and gradient do not fit into memory")
            continue
        if not run.budget.allows(CASE_SECONDS):
            run.leave_out(name_of(case), "the time is up")
            continue
        with_compile = not run.is_trial and case.divergence == "forward_kl"
        needed = COMPILE_SECONDS + CASE_SECONDS * (len(every) - i)
        if with_compile and not run.budget.allows(needed):
            run.leave_out(f"{COMPILED}, {name_of(case)}", "its time is left to other cases")
            with_compile = False
        _run_case(run, bench, case, with_compile)


def _fitting(run: Run, every: list[Case]) -> list[int]:
    """Entries of the matrices that there is room for."""
    limit = 0.9 * room(run.device) / MATRICES
    return [c.n * c.v for c in every if c.matrix_bytes <= limit]


def name_of(case: Case) -> str:
    return f"{case.dtype} {case.n}x{case.v} {case.divergence}"


# ------------------------------------------------------------------------------------- one case


def _run_case(run: Run, bench: Bench, case: Case, with_compile: bool) -> None:
    ready = [one for one in _contestants(run, bench, case, with_compile) if one is not None]
    copied = Case(1, run.copy_bytes // DTYPES[case.dtype].itemsize, case.dtype)
    copy = Contestant(COPY, bench.copy(copied), bench.restore(copied))
    try:
        timings = interleave(
            [copy, *(line.contestant for line in ready)], run.repeats, clock=clock(run.device)
        )
    except torch.OutOfMemoryError:
        run.leave_out(name_of(case), "its contestants do not fit into memory together")
        return
    bandwidth = 2 * run.copy_bytes / timings[COPY].median
    measured = Measured(case, bandwidth, {})
    for line in ready:
        timing = timings[line.name]
        measured.add(line, timing)
        run.results.write("time", **measured.as_dict(line.name), **timing.as_dict())
    run.results.write("copy", **measured.sizes(), bytes_per_second=bandwidth,
                      **timings[COPY].as_dict())  # fmt: skip
    run.measured.append(measured)
    print(measured.text(), flush=True)
    release(run.device)


def _contestants(run: Run, bench: Bench, case: Case, with_compile: bool) -> Iterator[Line | None]:
    for backend in run.backends:
        for suffix, inplace in (("", False), (IN_PLACE, True)):
            loss = cases.fused(case, inplace, backend)
            yield _enter(run, bench, case, backend + suffix, loss, is_ours=True)
        loss = cases.fused(case, False, backend)
        yield _enter(run, bench, case, backend + FORWARD_ONLY, loss, is_ours=True)
    why = peers.liger_why_not(case)
    if why is None:
        yield _enter(run, bench, case, LIGER, peers.liger(case))
    elif not run.measured:  # once
        run.leave_out(LIGER, why)
    if with_compile:
        torch.compiler.reset()  # or a later size would be taken for one too many, and run eagerly
        yield _enter(run, bench, case, COMPILED, cases.compiled(case), check=False)
    yield _enter(run, bench, case, EAGER, cases.eager(case), check=False)


def _enter(
    run: Run,
    bench: Bench,
    case: Case,
    name: str,
    loss: Callable[..., Tensor],
    is_ours: bool = False,
    check: bool = True,
) -> Line | None:
    """A contestant whose numbers are right and whose memory suffices, with its peak; or None."""
    report = run.fail if is_ours else run.leave_out
    what = f"{name}, {name_of(case)}"
    try:
        wrong = _wrong(loss, bench, case) if check else None
        if wrong is not None:
            report(what, wrong)
            return None
        sizes = [case] if is_ours else [case, case.with_(n=min(case.n, FALLBACK_ROWS))]
        for size in dict.fromkeys(sizes):
            line = _line(run, bench, size, name, loss, is_ours)
            if line is not None:
                return line
        report(what, "out of memory")
    except Exception as error:  # of a compiler, of a peer: the others go on
        report(what, f"{type(error).__name__}: {error}")
    return None


def _line(
    run: Run, bench: Bench, case: Case, name: str, loss: Callable[..., Tensor], is_ours: bool
) -> Line | None:
    """None where the memory does not suffice."""
    is_forward = name.endswith(FORWARD_ONLY)
    call, restore = (bench.forward if is_forward else bench.step)(loss, case), bench.restore(case)
    try:
        call()  # compiles, tunes
        restore()
        peak = peak_bytes(call, run.device)
    except torch.OutOfMemoryError:
        return None
    finally:
        restore()
        release(run.device)
    repeats = None if is_ours else -(-run.repeats // 3)
    return Line(Contestant(name, call, restore, repeats), case, peak)


def _wrong(loss: Callable[..., Tensor], bench: Bench, case: Case) -> str | None:
    """How loss or gradient of a few rows differ from the eager composition, if they do."""
    bench.restore(case)()
    few = case.with_(n=min(case.n, 32))
    (got, ours), (want, theirs) = (
        _loss_and_gradient(f, *bench.views(few)) for f in (loss, cases.eager(few))
    )
    error = abs(got - want) / abs(want)
    if not error < WRONG:
        return f"the loss is {got:.6g}, not {want:.6g}"
    error = float((ours - theirs).norm() / theirs.norm())
    return None if error < WRONG else f"the gradient differs by {error:.3g} of its norm"


def _loss_and_gradient(
    loss: Callable[..., Tensor], student: Tensor, teacher: Tensor, labels: Tensor
) -> tuple[float, Tensor]:
    leaf = student.clone().requires_grad_()
    value = loss(leaf * 1, teacher, labels)  # not the leaf: it may be written over
    (gradient,) = torch.autograd.grad(value, leaf)
    return float(value.detach()), gradient.float()


if __name__ == "__main__":
    sys.exit(main())
