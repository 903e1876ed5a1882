"""Measure one case of a suite: the errors, memory and time of each method."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf
from typing import Any

# At large sizes eager torch leaves no GPU memory for fragmentation.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages

import torch

from fused_kd import kd_loss

from .cases import LOGITS, STEP, Case
from .measuring import Call, clock, peak_bytes
from .methods import METHODS, Loss, Method, after_heads, one_line
from .problems import PROBLEMS, Problem, loss_and_gradients

#: A line of a result file; docs/benchmarks.md lists the fields.
Record = dict[str, Any]
SCHEMA = 5
#: Relative errors beyond which a method is wrong.
WRONG = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.05}
#: The fewest repeats of a call; two if it takes more than LONG seconds.
LEAST_REPEATS, LONG = 3, 5.0


@dataclass(frozen=True)
class Task:
    """What to measure, and how long that may take."""

    suite: str
    case: Case
    methods: tuple[str, ...]  # keys of METHODS
    repeats: int = 15  # at most
    seconds_each: float = 8.0  # that the repeats of a method may take together
    limit_seconds: float = 30.0  # of one call on all rows; slower ones have "no time"
    end: float = inf  # time.time() after which nothing is begun

    def record(self, kind: str, **fields: Any) -> Record:
        """Return a record of the case; kind: "bound", "result" or "done"."""
        return {"schema": SCHEMA, "kind": kind, "suite": self.suite, "case": self.case, **fields}

    def result(self, name: str, status: str, why: str = "", **measured: Any) -> Record:
        """Return the record of a method (a key of METHODS); what was not measured is empty."""
        method = METHODS[name]
        about = {x: getattr(method, x) for x in ("title", "is_ours", "nearest")}
        about |= {"method": method.key, "status": status, "why": why}
        empty = {"error": {}, "time": None, "memory": {}, "bound_share": None}
        return self.record("result", **about, **{**empty, **measured})


class Rejected(Exception):
    """Raised, with a status and a reason, if a method is not measured further."""


@dataclass(eq=False)
class Turn:
    """A method in a case, and what was measured of it so far."""

    name: str  # in METHODS; "": the lower bound
    steps: Any = None  # an iterator; each item is a finished step
    fields: dict[str, Any] = field(default_factory=dict)  # of its record
    repeats: int = 0  # wanted; 0 until one call was timed
    seconds: list[float] = field(default_factory=list)

    def time(self) -> dict[str, Any]:
        """Return the "time" of its record, from at least one repeat."""
        seconds = torch.tensor(self.seconds, dtype=torch.float64)
        low, median, high = (seconds.quantile(x).item() for x in (0.25, 0.5, 0.75))
        return {"median_s": median, "quartiles_s": [low, high], "repeats": len(self.seconds)}


def measure(task: Task) -> Iterator[Record | str]:
    """Measure one case; yield its records, and before each step the method's key in METHODS.

    The key of the lower bound is "". A case without a record "done" (time was up) can be resumed.
    """
    problem, turns = PROBLEMS[task.case.level](task.case), [Turn(name) for name in task.methods]
    for turn in turns:
        turn.steps = _steps(task, problem, turn)

    def attempt(turn: Turn) -> Iterator[Record | str]:
        """Yield a method's key, run its next step; if that fails, drop it and yield its record."""
        yield turn.name
        try:
            if turn.name and not turn.repeats and time.time() > task.end:
                raise Rejected("no time", "the time is up")
            return next(turn.steps)
        except Rejected as rejected:
            ending = rejected.args
        except torch.OutOfMemoryError:
            ending = "no memory", "the GPU's memory does not suffice"
        except Exception as error:  # of a peer or a compiler; other methods continue
            ending = "failed", one_line(error)
        finally:
            problem.restore()
        turns.remove(turn)
        gc.collect()
        torch.cuda.empty_cache()
        if turn.name:
            yield task.result(turn.name, *ending, **turn.fields)

    for _ in ("check", "prepare"):
        # what was compiled for a few rows may become dynamic, and too many sizes run eagerly
        if any(METHODS[turn.name].compiles for turn in turns):
            torch.compiler.reset()
        for turn in list(turns):
            yield from attempt(turn)
    is_late, bound = time.time() > task.end, problem.lower_bound() if turns else None
    if bound is not None:
        turns.insert(0, turn := Turn(""))
        turn.steps = _repeat(task, turn, bound.call)
        yield from attempt(turn)
    for turn in in_turns(turns):
        if turn in turns:
            yield from attempt(turn)
    if not (turns and turns[0].name == ""):
        bound = None  # it failed: no shares
    if bound is not None:
        seconds = turns.pop(0).time()
        unit = seconds["median_s"]
        least, least_forward = bound.times * unit, bound.forward_times * unit
        yield task.record("bound", name=bound.name, why=bound.why, seconds=least, time=seconds)
    for turn in turns:
        method, seconds = METHODS[turn.name], turn.time()
        if bound is not None and not method.nearest:
            own = least if "gradients" in method.compared else least_forward
            turn.fields["bound_share"] = own / seconds["median_s"]
        yield task.result(turn.name, "measured", time=seconds, **turn.fields)
    if not is_late:
        yield task.record("done", threads=torch.get_num_threads())


def in_turns(turns: Sequence[Turn]) -> list[Turn]:
    """Return each turn `repeats` times, evenly spread as A B C A B C, which averages drift."""
    places = [((k + 0.5) / turn.repeats, turn) for turn in turns for k in range(turn.repeats)]
    return [turn for _, turn in sorted(places, key=lambda place: place[0])]


def _steps(task: Task, problem: Problem, turn: Turn) -> Iterator[None]:
    """Fill in `turn`: errors; memory, one call; each repeat. Yields after each; raises Rejected."""
    method, device, level = METHODS[turn.name], task.case.device, task.case.level
    case = replace(task.case, level=method.level)
    if (why := method.why_not(case)) is not None:
        raise Rejected("skipped", why)
    loss = method.build(case)
    loss = after_heads(loss) if method.level == LOGITS else loss
    turn.fields["error"] = error = errors(problem, method, loss)
    worst = max((x for x in error.values() if x is not None), default=0.0)
    if worst >= WRONG[case.dtype]:
        raise Rejected("wrong", f"a relative error of {worst:.2g}")
    yield
    call = problem.call(loss, method.tail)
    if method.compiles or device != "cpu" or level == STEP:
        call()  # compiles, tunes, allocates what is kept
        problem.restore()
    turn.fields["memory"] = {"allocator_bytes": peak_bytes(call, device)}
    problem.restore()
    yield from _repeat(task, turn, call)


def _repeat(task: Task, turn: Turn, call: Call) -> Iterator[None]:
    """Measure a call to set turn.repeats (Rejected if over the limit), then once in each step."""
    seconds, limit = clock(call, task.case.device), task.limit_seconds
    if seconds > limit and turn.name:
        raise Rejected("no time", f"a call took {seconds:.3g} s, the limit is {limit:g} s")
    least = LEAST_REPEATS if seconds < LONG else 2
    turn.repeats = min(task.repeats, max(least, int(task.seconds_each / max(seconds, 1e-9))))
    while True:
        yield
        turn.seconds.append(clock(call, task.case.device))


def errors(problem: Problem, method: Method, loss: Loss) -> dict[str, float | None]:
    """Return relative errors on a few rows: "loss", and "gradients", the largest in norm.

    Infinity if not finite; None if not compared (no gradient, or a loss with another constant).
    """
    student, teacher, labels = problem.few(method.tail)
    double = student.to(torch.float64), teacher.to(torch.float64), labels
    reference = partial(kd_loss, backend="reference", **method.computes(problem.case))
    results = loss_and_gradients(loss, student, teacher, labels)
    distances = []
    for result, exact in zip(results, loss_and_gradients(reference, *double), strict=False):
        distance, size = (result.double() - exact).norm(), exact.norm()
        distances.append(float((distance / (size if size > 0 else 1)).nan_to_num(inf, inf)))
    parts = {"loss": distances[0], "gradients": max(distances[1:], default=None)}
    return {part: error if part in method.compared else None for part, error in parts.items()}
