"""Runs cases one after the other, each in a child process, and keeps every line as it comes."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from . import records
from .entrants import ENTRANTS
from .one_case import Task, run_task
from .report import Progress

ROOT = Path(__file__).resolve().parents[1]
#: What must be the same for results to stand in one file.
SAME = ("device", "processor", "threads", "torch", "fused_kd", "commit", "platform")
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
        if seconds is not None and time.monotonic() - begin > seconds:
            print(f"LEFT OUT {task.case.name}: the time is up", flush=True)
            continue
        label = f"{number}/{len(tasks)} {task.suite}: {task.case.name}"
        with Progress(label, 100) as progress:
            why = (_child if isolate and task.times else _here)(task, writer, progress)
        if why is not None:
            print(f"FAILED {task.case.name}: {why}", flush=True)
            failed += 1
        show(task)
    return failed


def packages() -> dict[str, str]:
    """Versions of the peers that are installed."""
    found = {entrant.package: entrant.version() for entrant in ENTRANTS.values()}
    return {name: version for name, version in found.items() if name and version}


def _child(task: Task, writer: records.Writer, progress: Progress) -> str | None:
    """Runs one task; why it did not end well, or None."""
    command = [sys.executable, "-m", "benchmarks.one_case", task.to_json()]
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                                   stderr=said)  # fmt: skip
        try:
            assert process.stdout is not None
            for text in process.stdout:
                _take(writer, progress, **json.loads(text))
            status = process.wait()
        finally:  # an interruption ends the child too
            process.kill()
            process.wait()
        if status == 0:
            return None
        said.seek(0)
        words = " ".join(said.read().split())[-LAST_WORDS:]
    return f"its process ended with status {status}: {words}"


def _here(task: Task, writer: records.Writer, progress: Progress) -> str | None:
    """The same in this process."""
    try:
        run_task(task, partial(_take, writer, progress))
    except Exception as error:  # the next task runs all the same
        return " ".join(f"{type(error).__name__}: {error}".split())[:LAST_WORDS]
    return None


def _take(writer: records.Writer, progress: Progress, kind: str, **content: Any) -> None:
    if kind == "progress":
        progress.at(content["share"], content["note"])
    else:
        writer.write(kind, **content)


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In what two environments differ that must be the same."""
    return [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in SAME
        if before.get(name) != now.get(name)
    ]
