"""One case of a suite, measured: for each method, is it right, how large, how fast."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# What eager needs at large sizes leaves no room for fragments on a GPU.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages

import torch

from . import device, errors, lower_bounds
from .cases import HEADS, LOGITS, STEP, Case
from .measuring import Turn, interleave, process_peak
from .methods import METHODS, Loss, Method
from .methods.ours import FORWARD
from .problems import HeadsProblem, LogitsProblem, Problem
from .schema import Bound, Done, Record, Result
from .training_step import StepProblem, after_heads

#: Takes a record, or the key in METHODS of what runs now: None for nothing that may crash.
Emit = Callable[[Record | str | None], None]
PROBLEMS: dict[str, Callable[[Case], Problem]] = {
    LOGITS: LogitsProblem,
    HEADS: HeadsProblem,
    STEP: StepProblem,
}

#: Weight-shaped float32 buffers that a method may hold besides its matrices.
WEIGHTS = 3
#: Rows that are tried first if a call on all may take too long, and how many times as many next.
FIRST_ROWS, MORE_ROWS = 8, 4
#: Repeats at least; if a call takes more seconds than LONG, two. A call of more than BRIEF is not
#: repeated because it was disturbed, others up to PATIENCE times the wanted repeats.
LEAST_REPEATS, LONG, BRIEF, PATIENCE = 3, 5.0, 0.5, 3


@dataclass(frozen=True)
class Task:
    """What to measure, and how long that may take."""

    suite: str
    case: Case
    methods: tuple[str, ...]  # keys of METHODS
    times: bool = True  # and memory; else errors alone
    repeats: int = 15  # at most
    seconds_each: float = 8.0  # that the repeats of a method may take together
    limit_seconds: float = 30.0  # of one call on all rows; slower ones have "no time"
    threads: int | None = None
    seconds: float | None = None  # for all of it; what is not begun by then has "no time"

    @property
    def about(self) -> dict[str, Any]:
        """Return the fields that all of its records have."""
        return {"suite": self.suite, "case": self.case.sizes}

    def result(self, method: Method, status: str, why: str = "", **more: Any) -> Result:
        """Return the record of a method."""
        names = {"method": method.key, "title": method.title, "is_ours": method.is_ours}
        return Result(**self.about, **names, nearest=method.nearest, status=status, why=why, **more)


class Rejected(Exception):
    """Raised with the status and the reason of a method that is not measured further."""


def run_task(task: Task, emit: Emit) -> None:
    """Measure one case and emit its records.

    A case that the clock cut off has no record "done": another run completes it.
    """
    started = time.monotonic()
    if task.threads is not None:
        torch.set_num_threads(task.threads)
    free, needed = device.room(task.case.device), task.case.input_bytes
    if needed > free:
        for name in task.methods:
            why = f"the inputs need {_gib(needed)}, {_gib(free)} are free"
            emit(task.result(METHODS[name], "no memory", why))
        is_cut = False
    else:
        is_cut = _Run(task, emit).run()
    gc.collect()
    device.release(task.case.device)
    if not is_cut:
        seconds = round(time.monotonic() - started, 1)
        emit(Done(**task.about, seconds=seconds, threads=torch.get_num_threads()))


class _Run:
    """The steps of one case."""

    def __init__(self, task: Task, emit: Emit) -> None:
        self.task, self.case, self._emit = task, task.case, emit
        self._budget = None if task.seconds is None else device.Budget(task.seconds)
        self._is_cut = False
        # importing the compiler takes seconds, which a run without compiled methods saves
        self._compiles = any(METHODS[name].compiles for name in task.methods)
        self._forget()  # or one size would be taken for one too many, and run eagerly
        self.problem = PROBLEMS[self.case.level](self.case)
        self.bound: lower_bounds.LowerBound | None = None
        self.losses: dict[str, Loss] = {}
        #: What is known of each method: fields of its Result.
        self.known: dict[str, dict[str, Any]] = {name: {} for name in task.methods}

    def run(self) -> bool:
        """Emit all results; return True if the clock cut the case off."""
        names = [name for name in self.task.methods if self._guarded(self._check, name)]
        if self.task.times:
            self.bound = lower_bounds.lower_bound(self.problem, self.task.limit_seconds)
            names = [name for name in names if self._guarded(self._fits, name)]
            self._forget()  # what was compiled for a few rows, and may have become dynamic
            turns = [turn for name in names if (turn := self._guarded(self._prepare, name))]
            self._time(turns)
        return self._is_cut

    def _guarded(self, step: Callable[[str], Any], name: str) -> Any:
        """Return what a step with one method returns; False if its result is final."""
        self._emit(name)
        try:
            if self._budget is not None and not self._budget.allows(0.0):
                self._is_cut = True
                raise Rejected("no time", "the time is up")
            return step(name)
        except Rejected as rejected:
            self._result(name, *rejected.args)
        except torch.OutOfMemoryError:
            self._result(name, "no memory", "the GPU's memory does not suffice")
        except Exception as error:  # of a peer, of a compiler: the others continue
            self._result(name, "failed", one_line(error))
        finally:
            self._emit(None)
            self.problem.restore()
            device.release(self.case.device)
        return False

    def _check(self, name: str) -> bool:
        """Compare a method with float64."""
        method = METHODS[name]
        case = self.case.with_(level=method.level)
        if (why := method.why_not(case)) is not None:
            raise Rejected("skipped", why)
        loss = method.build(case)
        self.losses[name] = after_heads(loss, method.level) if self.case.level == STEP else loss
        error = errors.of(self.problem, method, self.losses[name])
        self.known[name]["error"] = error
        worst = errors.worst(error.values())
        if self.case.regime == "randn" and (worst or 0.0) >= errors.WRONG[self.case.dtype]:
            raise Rejected("wrong", f"a relative error of {worst:.2g}")
        if not self.task.times:
            raise Rejected("measured")
        return True

    def _fits(self, name: str) -> bool:
        """Reject what exceeds the memory, or surely the time of a call.

        If a call may take hours, more and more rows are tried first. Nothing is concluded from
        fewer rows than exceed the limit themselves, since products of a few run differently, nor
        from a first call, which compiles and allocates.
        """
        method, case = METHODS[name], self.case
        rows = min(case.n, method.most_rows or case.n)
        needed = int(4 * case.v * (method.matrices * rows + WEIGHTS * case.student_hidden))
        if needed > (free := device.room(case.device)):
            raise Rejected("no memory", f"needs {_gib(needed)}, {_gib(free)} are free")
        rows = FIRST_ROWS
        while self.bound is not None and self.bound.is_slow and rows < case.n:
            call = self.problem.call(self.losses[name], rows)
            seconds = lower_bounds.fastest(call, 0.0, case.device)
            if seconds > self.task.limit_seconds:
                seconds = lower_bounds.fastest(call, 0.0, case.device)
            self._check_limit(f"{rows} rows alone", seconds)
            rows *= MORE_ROWS
        return True

    def _prepare(self, name: str) -> Turn:
        """Measure memory and one call, which must not exceed the limit."""
        call, where, seconds = self.problem.call(self.losses[name]), self.case.device, [0.0]
        if METHODS[name].compiles or where != "cpu" or self.case.level == STEP:
            call()  # compiles, tunes, allocates what is kept
            self.problem.restore()
        allocator = device.peak_bytes(call, where)
        self.problem.restore()

        def timed() -> None:
            seconds[0] = device.clock(where)(call)[0]

        process = process_peak(timed) if where == "cpu" else timed()
        self.known[name]["memory"] = {"allocator_bytes": allocator, "process_bytes": process}
        self._check_limit("a call", seconds[0])
        return self._turn(name, call, seconds[0], PATIENCE if seconds[0] < BRIEF else 1)

    def _check_limit(self, what: str, seconds: float) -> None:
        if seconds > self.task.limit_seconds:
            limit = f"the limit is {self.task.limit_seconds:g} s"
            raise Rejected("no time", f"{what} took {seconds:.3g} s, {limit}")

    def _turn(self, name: str, call: Callable[[], object], seconds: float, patience: int) -> Turn:
        least = LEAST_REPEATS if seconds < LONG else 2
        fitting = int(self.task.seconds_each / max(seconds, 1e-9))
        wanted = min(self.task.repeats, max(least, fitting))
        return Turn(name, call, self.problem.restore, wanted, patience * wanted)

    def _time(self, turns: list[Turn]) -> None:
        """Time all methods in turns, with the lower bound first."""
        bound, least = self.bound, None
        first = [] if bound is None else [self._turn("", bound.call, bound.seconds, 1)]
        interleave(
            [*first, *turns], device.clock(self.case.device), lambda x: self._emit(x or None)
        )
        if bound is not None and first[0].error is None:
            time = first[0].time()
            least, rate = bound.least(time["median_s"], self.case)
            names = {"name": bound.name, "why": bound.why}
            self._emit(Bound(**self.task.about, **names, seconds=least, rate=rate, time=time))
        for turn in turns:
            method, known = METHODS[turn.name], self.known[turn.name]
            if turn.error is not None:
                self._result(turn.name, "failed", one_line(turn.error))
                continue
            known["time"] = turn.time()
            if least is not None and not method.nearest:
                own = least / (1.5 if method.key.startswith(FORWARD) else 1)  # writes no gradient
                known["bound_share"] = own / known["time"]["median_s"]
            self._result(turn.name, "measured")

    def _result(self, name: str, status: str, why: str = "") -> None:
        self._emit(self.task.result(METHODS[name], status, why, **self.known[name]))

    def _forget(self) -> None:
        """Drop what was compiled, if anything is."""
        if self._compiles:
            torch.compiler.reset()


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def one_line(error: Exception) -> str:
    """Return what an exception says, without line breaks."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
