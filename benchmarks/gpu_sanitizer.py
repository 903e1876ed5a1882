"""``python -m benchmarks.gpu_sanitizer``: the memory check, alone and under compute-sanitizer.

First alone; then under memcheck and synccheck, without torch's caching of memory, which would hide
what is used after it was freed. All processes at the same time, each with a slice of the cases.
racecheck and initcheck are left to the emulator's tests: the first does not follow barriers that
bulk copies complete.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from .device import Budget
from .gpu_options import make_parser, parse, usable

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("memcheck", "synccheck")
#: The wheel that holds the command, where the toolkit on the machine has none.
WHEEL = "nvidia-cuda-sanitizer-api"
ABSENT = f"no compute-sanitizer on PATH, in a CUDA toolkit, or in the wheel {WHEEL}"
#: What the tool exits with if it found something.
FOUND = 97
#: Share of the time that the first run, alone, may take.
ALONE = 0.4
#: Seconds to start a process and to end it, within its share.
START, END = 10.0, 6.0
#: Lines shown of a process that failed.
SHOWN = 40


@dataclass
class Worker:
    """A process at work."""

    name: str
    process: subprocess.Popen[bytes]
    output: IO[bytes]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if anything was found, or wrong."""
    options = parse(make_parser("gpu_sanitizer", __doc__, seconds=90.0), arguments)
    budget, names = Budget(options.seconds), usable(options)
    if not names:
        return 0
    failed = _alone(names, options.device, budget.left() * ALONE)
    why, tool = ("there is no GPU here", None) if options.device == "cpu" else (ABSENT, find())
    if tool is None:
        print(f"SKIPPED the sanitizer: {why}", flush=True)
    else:
        print(f"{tool}\n{_version(tool)}", flush=True)
        failed += _under(tool, names, options.device, max(START + END, budget.left()) - END)
    return 1 if failed else 0


def _alone(names: list[str], device: str, seconds: float) -> int:
    """How many processes failed."""
    slices = max(1, min(12, (os.cpu_count() or 1) - 4)) if device == "cuda" else 1
    workers = [
        _start(f"alone {i}/{slices}", [], _check(names, f"{i}/{slices}", seconds, device))
        for i in range(slices)
    ]
    limit = Budget(seconds + END)
    return sum(_failed(worker, limit.left(), "") for worker in workers)


def _under(tool: str, names: list[str], device: str, seconds: float) -> int:
    """How many processes failed, a planted error that was not found among them."""
    slices = max(1, (os.cpu_count() or 1) // (len(TOOLS) * max(1, len(names))))
    planted = _start("planted", _command(tool, TOOLS[0]), ["--planted"])
    workers = [
        _start(f"{name} {backend} {i}/{slices}", _command(tool, name),
               _check([backend], f"{i}/{slices}", seconds - START, device))
        for name in TOOLS for backend in names for i in range(slices)
    ]  # fmt: skip
    limit = Budget(seconds)
    failed = sum(_failed(w, limit.left(), w.name.split()[0]) for w in workers)
    status, text = _wait(planted, limit.left())
    if _is_unsupported(text):
        return failed
    is_found = status == FOUND and verdict(status, text, TOOLS[0]) is not None
    print(f"{'' if is_found else 'FAILED '}{TOOLS[0]}: a planted write outside was "
          f"{'' if is_found else 'not '}found", flush=True)  # fmt: skip
    return failed + (not is_found)


def find() -> str | None:
    """The command: on PATH, in a toolkit, or in its wheel."""
    homes = [home for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))]
    folders = [f"{home}/{sub}" for home in (*homes, "/usr/local/cuda")
               for sub in ("bin", "compute-sanitizer")]  # fmt: skip
    found = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(folders)
    )
    if found is not None:
        return found
    try:
        files = importlib.metadata.files(WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    every = [str(file.locate()) for file in files if file.name == "compute-sanitizer"]
    return next((path for path in every if os.access(path, os.X_OK)), None)


def _version(tool: str) -> str:
    done = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False)
    return (done.stdout.strip() or done.stderr.strip() or "of unknown version").splitlines()[-1]


def _command(tool: str, name: str) -> list[str]:
    return [tool, "--tool", name, "--error-exitcode", str(FOUND), "--print-limit", "20",
            "--target-processes", "application-only"]  # fmt: skip


def _check(names: list[str], cut: str, seconds: float, device: str) -> list[str]:
    return ["--device", device, "--backends", *names, "--slice", cut,
            "--seconds", f"{max(1.0, seconds):.1f}"]  # fmt: skip


def _start(name: str, prefix: list[str], arguments: list[str]) -> Worker:
    command = [*prefix, sys.executable, "-m", "benchmarks.gpu_memory_check", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    if prefix:
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    output = tempfile.TemporaryFile()  # noqa: SIM115  it is read when the process has ended
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
    )
    return Worker(name, process, output)


def _wait(worker: Worker, seconds: float) -> tuple[int | None, str]:
    """Its exit status, None if it had to be ended, and its output."""
    try:
        status: int | None = worker.process.wait(max(0.1, seconds))
    except subprocess.TimeoutExpired:
        worker.process.kill()
        worker.process.wait()
        status = None
    worker.output.seek(0)
    text = worker.output.read().decode(errors="replace")
    worker.output.close()
    return status, text


def _failed(worker: Worker, seconds: float, tool: str) -> bool:
    """Waits for the process, says what came of it, and whether that is a failure."""
    status, text = _wait(worker, seconds)
    left_out = re.findall(r"^LEFT OUT .*$", text, re.MULTILINE)
    if tool and _is_unsupported(text):
        print(f"SKIPPED {worker.name}: the sanitizer does not support this device", flush=True)
        return False
    why = verdict(status, text, tool)
    if why is None:
        done = ", ".join(re.findall(r"^\w+: \d+ cases$", text, re.MULTILINE))
        print(f"{worker.name}: {done}{', nothing found' * bool(tool)}", *left_out, sep="\n",
              flush=True)  # fmt: skip
        return False
    print(f"FAILED {worker.name}: {why}", *left_out, *_excerpt(text), sep="\n", flush=True)
    return True


def _is_unsupported(text: str) -> bool:
    return re.search(r"^=+ .*not supported", text, re.MULTILINE | re.IGNORECASE) is not None


def verdict(status: int | None, text: str, tool: str) -> str | None:
    """What is wrong with a run that ended so, or None."""
    if status is None:
        return "not finished in its time"
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)
    if tool and any(int(count) for count in summary):
        return f"{sum(map(int, summary))} found"
    if status != 0:
        return f"exit status {status}"
    if tool and not summary:
        return "the sanitizer gave no summary"
    return None


def _excerpt(text: str) -> list[str]:
    """What the sanitizer or the check complains of, not all that went before."""
    lines = [line.rstrip() for line in text.splitlines()]
    told = [line for line in lines if line.startswith(("=========", "FAILED"))] or lines
    return told[:SHOWN]


if __name__ == "__main__":
    sys.exit(main())
