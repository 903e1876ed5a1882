"""One case of a suite, measured: for each method, is it right, how large, how fast."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

# What eager needs at large sizes leaves no room for fragments on a GPU.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages

import torch

from .accuracy import errors, units
from .cases import ACCURACY, LOGITS, STEP, Case
from .measuring import Call, clock, peak_bytes
from .methods import FORWARD, METHODS, Loss
from .problems import PROBLEMS, Problem, after_heads

#: A line of a file of results; docs/benchmarks.md lists the fields.
Record = dict[str, Any]
SCHEMA = 4
#: Relative errors beyond which a method is wrong.
WRONG = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.05}
#: Repeats at least; if a call takes more seconds than LONG, two.
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
    threads: int | None = None
    end: float = inf  # time.time() after which nothing is begun

    def record(self, kind: str, **fields: Any) -> Record:
        """Return a record of the case."""
        return {"schema": SCHEMA, "kind": kind, "suite": self.suite, "case": self.case, **fields}

    def result(self, name: str, status: str, why: str = "", **measured: Any) -> Record:
        """Return the record of a method."""
        method = METHODS[name]
        about = {x: getattr(method, x) for x in ("title", "is_ours", "nearest")}
        about |= {"method": method.key, "status": status, "why": why}
        empty = {"error": {}, "time": None, "memory": {}, "bound_share": None}
        return self.record("result", **about, **{**empty, **measured})


class Rejected(Exception):
    """Raised with the status and the reason of a method that is not measured further."""


@dataclass(eq=False)
class Turn:
    """A method in a case, measured so far."""

    name: str  # in METHODS; "": the lower bound
    fields: dict[str, Any] = field(default_factory=dict)  # of its record
    loss: Loss | None = None
    call: Call | None = None
    repeats: int = 0  # that are wanted
    seconds: list[float] = field(default_factory=list)

    def time(self) -> dict[str, Any]:
        """Return the "time" of its record."""
        several = self.seconds if len(self.seconds) > 1 else self.seconds * 2
        low, median, high = statistics.quantiles(several, n=4, method="inclusive")
        return {"median_s": median, "quartiles_s": [low, high], "repeats": len(self.seconds)}


def measure(task: Task) -> Iterator[Record | str]:
    """Measure one case; yield its records, and before each step the key of the method that runs.

    A case that the clock cut off has no record "done": another run completes it.
    """
    if task.threads is not None:
        torch.set_num_threads(task.threads)
    case, problem = task.case, PROBLEMS[task.case.level](task.case)
    turns, first, is_late = [Turn(name) for name in task.methods], [], False
    for step in (_check, _prepare):
        # what was compiled for a few rows may be dynamic now, and more sizes would run eagerly
        if any(METHODS[turn.name].compiles for turn in turns):
            torch.compiler.reset()
        for turn in list(turns):
            yield turn.name
            is_late |= time.time() > task.end
            if record := _attempt(_reject if is_late else step, task, problem, turn):
                turns.remove(turn)
                yield record
    bound = problem.lower_bound() if turns else None
    if bound is not None:
        first.append(_plan(task, Turn("", call=bound.call), clock(bound.call, case.device)))
    for turn in in_turns([*first, *turns]):
        yield turn.name
        if turn in (*first, *turns) and (record := _attempt(_repeat, task, problem, turn)):
            turns.remove(turn)
            yield record
    if bound is not None:
        least, seconds = bound.times * first[0].time()["median_s"], first[0].time()
        yield task.record("bound", name=bound.name, why=bound.why, seconds=least, time=seconds)
    for turn in turns:
        method, seconds = METHODS[turn.name], turn.time()
        if bound is not None and not method.nearest:
            own = least / (1.5 if method.key.startswith(FORWARD) else 1)  # writes no gradient
            turn.fields["bound_share"] = own / seconds["median_s"]
        yield task.result(turn.name, "measured", time=seconds, **turn.fields)
    if not is_late:
        yield task.record("done", threads=torch.get_num_threads())


def in_turns(turns: Sequence[Turn]) -> Iterator[Turn]:
    """Yield each its wanted number of times: A B C A B C ...

    So drift of the machine affects all of them equally. Fewer repeats are spread over all rounds.
    """
    rounds = max((turn.repeats for turn in turns), default=0)
    for number in range(rounds):
        for turn in turns:
            before, after = (int(t * turn.repeats / rounds + 0.5) for t in (number, number + 1))
            if after > before:
                yield turn


def _attempt(step: Callable[..., None], task: Task, problem: Problem, turn: Turn) -> Record | None:
    """Run a step with a method; return its record if it cannot go on."""
    try:
        step(task, problem, turn)
        return None
    except Rejected as rejected:
        ending = rejected.args
    except torch.OutOfMemoryError:
        ending = "no memory", "the GPU's memory does not suffice"
    except Exception as error:  # of a peer, of a compiler: the others continue
        ending = "failed", one_line(error)
    finally:
        problem.restore()
    gc.collect()
    torch.cuda.empty_cache()
    return task.result(turn.name, *ending, **turn.fields)


def _reject(task: Task, problem: Problem, turn: Turn) -> None:
    raise Rejected("no time", "the time is up")


def _check(task: Task, problem: Problem, turn: Turn) -> None:
    """Compare a method with float64."""
    method = METHODS[turn.name]
    case = replace(task.case, level=method.level)
    if (why := method.why_not(case)) is not None:
        raise Rejected("skipped", why)
    loss = method.build(case)
    turn.loss = after_heads(loss) if (task.case.level, method.level) == (STEP, LOGITS) else loss
    turn.fields["error"] = error = errors(problem, method, turn.loss)
    worst = max((x for x in error.values() if x is not None), default=0.0)
    if case.regime == "randn" and worst >= WRONG[case.dtype]:
        raise Rejected("wrong", f"a relative error of {worst:.2g}")
    if task.suite == ACCURACY:
        turn.fields["units"] = units(case, method.key)
        raise Rejected("measured")


def _prepare(task: Task, problem: Problem, turn: Turn) -> None:
    """Measure memory and one call, which must not exceed the limit."""
    method, case, device = METHODS[turn.name], task.case, task.case.device
    turn.call = problem.call(turn.loss)
    if method.compiles or device != "cpu" or case.level == STEP:
        turn.call()  # compiles, tunes, allocates what is kept
        problem.restore()
    turn.fields["memory"] = {"allocator_bytes": peak_bytes(turn.call, device)}
    problem.restore()
    seconds = clock(turn.call, device)
    if seconds > (limit := task.limit_seconds):
        raise Rejected("no time", f"a call took {seconds:.3g} s, the limit is {limit:g} s")
    _plan(task, turn, seconds)


def _plan(task: Task, turn: Turn, seconds: float) -> Turn:
    """Set the number of repeats of a call of these seconds."""
    least = LEAST_REPEATS if seconds < LONG else 2
    turn.repeats = min(task.repeats, max(least, int(task.seconds_each / max(seconds, 1e-9))))
    return turn


def _repeat(task: Task, problem: Problem, turn: Turn) -> None:
    turn.seconds.append(clock(turn.call, task.case.device))


def one_line(error: Exception) -> str:
    """Return what an exception says, without line breaks."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
