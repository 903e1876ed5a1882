"""Lines of results as the runner writes them, made up: for tests of what reads them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not installed

from benchmarks.cases import HEADS, LOGITS, STEP, Case
from benchmarks.records import Line, Report, Writer
from fused_kd.options import MIB

LOGITS_CASE = Case(512, 128256, "bf16")
HEADS_CASE = Case(512, 128256, "bf16", level=HEADS, student_hidden=1024, teacher_hidden=2048)
TITLES = {
    "kdloss": "KDLoss",
    "kdloss-inplace": "KDLoss, in place",
    "kdloss-forward": "KDLoss, forward only",
    "kdloss-heads": "KDLoss, heads",
    "kdloss-heads-64": "KDLoss, heads, 64 MiB",
    "kdloss-heads-256": "KDLoss, heads, 256 MiB",
    "eager": "eager torch",
    "compile": "torch.compile(eager)",
    "liger-chunked": "Liger chunked JSD",
    "trl": "TRL generalized_jsd_loss",
}
ENVIRONMENT = {
    "device": "CPU: Example 9000",
    "processor": "Example 9000",
    "threads": 2,
    "instruction_set": "avx2",
    "torch": "2.13.0",
    "fused_kd": "0.1.0",
    "commit": "abc1234",
    "platform": "Linux",
}
#: Seconds over those of the floor, and (N, V) float32 matrices at the peak, by entrant.
LOGITS_ENTRANTS = {"kdloss-inplace": (1.4, 0.0), "kdloss": (1.8, 1.0), "kdloss-forward": (0.8, 0.0),
                   "compile": (20.0, 3.0), "eager": (90.0, 7.0), "trl": (120.0, 8.0)}  # fmt: skip
HEADS_ENTRANTS = {"kdloss-heads": (1.1, 0.1), "kdloss-heads-64": (1.3, 0.05),
                   "kdloss-heads-256": (1.1, 0.1), "eager": (1.8, 9.0), "compile": (1.4, 4.0),
                   "liger-chunked": (1.9, 2.0)}  # fmt: skip


def run_line(**environment: Any) -> Line:
    found = {**ENVIRONMENT, **environment}
    return {"kind": "run", "environment": found, "packages": {"trl": "1.0"}, "command": ["run"]}


def result_line(suite: str, case: Case, entrant: str, seconds: float | None, **more: Any) -> Line:
    """Measured in so many seconds, unless `more` says otherwise."""
    time = None if seconds is None else {
        "median_s": seconds, "quartiles_s": [0.98 * seconds, 1.03 * seconds],
        "fastest_s": 0.97 * seconds, "repeats": 9, "undisturbed": 9,
    }  # fmt: skip
    return {
        "kind": "result", "suite": suite, "case": case.sizes, "case_name": case.name,
        "entrant": entrant, "title": TITLES.get(entrant, entrant),
        "is_ours": entrant.startswith("kdloss"), "status": "measured", "why": "",
        "nearest": "", "error": {"loss": 1e-7, "gradients": 2e-7}, "time": time,
        "memory": {"allocator_bytes": MIB, "process_bytes": MIB}, "floor_share": None, **more,
    }  # fmt: skip


def skipped_line(suite: str, case: Case, entrant: str, why: str) -> Line:
    return result_line(suite, case, entrant, None, status="skipped", why=why, error=None,
                       memory=None)  # fmt: skip


def floor_line(suite: str, case: Case, seconds: float) -> Line:
    name = "products" if case.level == HEADS else "copy"
    return {"kind": "floor", "suite": suite, "case": case.sizes, "name": name, "why": "",
            "seconds": seconds, "rate": 24e9, "time": None}  # fmt: skip


def case_lines(suite: str, case: Case, **changes: float) -> Iterator[Line]:
    """Floor and entrants; `changes` are factors of the seconds by entrant, "_" for "-"."""
    floor = 1e-10 * case.n * case.v * (1 + 0.02 * case.student_hidden)
    if case.level != STEP:
        yield floor_line(suite, case, floor)
    entrants = HEADS_ENTRANTS if case.level == HEADS else LOGITS_ENTRANTS
    for i, (key, (over, matrices)) in enumerate(entrants.items()):
        seconds = over * floor * changes.get(key.replace("-", "_"), 1.0)
        beyond = case.gradient_bytes if case.level == HEADS else 0
        peak = int(beyond + matrices * case.matrix_bytes)
        yield result_line(
            suite, case, key, seconds, floor_share=None if case.level == STEP else floor / seconds,
            error={"loss": 1e-7 * (1 + i), "gradients": None if "forward" in key else 2e-7 * i},
            memory={"allocator_bytes": peak, "process_bytes": peak + 4096},
        )  # fmt: skip
    yield skipped_line(suite, case, "cce", "its kernels need a GPU")
    yield {"kind": "done", "suite": suite, "case": case.sizes, "case_name": case.name,
           "seconds": 9.0}  # fmt: skip


def every_suite(**changes: float) -> list[Line]:
    """A small report of everything."""
    lines = [run_line()]
    for dtype in ("bf16", "fp32"):
        for v in (32000, 128256):
            logits = Case(512, v, dtype)
            hidden = Case(512, v, dtype, level=HEADS, student_hidden=1024, teacher_hidden=2048)
            lines += [*case_lines(LOGITS, logits, **changes), *case_lines(HEADS, hidden)]
    step = Case(512, 32000, "fp32", level=STEP, student_hidden=512, teacher_hidden=1024)
    lines += case_lines("training-step", step)
    for n, v in ((256, 128256), (512, 128256), (512, 64128)):
        lines += case_lines("growth", Case(n, v, "fp32"))
    for regime in ("randn", "huge"):
        case = Case(16, 8192, "fp32", regime=regime)
        lines += [result_line("accuracy", case, key, None, memory=None)
                  for key in ("kdloss", "eager")]  # fmt: skip
    return lines


def report_of(lines: list[Line]) -> Report:
    report = Report()
    for line in lines:
        report.add(line)
    return report


def one_run(*lines: Line) -> Report:
    """A report of these lines."""
    return report_of([run_line(), *lines])


def write_lines(lines: list[Line], path: Path) -> Path:
    """A file as the runner leaves it."""
    with path.open("w") as stream:
        writer = Writer(stream)
        for line in lines:
            writer.write(**line)
    return path
