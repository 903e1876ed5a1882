"""``python -m benchmarks.gpu_check``: builds, tests, measures and checks the memory on a GPU.

Two runs, so that what the first shows can be mended before the second (--run first, --run second;
both without it). Each part is a process of its own that keeps to its share of --minutes; one that
fails, hangs or loses the device does not stop the next.

first, 4 minutes, the CUDA kernels:
  build             the CUDA module, in place; from objects if FUSED_KD_CUDA_OBJECTS names them
  smoke             every divergence, dtype and cluster size against float64
  operators         each operator by itself, over a copy's time
  ncu               occupancy, memory, issue slots of three kernels
  cuda-tests        the tests marked gpu
  heads-times       the loss of heads by rows of a chunk, over its four products
second, 5 minutes:
  triton            the smoke of the Triton kernels, whose programs wait for each other; 30 s
  triton-operators, triton-tests
  logits, heads     those suites of `python -m benchmarks run`, with eager torch
  peers             the same at one size with torch.compile and Liger
  memory            small shapes under compute-sanitizer, the CUDA kernels alone

Needs what it measures, uses what it finds, and goes on without the rest. Left in --output:
gpu_check.json (everything; rewritten before and after each part), gpu_check.log (all output, as it
came), <part>.jsonl. --device cpu runs all of it at tiny sizes, the CPU's backend standing in.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import gpu_process, triton_cache
from .gpu_parts import MINUTES, PARTS, minutes, names
from .gpu_process import Part, Run
from .report import Parser, positive_float, table
from .schema import SCHEMA

#: Seconds kept for the report.
RESERVE = 4.0
#: Seconds that a part gets even if others took too long.
LEAST = 10.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; return 0 if none failed, else 1."""
    start = time.monotonic()
    options = _parse(arguments)
    try:
        found = gpu_process.environment(options.device)
    except LookupError as error:
        print(f"python -m benchmarks.gpu_check: error: {error}; --device cpu tries everything at "
              "tiny sizes", file=sys.stderr)  # fmt: skip
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    for old in ("gpu_check.json", *(f"{name}.jsonl" for name in options.part)):
        (options.output / old).unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, _terminated)  # a part under way is ended, not left behind
    with (options.output / "gpu_check.log").open("w") as log:
        run = Run(options.device, options.output.resolve(), log, found)
        run.say("\n".join(f"{key:<16} {value}" for key, value in found.items()))
        _use_cache(run)
        parts: list[Part] = []
        for i, name in enumerate(options.part):
            left = 60 * options.minutes - RESERVE - (time.monotonic() - start)
            share = PARTS[name].share / sum(PARTS[later].share for later in options.part[i:])
            limit = min(PARTS[name].most, max(LEAST, left * share))
            parts.append(Part(name, "running", limit=round(limit, 1)))
            _write(run, parts, options.part)
            _run_part(run, parts[-1])
            _write(run, parts, options.part)
        _report(run, parts, time.monotonic() - start)
    return 1 if any(part.status == "failed" for part in parts) else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m benchmarks.gpu_check", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--run", choices=list(MINUTES), help="the parts of this run alone (default: of both)")
    add("--part", nargs="+", choices=list(PARTS), metavar="PART",
        help="these parts alone, in their usual order")  # fmt: skip
    add("--minutes", type=positive_float,
        help="for all of it (default: those of the runs that the parts belong to)")  # fmt: skip
    add("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    add("--output", type=Path, default=Path("out/gpu_check"), metavar="DIR",
        help="default: %(default)s")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.run and options.part:
        parser.error("--run and --part both choose the parts: give one of them")
    chosen = names([options.run] if options.run else MINUTES)
    options.part = [name for name in chosen if not options.part or name in options.part]
    options.minutes = options.minutes or minutes(options.part)
    return options


def _use_cache(run: Run) -> None:
    """Have Triton take binaries from where FUSED_KD_TRITON_CACHE says, if it does."""
    source = os.environ.get(triton_cache.VARIABLE)
    if source:
        target = run.output / "triton_cache"
        found = triton_cache.install(Path(source), target)
        run.variables["TRITON_CACHE_DIR"] = str(target)
        run.say(f"Triton's cache begins with {found} binaries of {source}")


def _terminated(*_: object) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def _run_part(run: Run, part: Part) -> None:
    run.say(f"\n===== {part.name}: at most {part.limit:.0f} s")
    begin = time.monotonic()
    try:
        PARTS[part.name].action(run, part)
    except Exception as error:  # the next part runs all the same
        part.status = "failed"
        part.notes.append(f"FAILED {part.name}: {type(error).__name__}: {error}")
    part.seconds = round(time.monotonic() - begin, 1)
    run.say(f"===== {part.name}: {part.status} after {part.seconds:.0f} s")


def _write(run: Run, parts: Sequence[Part], chosen: Sequence[str]) -> None:
    """Rewrite the JSON file: it holds what there is, should the next part be the last."""
    measured: dict[str, list[Any]] = {}
    for name in chosen:
        lines = run.output / f"{name}.jsonl"
        found = lines.read_text().splitlines() if lines.exists() else []
        if found:
            measured[name] = [json.loads(line) for line in found if line.endswith("}")]
    content = {
        "schema": SCHEMA,
        "environment": run.environment,
        "parts": [asdict(part) for part in parts],
        "not_run": list(chosen[len(parts) :]),
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
