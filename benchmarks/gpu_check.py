"""``python -m benchmarks.gpu_check``: builds, tests, checks the memory and times on a GPU machine.

Parts, each in a process of its own, one after the other whatever became of those before:

* build: the compiled modules, in place, for the card that is there.
* tests: those marked ``gpu``; several at a time where pytest-xdist is installed.
* sanitizer: small shapes under compute-sanitizer's memcheck, racecheck, initcheck and synccheck.
* logits, linear: those suites of ``python -m benchmarks run``.

Each keeps to its share of ``--minutes`` and says what it left out. Needs what it measures (torch,
triton, nvcc, pytest, compute-sanitizer), uses what it finds, and goes on without the rest. Left in
``--output``: gpu_check.json (everything), gpu_check.log (all output), logits.jsonl, linear.jsonl.
``--device cpu`` runs all of it at tiny sizes, the CPU's backend standing in, and builds nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from .records import SCHEMA
from .report import Parser, positive_float, table

ROOT = Path(__file__).resolve().parents[1]
#: Shares of the time: what an unfinished part may have of what is left.
SHARES = {"build": 150, "tests": 150, "sanitizer": 90, "logits": 110, "linear": 80}
#: Options of the suites, the most wanted sizes first, and tiny ones to try them on a CPU.
SUITES = {
    "logits": ("--dtype bf16 fp32 --v 151936 128256 262144 32000 --n 8192",
               "--dtype bf16 fp32 --v 33 --n 5"),
    "linear": ("--dtype bf16 --v 151936 128256 --n 8192 --hidden 2048 4096",
               "--dtype bf16 --v 33 --n 5 --hidden 8 12"),
}  # fmt: skip
TRIAL = "--repeats 2 --skip compile liger-chunked-compiled"
#: Seconds kept for the report, and for a part that ends by itself before it is ended.
RESERVE, GRACE = 6.0, 8.0
#: Seconds that a part gets even if others took too long.
LEAST = 10.0
#: Lines of a part's output that go into the report.
NOTED = ("FAILED", "ERROR", "LEFT OUT", "SKIPPED")
#: Characters of a part's output that are kept.
KEPT = 10**6
#: Tests that run at a time: each compiles, on one processor.
WORKERS = 12


@dataclass
class Part:
    """How a part went."""

    name: str
    status: str = "skipped"  # or passed, failed
    seconds: float = 0.0
    limit: float = 0.0
    exit_status: int | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class Run:
    """What the parts share."""

    device: str
    output: Path
    log: IO[str]
    environment: dict[str, Any]

    @property
    def processors(self) -> int:
        return os.cpu_count() or 1

    def say(self, text: str) -> None:
        print(text, flush=True)
        print(text, file=self.log, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the parts; returns 0 if none failed, else 1."""
    start = time.monotonic()
    options = _parse(arguments)
    found = _environment(options.device)
    options.output.mkdir(parents=True, exist_ok=True)
    for old in ("gpu_check.json", *(f"{suite}.jsonl" for suite in SUITES)):
        (options.output / old).unlink(missing_ok=True)
    with (options.output / "gpu_check.log").open("w") as log:
        run = Run(options.device, options.output.resolve(), log, found)
        run.say("\n".join(f"{key:<16} {value}" for key, value in found.items()))
        parts: list[Part] = []
        names = [name for name in SHARES if name in options.part]
        for i, name in enumerate(names):
            left = 60 * options.minutes - RESERVE - (time.monotonic() - start)
            share = SHARES[name] / sum(SHARES[later] for later in names[i:])
            parts.append(_run_part(run, name, max(LEAST, left * share)))
            _write(run, parts, names)
        _report(run, parts, time.monotonic() - start)
    return 1 if any(part.status == "failed" for part in parts) else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m benchmarks.gpu_check", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--part", nargs="+", choices=list(SHARES), default=list(SHARES), metavar="PART",
        help=f"of {' '.join(SHARES)} (default: all)")  # fmt: skip
    add("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    add("--output", type=Path, default=Path("out/gpu_check"), metavar="DIR",
        help="default: %(default)s")  # fmt: skip
    add("--minutes", type=positive_float, default=9.0, help="for all of it (default: %(default)g)")
    return parser.parse_args(arguments)


def _environment(device: str) -> dict[str, Any]:
    """Asked of another process: the one that builds must not have the modules loaded."""
    command = [sys.executable, "-m", "benchmarks.device", "--device", device]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        why = (done.stderr.strip() or "no reason given").splitlines()[-1]
        print(f"python -m benchmarks.gpu_check: error: {why}; --device cpu tries everything at "
              "tiny sizes", file=sys.stderr)  # fmt: skip
        raise SystemExit(2)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


# -------------------------------------------------------------------------------------- a part


def _run_part(run: Run, name: str, limit: float) -> Part:
    part = Part(name, limit=round(limit, 1))
    run.say(f"\n===== {name}: at most {limit:.0f} s")
    begin = time.monotonic()
    try:
        PARTS[name](run, part)
    except Exception as error:  # the next part runs all the same
        part.status = "failed"
        part.notes.append(f"FAILED {name}: {type(error).__name__}: {error}")
    part.seconds = round(time.monotonic() - begin, 1)
    run.say(f"===== {name}: {part.status} after {part.seconds:.0f} s")
    return part


def _build(run: Run, part: Part) -> None:
    if run.device == "cpu":
        part.notes.append("SKIPPED the CPU's backend is used as it lies there")
        return
    environment = {"MAX_JOBS": str(run.processors)}
    if run.environment["nvcc"]:
        environment["FUSED_KD_CUDA"] = "1"  # its failure is one
    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        environment["TORCH_CUDA_ARCH_LIST"] = run.environment["capability"]
    _call(run, part, [sys.executable, "setup.py", "build_ext", "--inplace"], environment)
    run.environment = _environment(run.device)
    for name, state in run.environment["backends"].items():
        if state == "available":
            continue
        must_be_there = name != "cuda" or run.environment["nvcc"]
        part.notes.append(f"{'FAILED' if must_be_there else 'SKIPPED'} backend {name}: {state}")
        part.status = "failed" if must_be_there else part.status


def _tests(run: Run, part: Part) -> None:
    if importlib.util.find_spec("pytest") is None:
        part.notes.append("SKIPPED pytest is not installed")
        return
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_gpu*.py"))
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider",
               "--durations=10", *files]  # fmt: skip
    workers = min(WORKERS, 3 * run.processors // 4)
    if run.device == "cuda" and workers > 1:
        if importlib.util.find_spec("xdist") is None:
            part.notes.append("pytest-xdist is not installed: one test at a time")
        else:
            command += ["-n", str(workers), "--dist", "loadgroup"]
    until = time.time() + part.limit - GRACE
    environment = {"GPU_CHECK_DEVICE": run.device, "GPU_CHECK_UNTIL": f"{until:.1f}"}
    _call(run, part, command, environment)


def _sanitizer(run: Run, part: Part) -> None:
    _script(run, part, "benchmarks.gpu_sanitizer")


def _suite(run: Run, part: Part) -> None:
    real, tiny = SUITES[part.name]
    sizes = real if run.device == "cuda" else f"{tiny} {TRIAL}"
    output = str(run.output / f"{part.name}.jsonl")
    _script(run, part, "benchmarks", "run", part.name, "--in-process", *sizes.split(),
            "--output", output)  # fmt: skip


PARTS: dict[str, Callable[[Run, Part], None]] = {
    "build": _build,
    "tests": _tests,
    "sanitizer": _sanitizer,
    **dict.fromkeys(SUITES, _suite),
}


def _script(run: Run, part: Part, module: str, *arguments: str) -> None:
    seconds = max(1.0, part.limit - GRACE)
    limits = ["--device", run.device, "--seconds", f"{seconds:.1f}"]
    _call(run, part, [sys.executable, "-m", module, *arguments, *limits], {})


def _call(run: Run, part: Part, command: list[str], environment: dict[str, str]) -> None:
    """Runs a command, shows and keeps what it says, and ends it where its time is up."""
    shown = [f"{key}={value}" for key, value in environment.items()]
    run.say(" ".join([*shown, shlex.join(command)]))
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1", **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace", start_new_session=True,
    )  # fmt: skip
    reader = threading.Thread(target=_follow, args=(run, part, process), daemon=True)
    reader.start()
    try:
        part.exit_status = process.wait(part.limit)
    except subprocess.TimeoutExpired:
        part.notes.append(f"FAILED {part.name}: ended after {part.limit:.0f} s, unfinished")
    finally:
        _end(process)
        reader.join(5)
    part.status = "passed" if part.exit_status == 0 else "failed"


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
    """Ends the process and those that it started."""
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


# -------------------------------------------------------------------------------------- report


def _write(run: Run, parts: Sequence[Part], names: Sequence[str]) -> None:
    """After every part: what there is lies there, whatever comes."""
    measured: dict[str, list[Any]] = {}
    for name in SUITES:
        lines = run.output / f"{name}.jsonl"
        found = lines.read_text().splitlines() if lines.exists() else []
        measured[name] = [json.loads(line) for line in found if line.endswith("}")]
    content = {
        "schema": SCHEMA,
        "environment": run.environment,
        "parts": [asdict(part) for part in parts],
        "not_run": list(names[len(parts) :]),
        **measured,
    }
    text = json.dumps(content, indent=1, ensure_ascii=False, default=str)
    (run.output / "gpu_check.json").write_text(text + "\n")


def _report(run: Run, parts: Sequence[Part], seconds: float) -> None:
    rows = [[p.name, p.status, f"{p.seconds:.0f}", f"{p.limit:.0f}", str(len(p.notes))]
            for p in parts]  # fmt: skip
    run.say("\n" + table(["part", "", "s", "at most", "notes"], rows))
    for part in parts:
        for note in part.notes[:40]:
            run.say(f"{part.name}: {note}")
    run.say(f"{run.environment['device']}: {seconds:.0f} s in all; written to {run.output}")


if __name__ == "__main__":
    sys.exit(main())
