"""One case of a suite, measured: in a process of its own, so that a crash ends no more than it.

``python -m benchmarks.one_case JSON PARENT`` (a :class:`Task`, the process that it ends with)
prints lines of results as records.py describes them, and lines of the kind "progress" ("share",
"note", "running").
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

# What eager needs at large sizes leaves no room for fragments on a GPU.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages

import torch

from . import device, errors, floors, records
from .cases import HEADS, LOGITS, STEP, Case
from .entrants import ENTRANTS, Entrant, Loss
from .measuring import (
    PATIENCE,
    Contestant,
    Timing,
    available_memory,
    interleave,
    process_peak,
)
from .problems import HeadsProblem, LogitsProblem, Problem
from .training_step import StepProblem, after_heads

Emit = Callable[..., None]
PROBLEMS: dict[str, Callable[[Case], Problem]] = {
    LOGITS: LogitsProblem,
    HEADS: HeadsProblem,
    STEP: StepProblem,
}

#: Relative errors beyond which an entrant computes something else: by float32 and by 16-bit inputs.
WRONG = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.05}
#: Weight-shaped float32 buffers that an entrant may hold besides its matrices.
WEIGHTS = 3
#: Rows that are tried first where a call on all may take too long, and how many times as many next.
FIRST_ROWS, MORE_ROWS = 8, 4
#: Repeats at least; where a call takes more seconds than LONG, two. What takes more than BRIEF is
#: not measured again where it was disturbed.
LEAST_REPEATS, LONG, BRIEF = 3, 5.0, 0.5
#: Of Linux's prctl: the signal to get when the parent ends.
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Task:
    """What to measure, and how long that may take."""

    suite: str
    case: Case
    entrants: tuple[str, ...]  # keys of ENTRANTS
    times: bool = True  # and memory; else errors alone
    repeats: int = 15  # at most
    seconds_each: float = 8.0  # that the repeats of an entrant may take together
    limit_seconds: float = 30.0  # of one call on all rows; slower ones have "no time"
    threads: int | None = None
    seconds: float | None = None  # for all of it; what is not begun by then has "no time"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Task:
        found = json.loads(text)
        return cls(**{**found, "case": Case(**found["case"]), "entrants": tuple(found["entrants"])})


@dataclass
class Line:
    """What is known of an entrant; what :func:`run_task` writes of it in the end."""

    name: str  # its key in ENTRANTS
    entrant: Entrant
    error: dict[str, float | None]
    loss: Loss
    memory: dict[str, int | None] | None = None
    repeats: int = 1
    patience: int = 0


def run_task(task: Task, emit: Emit) -> None:
    """Everything about one case; `emit(kind, **content)` is called as it comes.

    A case in which the time was up has no line "done": it is for another run to complete.
    """
    started, case, is_cut = time.monotonic(), task.case, False
    if task.threads is not None:
        torch.set_num_threads(task.threads)
    free = _free(case)
    if case.input_bytes > free:
        why = f"the inputs need {_gib(case.input_bytes)}, {_gib(free)} are free"
        for name in task.entrants:
            emit("result", **result(task, ENTRANTS[name], "no memory", why))
    else:
        run = _Run(task, emit)
        run.run()
        is_cut = run.is_cut
    gc.collect()
    device.release(case.device)
    if not is_cut:
        emit("done", **_about(task), threads=torch.get_num_threads(),
             seconds=round(time.monotonic() - started, 1))  # fmt: skip


def result(task: Task, entrant: Entrant, status: str, why: str, **more: Any) -> dict[str, Any]:
    """What a line of the kind "result" holds."""
    known = {"error": None, "time": None, "memory": None, "floor_share": None}
    return {
        **_about(task), "entrant": entrant.key, "title": entrant.title, "is_ours": entrant.is_ours,
        "status": status, "why": why, "nearest": entrant.nearest, **known,
        **floors.work(task.case, entrant), **more,
    }  # fmt: skip


def _about(task: Task) -> dict[str, Any]:
    return {"suite": task.suite, "case": task.case.sizes, "case_name": task.case.name}


def _free(case: Case) -> int:
    return available_memory() if case.device == "cpu" else device.room(case.device)


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


class _Run:
    """The steps of one case: right? how large? how fast?"""

    def __init__(self, task: Task, emit: Emit) -> None:
        self.task, self.case, self._emit = task, task.case, emit
        self._until = math.inf if task.seconds is None else time.monotonic() + task.seconds
        self.is_cut = False  # the time was up before somebody was measured
        self._steps, self._all = 0, 4 * len(task.entrants)
        self._progress("the inputs")
        # importing the compiler takes seconds, in which all that does not compile is measured
        self._compiles = any(ENTRANTS[name].compiles for name in task.entrants)
        self._forget()  # or one size would be taken for one too many, and run eagerly
        self.problem = PROBLEMS[task.case.level](task.case)
        self.floor: floors.Floor | None = None

    def run(self) -> None:
        if self.task.times:
            self.floor = floors.floor(self.problem, self.task.limit_seconds)
        checked = [line for name in self.task.entrants if (line := self._check(name))]
        if not self.task.times:
            return
        fitting = [line for line in checked if self._guarded(line, self._fits)]
        self._forget()  # what was compiled for a few rows, and may have become dynamic
        self._time([line for line in fitting if self._guarded(line, self._prepare)])

    def _forget(self) -> None:
        """Drops what was compiled, where anything is."""
        if self._compiles:
            torch.compiler.reset()

    # -------------------------------------------------------------------------- right?

    def _check(self, name: str) -> Line | None:
        """Compared with float64; None where that is the last word on it."""
        entrant = ENTRANTS[name]
        self._progress(f"errors of {entrant.title}", name)
        case = self.case.with_(level=entrant.level)
        why = entrant.why_not(case)
        if why is not None:
            return self._result(entrant, "skipped", why)
        if self._is_late(entrant):
            return None
        try:
            loss = entrant.build(case)
            if self.case.level == STEP:
                loss = after_heads(loss, entrant.level)
            line = Line(name, entrant, errors.of(self.problem, entrant, loss), loss)
        except Exception as error:  # of a peer, of a compiler: the others go on
            return self._result(entrant, "failed", _said(error))
        worst = errors.worst(line.error.values())
        is_right = worst is None or worst < WRONG[self.case.dtype]  # a NaN is below nothing
        if not is_right and self.case.regime == "randn":
            return self._result(entrant, "wrong", f"a relative error of {worst:.2g}", line)
        if not self.task.times:
            self._result(entrant, "measured", line=line)
        return line

    # -------------------------------------------------------------------- how large, how fast?

    def _guarded(self, line: Line, step: Callable[[Line], bool]) -> bool:
        """A step with one entrant; False where that is the last word on it."""
        if self._is_late(line.entrant):
            return False
        try:
            return step(line)
        except torch.OutOfMemoryError:
            self._result(line.entrant, "no memory", "the GPU's memory does not suffice", line)
        except Exception as error:
            self._result(line.entrant, "failed", _said(error), line)
        finally:
            self.problem.restore()
            device.release(self.case.device)
        return False

    def _fits(self, line: Line) -> bool:
        """Into memory, and into the time of a call."""
        self._progress(f"a few rows of {line.entrant.title}", line.name)
        needed, free = self._needed(line.entrant), _free(self.case)
        if needed > free:
            why = f"needs {_gib(needed)}, {_gib(free)} are free"
            self._result(line.entrant, "no memory", why, line)
            return False
        if self.floor is not None and self.floor.is_slow and (why := self._exceeds(line)):
            self._result(line.entrant, "no time", why, line)
            return False
        return True

    def _prepare(self, line: Line) -> bool:
        """Measures memory and one call, which is held to the limit."""
        self._progress(f"memory of {line.entrant.title}", line.name)
        call = self.problem.call(line.loss)
        if line.entrant.compiles or self.case.device != "cpu" or self.case.level == STEP:
            self._first(call)
        seconds, line.memory = self._peaks(call)
        if seconds > self.task.limit_seconds:
            self._result(line.entrant, "no time", self._limited("a call", seconds), line)
            return False
        line.repeats = self._repeats(seconds)
        line.patience = PATIENCE if seconds < BRIEF else 0
        return True

    def _time(self, lines: list[Line]) -> None:
        contestants = [
            Contestant(line.name, self.problem.call(line.loss), self.problem.restore,
                       line.repeats, line.patience)
            for line in lines
        ]  # fmt: skip
        if self.floor is not None:
            repeats = self._repeats(self.floor.seconds)
            reference = Contestant(floors.NAME, self.floor.call, self.problem.restore, repeats)
            contestants.insert(0, reference)
        self._all = self._steps + sum(one.repeats or 1 for one in contestants)
        timings = interleave(contestants, 1, lambda name: self._progress(f"time of {name}", name),
                             clock=device.clock(self.case.device), warm_up=0)  # fmt: skip
        if self.floor is not None and timings[floors.NAME].error is None:
            self.floor.take(timings[floors.NAME])
            self._emit("floor", **_about(self.task), **self.floor.as_dict(self.case))
        for line in lines:
            timing = timings[line.name]
            if timing.error is not None:
                self._result(line.entrant, "failed", _said(timing.error), line)
            else:
                self._result(line.entrant, "measured", line=line, timing=timing)

    def _first(self, call: Callable[[], object]) -> None:
        """Compiles, tunes, allocates what stays."""
        call()
        self.problem.restore()

    def _peaks(self, call: Callable[[], object]) -> tuple[float, dict[str, int | None]]:
        """Seconds of a call, and its peaks in bytes beyond the inputs."""
        clock, seconds, process = device.clock(self.case.device), list[float](), None
        allocator = device.peak_bytes(call, self.case.device)
        self.problem.restore()
        if self.case.device == "cpu":
            process = process_peak(lambda: seconds.append(clock(call)[0]))
        else:
            seconds.append(clock(call)[0])
        return seconds[0], {"allocator_bytes": allocator, "process_bytes": process}

    def _repeats(self, seconds: float) -> int:
        least = LEAST_REPEATS if seconds < LONG else 2
        fitting = int(self.task.seconds_each / max(seconds, 1e-9))
        return min(self.task.repeats, max(least, fitting))

    def _exceeds(self, line: Line) -> str:
        """What shows on more and more rows that a call exceeds the limit; "" if nothing does.

        So that none is begun that takes hours. Nothing is concluded from fewer rows than take so
        long themselves, products of a few run differently, nor from a first call, which compiles
        and allocates.
        """
        rows = FIRST_ROWS
        while rows < self.case.n:
            call = self.problem.call(line.loss, rows)
            seconds = floors.fastest(call, 0.0, self.case.device)
            if seconds > self.task.limit_seconds:
                seconds = floors.fastest(call, 0.0, self.case.device)
            if seconds > self.task.limit_seconds:
                return self._limited(f"{rows} rows alone", seconds)
            rows *= MORE_ROWS
        return ""

    def _limited(self, what: str, seconds: float) -> str:
        return f"{what} took {seconds:.3g} s, the limit is {self.task.limit_seconds:g} s"

    def _needed(self, entrant: Entrant) -> int:
        """Bytes beyond the inputs, roughly."""
        rows = min(self.case.n, entrant.most_rows or self.case.n)
        return int(4 * self.case.v * (entrant.matrices * rows + WEIGHTS * self.case.student_hidden))

    # ---------------------------------------------------------------------------- results

    def _is_late(self, entrant: Entrant) -> bool:
        """Whether the time is up, which is then the last word."""
        late = time.monotonic() > self._until
        if late:
            self.is_cut = True
            self._result(entrant, "no time", "the time is up")
        return late

    def _result(
        self,
        entrant: Entrant,
        status: str,
        why: str = "",
        line: Line | None = None,
        timing: Timing | None = None,
    ) -> None:
        more: dict[str, Any] = {}
        if line is not None:
            more = {"error": line.error, "memory": line.memory}
        if timing is not None:
            more["time"] = timing.as_dict()
            if self.floor is not None and not entrant.nearest:
                least = self.floor.seconds_of(entrant.key, self.case)
                more["floor_share"] = least / timing.median
        self._emit("result", **result(self.task, entrant, status, why, **more))

    def _progress(self, note: str, running: str | None = None) -> None:
        """`running`: which entrant is, should it crash."""
        self._steps += 1
        share = min(1.0, self._steps / max(1, self._all))
        self._emit("progress", share=share, note=note, running=running)


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _ends_with(parent: int) -> bool:
    """Has the system end this process when its parent ends; False if that has happened already.

    A run that is killed must release the machine, and must not disturb the next one. If there is
    no such call, the first line that has no reader ends the process.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)  # Linux's
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    return os.getppid() == parent


def main() -> int:
    """Reads the task from the command line; nothing but results goes to standard output."""
    task = Task.from_json(sys.argv[1])
    if not _ends_with(int(sys.argv[2])):
        return 1
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what peers print

    def emit(kind: str, **content: Any) -> None:
        print(records.dumps({"kind": kind, **content}), file=results, flush=True)

    run_task(task, emit)
    return 0


if __name__ == "__main__":
    sys.exit(main())
