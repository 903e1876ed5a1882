"""Run cases one after the other, each in a child process; write, read and resume result files."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from math import inf
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TextIO
from unittest import mock

import torch

from .cases import GUARD, SUITES, Case
from .measuring import PEERS
from .measuring import environment as environment_of
from .methods import METHODS, one_line, taking_part
from .one_case import SCHEMA, Record, Task, measure

#: Fields of an environment that must be equal within a result file: machine and versions.
SAME = "device", "processor", "instruction_set", "threads", "platform"
SAME += "torch", "fused_kd", "commit"
INTERRUPTED = 130  # the exit status
#: A child is killed if it sends nothing for PATIENCE limits of a call, plus COMPILATION seconds.
PATIENCE, COMPILATION = 4, 180


def read(*paths: Path) -> list[Record]:
    """Return the records of files, but no last line that was cut off; ValueError if malformed."""
    records = []
    for path in paths:
        *lines, _ = path.read_text().split("\n")
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line, parse_constant=lambda name: inf)  # NaN too
                if record["schema"] != SCHEMA:
                    raise ValueError(f"its schema is not {SCHEMA}")
                if record["kind"] != "run":
                    record["case"] = Case(**record["case"])
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path}:{number}: no line of results ({error})") from error
            records.append(record)
        if not any(record["kind"] == "run" for record in records):
            raise ValueError(f"{path}: no results in it")
    return records


def environment(records: Iterable[Record]) -> dict[str, Any]:
    """Return the environment of the last run in the records, which include a run."""
    return [record for record in records if record["kind"] == "run"][-1]["environment"]


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a text for each field, or version of a peer, in which two environments differ.

    A peer that is installed in one of them alone is no difference.
    """
    before, now = ({**x, **x.get("packages", {})} for x in (before, now))
    names = (*SAME, *sorted(PEERS))
    changed = [x for x in names if x in before and x in now and before[x] != now[x]]
    return [f"{name} was {before[name]!r} and is {now[name]!r}" for name in changed]


def tasks(options: Namespace, records: Sequence[Record]) -> Iterator[Task]:
    """Yield a task for each case that lacks records; ValueError for an unknown suite.

    It measures again what the records have of its case: times of two runs cannot be compared.
    """
    limits = options.repeats, options.seconds_each, options.limit_seconds
    if unknown := {*options.suites} - {*SUITES}:
        raise ValueError(f"unknown suites {unknown}; there are {' '.join(SUITES)}")
    for suite in options.suites or [name for name in SUITES if name != GUARD]:
        for case in dict.fromkeys(SUITES[suite][0](options)):
            methods = taking_part(suite, case, options.peers)
            same = [x for x in records if (x.get("suite"), x.get("case")) == (suite, case)]
            known = {x["method"] for x in same if x["kind"] == "result"}
            wanted = {METHODS[name].key for name in methods}
            if wanted - known or (wanted and all(x["kind"] != "done" for x in same)):
                methods = taking_part(suite, case, wanted | known)
                yield Task(suite, case, methods, *limits, time.time() + options.seconds)


def run(options: Namespace) -> int:
    """Measure and append missing results; return the exit status. ValueError for bad options."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device: torch {torch.__version__} finds no CUDA device")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    path, machine, records = options.output, environment_of(options.device), []
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and (content := path.read_bytes()):
        if not options.resume:
            raise ValueError(f"--output: {path} is not empty; --resume, or another name")
        records = read(path)
        if changed := differences(environment(records), machine):
            raise ValueError(f"--resume: {path} was made elsewhere: {'; '.join(changed)}")
        os.truncate(path, content.rfind(b"\n") + 1)  # a last line that was cut off
    remaining = list(tasks(options, records))
    with path.open("a") as file:
        begin = {"schema": SCHEMA, "kind": "run", "environment": machine, "command": sys.argv[1:]}
        _write(file, begin)
        try:
            return int(any([_run_task(x, file, not options.in_process) for x in remaining]))
        except KeyboardInterrupt:
            print(f"\ninterrupted; what is measured is kept: --resume --output {path}")
            return INTERRUPTED


def _run_task(task: Task, file: TextIO, isolate: bool) -> bool:
    """Measure a case and append its records; return True if a process crashed or ours failed."""
    print(f"{task.suite}: {task.case.name}", flush=True)
    if time.time() > task.end:
        print("LEFT OUT: the time is up", flush=True)
        return False
    failed, running = False, ""
    try:
        for record in _in_child(task) if isolate else measure(task):
            if isinstance(record, str):
                running = record
            else:
                failed |= record.get("status") in ("wrong", "failed") and record["is_ours"]
                _write(file, record)
        return failed
    except Exception as error:  # the other methods are measured without this one
        if not running:
            print(f"FAILED {one_line(error)}", flush=True)
            return True
        status = "no time" if isinstance(error, TimeoutError) else "failed"
        _write(file, task.result(running, status, one_line(error)))
        others = tuple(name for name in task.methods if name != running)
        return _run_task(replace(task, methods=others), file, isolate) or status == "failed"


def _write(file: TextIO, record: Record) -> None:
    """Append a record to a file; print it too if it is a result."""
    print(json.dumps(record, default=vars), file=file, flush=True)
    if record["kind"] == "result":
        word = {"measured": "", "wrong": "FAILED", "failed": "FAILED"}
        status, time = word.get(record["status"], record["status"]), record["time"]
        seconds = f"{1e3 * time['median_s']:.4g} ms of {time['repeats']}" if time else ""
        errors = " ".join(f"{x:.1e}" for x in record["error"].values() if x is not None)
        print(
            f"{status:<9} {record['title']:<44} {seconds:<20} {errors} {record['why']}", flush=True
        )


def send(task: Task, sender: Connection) -> None:
    """Run a task, in a child, and send its records; fail if the receiver is closed."""
    os.dup2(2, 1)  # what peers print
    if (score := Path("/proc/self/oom_score_adj")).exists():
        score.write_text("1000")  # if memory does not suffice, Linux ends this process first
    for record in measure(task):
        sender.send(record)


def _in_child(task: Task) -> Iterator[Record | str]:
    """Yield a task's records from a child; RuntimeError if that crashed, TimeoutError if it hangs.

    Threads are bound to cores: otherwise Linux was seen to keep both of two threads on one core for
    a whole run. This process must not be bound: its children would all be bound to one core.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send, args=(task, sender), daemon=True)
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    bound = {"OMP_PROC_BIND": "spread"} if task.case.device == "cpu" else {}
    with mock.patch.dict(os.environ, {**bound, **os.environ, **threads}):
        process.start()
    sender.close()
    seconds = PATIENCE * task.limit_seconds + COMPILATION
    try:
        while receiver.poll(seconds):
            yield receiver.recv()
        raise TimeoutError(f"it did not end within {seconds:g} s")
    except EOFError:
        process.join()
    finally:  # an interruption ends the child too
        process.kill()
        process.join()
    if process.exitcode:
        raise RuntimeError(f"its process ended with status {process.exitcode}")
