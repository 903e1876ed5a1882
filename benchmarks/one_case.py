"""One case of a suite, measured: in a process of its own, so that a crash ends no more than it.

``python -m benchmarks.one_case JSON`` (a :class:`Task`) prints lines of results as records.py
describes them, and lines of the kind "progress" ("share", "note").
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

# What eager needs at large sizes leaves no room for fragments on a GPU.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
# One thread per core, decided before torch starts them: left alone, Linux was seen to keep both of
# two threads on one core for a whole run.
os.environ.setdefault("OMP_PROC_BIND", "spread")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages

import torch

from . import device, errors, floors
from .cases import LINEAR, LOGITS, STEP, Case
from .entrants import ENTRANTS, Entrant, Loss
from .measuring import (
    PATIENCE,
    Contestant,
    Timing,
    available_memory,
    interleave,
    process_peak,
)
from .problems import LinearProblem, LogitsProblem, Problem
from .training_step import StepProblem, after_heads

Emit = Callable[..., None]
PROBLEMS: dict[str, Callable[[Case], Problem]] = {
    LOGITS: LogitsProblem,
    LINEAR: LinearProblem,
    STEP: StepProblem,
}

#: Relative errors beyond which an entrant computes something else: by float32 and by 16-bit inputs.
WRONG = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.05}
#: Weight-shaped float32 buffers that an entrant may hold beside its matrices.
WEIGHTS = 3
#: Rows of the probes of what is too slow on all of them; seconds for which a short one is repeated.
PROBE_ROWS, SHORT = (2, 8), 1.0
#: Repeats at least; where a call takes more seconds than LONG, two. What takes more than BRIEF is
#: not measured again where it was disturbed.
LEAST_REPEATS, LONG, BRIEF = 3, 5.0, 0.5


@dataclass(frozen=True)
class Task:
    """What to measure, and how long that may take."""

    suite: str
    case: Case
    entrants: tuple[str, ...]  # keys of ENTRANTS
    times: bool = True  # and memory; else errors alone
    repeats: int = 15  # at most
    seconds_each: float = 8.0  # that the repeats of an entrant may take together
    limit_seconds: float = 60.0  # of one call; slower ones are scaled from fewer rows
    threads: int | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Task:
        found = json.loads(text)
        return cls(**{**found, "case": Case(**found["case"]), "entrants": tuple(found["entrants"])})


@dataclass
class Line:
    """What is known of an entrant; what :func:`run_task` writes of it in the end."""

    entrant: Entrant
    error: dict[str, float | None]
    loss: Loss
    memory: dict[str, int | None] | None = None
    repeats: int = 1
    patience: int = 0
    rows: int = 0


def run_task(task: Task, emit: Emit) -> None:
    """Everything about one case; `emit(kind, **content)` is called as it comes."""
    started = time.monotonic()
    if task.threads is not None:
        torch.set_num_threads(task.threads)
    _Run(task, emit).run()
    emit("done", **_about(task), seconds=round(time.monotonic() - started, 1))


def _about(task: Task) -> dict[str, Any]:
    return {"suite": task.suite, "case": task.case.sizes, "case_name": task.case.name}


class _Run:
    """The steps of one case: right? how large? how fast?"""

    def __init__(self, task: Task, emit: Emit) -> None:
        self.task, self.case, self._emit = task, task.case, emit
        torch.compiler.reset()  # or one size would be taken for one too many, and run eagerly
        self.problem = PROBLEMS[task.case.level](task.case)
        self.floor: floors.Floor | None = None
        self._steps, self._all = 0, 3 * len(task.entrants)

    def run(self) -> None:
        if self.task.times:
            self.floor = floors.floor(self.problem, self.task.limit_seconds)
        lines = []
        for key in self.task.entrants:
            line = self._check(ENTRANTS[key])
            if line is not None:
                lines.append(line)
        if self.task.times:
            self._time(lines)

    # -------------------------------------------------------------------------- right?

    def _check(self, entrant: Entrant) -> Line | None:
        """Compared with float64; None where that is the last word on it."""
        self._progress(f"errors of {entrant.title}")
        case = self.case.with_(level=entrant.level)
        why = entrant.why_not(case)
        if why is not None:
            return self._result(entrant, "skipped", why)
        try:
            loss = entrant.build(case)
            if self.case.level == STEP:
                loss = after_heads(loss, entrant.level)
            error = errors.of(self.problem, entrant, loss)
        except Exception as error_:  # of a peer, of a compiler: the others go on
            return self._result(entrant, "failed", _said(error_))
        line = Line(entrant, error, loss, rows=self.case.n)
        worst = max((x for x in error.values() if x is not None), default=0.0)
        if not worst < WRONG[self.case.dtype] and self.case.regime == "randn":
            return self._result(entrant, "wrong", f"a relative error of {worst:.2g}", line)
        if not self.task.times:
            self._result(entrant, "measured", line=line)
        return line

    # -------------------------------------------------------------------- how large, how fast?

    def _time(self, lines: list[Line]) -> None:
        ready = [line for line in lines if self._prepare(line)]
        contestants = [
            Contestant(line.entrant.key, self.problem.call(line.loss), self.problem.restore,
                       line.repeats, line.patience)
            for line in ready
        ]  # fmt: skip
        reference = self._floor_contestant()
        self._all = self._steps + sum(c.repeats or 1 for c in [*contestants, *reference])
        timings = interleave([*reference, *contestants], 1, self._progress,
                             clock=device.clock(self.case.device), warm_up=0)  # fmt: skip
        if self.floor is not None:
            self.floor.take(timings.get(floors.NAME))
            self._emit("floor", **_about(self.task), **self.floor.as_dict(self.case))
        for line in ready:
            self._result(line.entrant, "measured", line=line, timing=timings[line.entrant.key])

    def _floor_contestant(self) -> list[Contestant]:
        if self.floor is None or self.floor.call is None:
            return []
        repeats = self._repeats(self.floor.seconds)
        return [Contestant(floors.NAME, self.floor.call, self.problem.restore, repeats)]

    def _prepare(self, line: Line) -> bool:
        """Measures memory and one call; False where that is the last word."""
        entrant, case = line.entrant, self.case
        self._progress(f"memory of {entrant.title}")
        needed, free = self._needed(entrant), self._free()
        if needed > free:
            why = f"needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
            self._result(entrant, "no memory", why, line)
            return False
        try:
            if self.floor is not None and self.floor.is_slow:
                predicted = floors.predict(self._probe(line), case.n)
                if predicted > self.task.limit_seconds:
                    self._scaled(line, predicted)
                    return False
            call = self.problem.call(line.loss)
            if entrant.compiles or case.device != "cpu":
                self._first(call)
            seconds, line.memory = self._peaks(call)
        except torch.OutOfMemoryError:
            self._result(entrant, "no memory", "the GPU's memory does not suffice", line)
            return False
        except Exception as error:
            self._result(entrant, "failed", _said(error), line)
            return False
        finally:
            self.problem.restore()
            device.release(case.device)
        line.repeats = self._repeats(seconds)
        line.patience = PATIENCE if seconds < BRIEF else 0
        return True

    def _first(self, call: Callable[[], object]) -> None:
        """Compiles, tunes, allocates what stays."""
        call()
        self.problem.restore()

    def _peaks(self, call: Callable[[], object]) -> tuple[float, dict[str, int | None]]:
        """Seconds of a call, and its peaks in bytes beyond the inputs."""
        clock, process = device.clock(self.case.device), None
        if self.case.device == "cpu":
            found: list[float] = []
            process = process_peak(lambda: found.append(clock(call)[0]))
            seconds = found[0]
        else:
            seconds = clock(call)[0]
        self.problem.restore()
        allocator = device.peak_bytes(call, self.case.device)
        return seconds, {"allocator_bytes": allocator, "process_bytes": process}

    def _repeats(self, seconds: float) -> int:
        least = LEAST_REPEATS if seconds < LONG else 2
        fitting = int(self.task.seconds_each / max(seconds, 1e-9))
        return min(self.task.repeats, max(least, fitting))

    def _probe(self, line: Line) -> list[tuple[int, float]]:
        """(rows, seconds) of calls on few rows."""
        points: list[tuple[int, float]] = []
        for rows in sorted({min(rows, self.case.n) for rows in PROBE_ROWS}):
            call = self.problem.call(line.loss, rows)
            if line.entrant.compiles:
                call()
            points.append((rows, floors.fastest(call, SHORT)))
        return points

    def _scaled(self, line: Line, predicted: float) -> None:
        timing = Timing(line.entrant.key, clean=[predicted], wanted=1)
        line.rows = min(PROBE_ROWS[-1], self.case.n)
        why = f"a straight line through N = {', '.join(map(str, PROBE_ROWS))}"
        self._result(line.entrant, "scaled", why, line, timing)

    def _needed(self, entrant: Entrant) -> int:
        """Bytes beyond the inputs, roughly."""
        rows = min(self.case.n, entrant.most_rows or self.case.n)
        return int(4 * self.case.v * (entrant.matrices * rows + WEIGHTS * self.case.student_hidden))

    def _free(self) -> int:
        return available_memory() if self.case.device == "cpu" else device.room(self.case.device)

    # ---------------------------------------------------------------------------- results

    def _result(
        self,
        entrant: Entrant,
        status: str,
        why: str = "",
        line: Line | None = None,
        timing: Timing | None = None,
    ) -> None:
        share, work = None, floors.work(self.case)
        if timing is not None and self.floor is not None:
            share = self.floor.seconds_of(entrant.key, self.case) / timing.median
        self._emit(
            "result", **_about(self.task), entrant=entrant.key, title=entrant.title,
            is_ours=entrant.is_ours, status=status, why=why, nearest=entrant.nearest,
            error=None if line is None else line.error,
            time=None if timing is None else timing.as_dict(),
            rows=self.case.n if line is None else line.rows,
            memory=None if line is None else line.memory, floor_share=share, **work,
        )  # fmt: skip

    def _progress(self, note: str) -> None:
        self._steps += 1
        self._emit("progress", share=min(1.0, self._steps / max(1, self._all)), note=note)


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def main() -> int:
    """Reads the task from the command line; nothing but results goes to standard output."""
    task = Task.from_json(sys.argv[1])
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what peers print

    def emit(kind: str, **content: Any) -> None:
        print(json.dumps({"kind": kind, **content}), file=results, flush=True)

    run_task(task, emit)
    return 0


if __name__ == "__main__":
    sys.exit(main())
