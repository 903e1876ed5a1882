"""Runs cases one after the other, each in a child process, and keeps every line as it comes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from . import records
from .entrants import ENTRANTS
from .one_case import Task, result, run_task
from .report import Progress

ROOT = Path(__file__).resolve().parents[1]
#: What must be the same for results to stand in one file.
SAME = ("device", "processor", "instruction_set", "driver", "threads", "torch", "fused_kd",
        "commit", "platform")  # fmt: skip
#: Characters of a crashed child's last words that are kept.
LAST_WORDS = 300


def run(
    tasks: Sequence[Task],
    file: TextIO,
    environment: dict[str, Any],
    command: Sequence[str],
    show: Callable[[Task], None],
    seconds: float | None = None,
    isolate: bool = True,
) -> int:
    """Measures every task; returns how many could not be completed.

    Args:
        tasks: one for each case.
        file: results are appended to it.
        environment: what the figures depend on.
        command: how it was called.
        show: called with every completed task.
        seconds: that all of them may take; None: as long as it takes. Tasks that there is no time
            for are reported, not begun.
        isolate: each in a process of its own, so that a crash ends no more than its case.
    """
    writer, begin, failed = records.Writer(file), time.monotonic(), 0
    writer.write("run", environment=environment, packages=packages(), command=list(command))
    for number, task in enumerate(tasks, 1):
        if seconds is not None:
            left = seconds - (time.monotonic() - begin)
            if left <= 0:
                print(f"LEFT OUT {task.case.name}: the time is up", flush=True)
                continue
            task = replace(task, seconds=left)
        label = f"{number}/{len(tasks)} {task.suite}: {task.case.name}"
        with Progress(label, 100) as progress:
            failed += _measure(task, writer, progress, isolate and task.times)
        show(task)
    return failed


def _measure(task: Task, writer: records.Writer, progress: Progress, isolate: bool) -> bool:
    """Whether a case could not be completed, or not without those that crashed."""
    failed = False
    while True:
        listener = _Listener(writer, progress)
        why = (_child if isolate else _here)(task, listener)
        if why is None:
            return failed
        failed = True
        print(f"FAILED {task.case.name}: {listener.note}: {why}", flush=True)
        if listener.running not in task.entrants:
            return failed
        crashed = listener.running
        writer.write("result", **result(task, ENTRANTS[crashed], "failed", why))
        task = replace(task, entrants=tuple(x for x in task.entrants if x != crashed))


class _Listener:
    """Keeps the lines of a case, shows how far it is, and remembers what was running."""

    def __init__(self, writer: records.Writer, progress: Progress) -> None:
        self.writer, self.progress = writer, progress
        self.note, self.running = "", None

    def __call__(self, kind: str, **content: Any) -> None:
        if kind != "progress":
            self.writer.write(kind, **content)
            return
        self.note, self.running = content["note"], content["running"]
        self.progress.at(content["share"], self.note)


def packages() -> dict[str, str]:
    """Versions of the peers that are installed."""
    found = {entrant.package: entrant.version() for entrant in ENTRANTS.values()}
    return {name: version for name, version in found.items() if name and version}


def _child(task: Task, listener: _Listener) -> str | None:
    """Runs one task in a process of its own; why it did not end well, or None."""
    command = [sys.executable, "-m", "benchmarks.one_case", task.to_json(), str(os.getpid())]
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                                   stderr=said, env=_environment(task))  # fmt: skip
        try:
            assert process.stdout is not None
            for text in process.stdout:
                listener(**records.loads(text))
            status = process.wait()
        finally:  # an interruption ends the child too
            process.kill()
            process.wait()
        if status == 0:
            return None
        said.seek(0)
        words = " ".join(said.read().split())[-LAST_WORDS:]
    return f"its process ended with status {status}: {words}"


def _environment(task: Task) -> dict[str, str]:
    """Of a child on the CPU: a thread for each core.

    Left alone, Linux was seen to keep both of two threads on one core for a whole run. It must not
    be asked for in this process: it binds the first thread, and children are bound as that is.
    """
    bound = {"OMP_PROC_BIND": "spread"} if task.case.device == "cpu" else {}
    return {**bound, **os.environ}


def _here(task: Task, listener: _Listener) -> str | None:
    """The same in this process."""
    try:
        run_task(task, listener)
    except Exception as error:  # the next task runs all the same
        return " ".join(f"{type(error).__name__}: {error}".split())[:LAST_WORDS]
    return None


def differences(before: records.Line, now: records.Line) -> list[str]:
    """In what two runs differ that must be the same: of the environment, and versions of peers.

    A peer that only one of them has is no difference: the other one left it out.
    """
    old, new = before["environment"], now["environment"]
    pairs = [(name, old.get(name), new.get(name)) for name in SAME]
    old, new = before.get("packages", {}), now.get("packages", {})
    pairs += [(name, old[name], new[name]) for name in old if name in new]
    return [f"{name} was {was!r} and is {value!r}" for name, was, value in pairs if was != value]


def read_together(paths: Sequence[Path]) -> records.Report:
    """Files of one machine and version, as one report.

    Raises:
        ValueError: they cannot be read, or were made elsewhere.
    """
    report = records.read(paths)
    for run_line in report.runs:
        if found := differences(run_line, report.runs[-1]):
            raise ValueError(f"files of different machines or versions: {'; '.join(found)}")
    return report
