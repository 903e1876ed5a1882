"""Runs cases one after the other, each in a child process, and keeps every record as it comes."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection

from .methods import METHODS
from .one_case import Task, one_line, run_task
from .records import Writer
from .schema import Bound, Record, Result, Run
from .tables import case_name, line

try:
    from tqdm import tqdm
except ImportError:  # a machine that is only measured on may have nothing but torch
    tqdm = None

#: Of Linux's prctl: the signal to receive when the parent ends.
PR_SET_PDEATHSIG = 1


def run(
    tasks: Sequence[Task], writer: Writer, begin: Run, seconds: float | None, isolate: bool
) -> int:
    """Measure every task, one for each case; return how many could not be completed.

    Args:
        tasks: what to measure.
        writer: of the file of results.
        begin: its first record.
        seconds: that all of them may take; None: no limit. Tasks that there is no time for are
            reported, not begun.
        isolate: each in a process of its own, so that a crash ends no more than its case.
    """
    started, failed = time.monotonic(), 0
    writer.add(begin)
    for task in tasks if tqdm is None else tqdm(tasks, desc="cases", disable=None):
        name = case_name(task.suite, task.case)
        if seconds is not None:
            task = replace(task, seconds=started + seconds - time.monotonic())
            if task.seconds <= 0:
                print(f"LEFT OUT {name}: the time is up", flush=True)
                continue
        print(f"\n{name}", flush=True)
        failed += _measure(task, writer, isolate and task.times)
    return failed


def _measure(task: Task, writer: Writer, isolate: bool) -> bool:
    """Return True if a case could not be completed, or not without those that crashed."""
    running, failed = None, False

    def keep(record: Record | str | None) -> None:
        nonlocal running
        if record is None or isinstance(record, str):
            running = record
            return
        writer.add(record)
        if isinstance(record, Result | Bound):
            print(line(record), flush=True)

    while why := _child(task, keep) if isolate else _here(task, keep):
        failed = True
        print(f"FAILED {task.case.name}: {running or 'the inputs'}: {why}", flush=True)
        if running is None:
            break
        keep(task.result(METHODS[running], "failed", why))
        task = replace(task, methods=tuple(name for name in task.methods if name != running))
    return failed


def send(task: Task, sender: Connection, parent: int) -> None:
    """Run a task in a child that ends with its parent, also if that is killed.

    A run that is killed must release the machine, and must not disturb the next one. Without such
    a call, the first record that has no receiver ends the process.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)  # Linux's
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() == parent:
        os.dup2(2, 1)  # what peers print
        run_task(task, sender.send)


#: What a child runs.
TARGET = send


def _child(task: Task, keep) -> str | None:
    """Run one task in a process of its own; return why it did not end well, or None."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=TARGET, args=(task, sender, os.getpid()), daemon=True)
    # A thread for each core: left alone, Linux was seen to keep both of two threads on one core for
    # a whole run. This process must not be bound so: its children would be bound to one core.
    bound = task.case.device == "cpu" and "OMP_PROC_BIND" not in os.environ
    if bound:
        os.environ["OMP_PROC_BIND"] = "spread"
    try:
        process.start()
        sender.close()
        while True:
            keep(receiver.recv())
    except EOFError:
        process.join()
    finally:  # an interruption ends the child too
        process.kill()
        process.join()
        if bound:
            del os.environ["OMP_PROC_BIND"]
    return None if process.exitcode == 0 else f"its process ended with status {process.exitcode}"


def _here(task: Task, keep) -> str | None:
    """Run one task in this process; return why it did not end well, or None."""
    try:
        run_task(task, keep)
    except Exception as error:  # the next task runs all the same
        return one_line(error)
    return None
