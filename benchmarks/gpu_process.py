"""A part of the GPU check as a process of its own: shown as it comes, ended when its time is up."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from .gpu_guard import HUNG, LOST

ROOT = Path(__file__).resolve().parents[1]
#: Seconds kept for a part that ends by itself before it is ended.
GRACE = 6.0
#: Lines of a part's output that go into the report.
NOTED = ("FAILED", "ERROR", "LEFT OUT", "SKIPPED")
#: Characters of a part's output that are kept.
KEPT = 10**6
#: Exit statuses with a meaning of their own.
MEANINGS = {
    LOST: "the device's context was lost: what came after that error is unknown",
    HUNG: "a call did not return: what should have followed is unknown",
}


@dataclass
class Part:
    """How a part went."""

    name: str
    status: str = "skipped"  # or running, passed, failed
    seconds: float = 0.0
    limit: float = 0.0
    exit_status: int | None = None
    notes: list[str] = field(default_factory=list)

    def skip(self, why: str) -> None:
        self.status = "skipped"
        self.notes.append(f"SKIPPED {why}")


@dataclass
class Run:
    """What the parts share."""

    device: str
    output: Path
    log: IO[str]
    environment: dict[str, Any]
    variables: dict[str, str] = field(default_factory=dict)  # of every part's environment

    @property
    def processors(self) -> int:
        return os.cpu_count() or 1

    def refresh(self) -> None:
        """Ask again what is there: a build may have added something."""
        self.environment = environment(self.device)

    def say(self, text: str) -> None:
        print(text, file=self.log, flush=True)  # first: what was seen is in it
        print(text, flush=True)


def environment(device: str) -> dict[str, Any]:
    """Return what is there, asked in another process: one that builds must not load the modules.

    Raises:
        LookupError: There is no such device; the message says why.
    """
    command = [sys.executable, "-m", "benchmarks.device", "--device", device]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LookupError((done.stderr.strip() or "no reason given").splitlines()[-1])
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def script(run: Run, part: Part, module: str, *arguments: str) -> None:
    """Run a module of the benchmarks within the part's time, of which it is told."""
    seconds = max(1.0, part.limit - GRACE)
    limits = ["--device", run.device, "--seconds", f"{seconds:.1f}"]
    call(run, part, [sys.executable, "-m", module, *arguments, *limits], {})


def call(run: Run, part: Part, command: list[str], environment: dict[str, str]) -> None:
    """Run a command, show and keep what it prints, and end it when the part's time is up.

    A part may consist of several calls: it has failed if one of them has.
    """
    environment = {**run.variables, **environment}
    shown = [f"{key}={value}" for key, value in environment.items()]
    run.say(" ".join([*shown, shlex.join(command)]))
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1", **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace", start_new_session=True,
    )  # fmt: skip
    reader = threading.Thread(target=_follow, args=(run, part, process), daemon=True)
    reader.start()
    status: int | None = None
    try:
        status = process.wait(part.limit)
    except subprocess.TimeoutExpired:
        part.notes.append(f"FAILED {part.name}: ended after {part.limit:.0f} s, unfinished")
    finally:
        _end(process)
        reader.join(5)
    if status in MEANINGS:
        part.notes.append(f"FAILED {part.name}: {MEANINGS[status]}")
    part.exit_status = status
    part.status = "passed" if status == 0 and part.status != "failed" else "failed"


def _follow(run: Run, part: Part, process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    kept = 0
    for line in process.stdout:
        kept += len(line)
        if kept < KEPT:
            run.say(line.rstrip("\n"))
        if line.startswith(NOTED) and len(part.notes) < 200:
            part.notes.append(line.strip()[:400])
    if kept >= KEPT:
        run.say(f"... {kept - KEPT} more characters")


def _end(process: subprocess.Popen[str]) -> None:
    """End the process and those that it started."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            break
        try:
            process.wait(3)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
