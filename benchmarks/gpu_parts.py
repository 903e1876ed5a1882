"""The parts of ``python -m benchmarks.gpu_check``, in order of what a second of each tells."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from .gpu_process import GRACE, ROOT, Part, Run, call, script
from .triton_cache import count

FIRST, SECOND = "first", "second"
#: Minutes of each run.
MINUTES = {FIRST: 4.0, SECOND: 5.0}
#: The device's tests, the most telling first.
TESTS = ("test_gpu.py", "test_gpu_running.py", "test_gpu_machine.py", "test_gpu_heads.py")
#: Tests that run at a time, and the seconds of one at most.
WORKERS, TEST_SECONDS = 12, 45
#: Options of `python -m benchmarks run`, on a GPU and to try them. torch.compile and Liger compile
#: for longer than all others take, so they are measured last, at one size.
OURS = ("kdloss", "kdloss-inplace", "kdloss-forward", "kdloss-triton", "kdloss-heads",
        "kdloss-heads-triton", "eager")  # fmt: skip
COMPILED = ("kdloss", "kdloss-heads", "compile", "liger", "liger-fused-kl")
REPEATS = ("--repeats", "10", "--seconds-each", "2")
SUITES: dict[str, tuple[str, str]] = {
    "logits": (
        "logits --dtype bf16 fp32 --v 151936 32000 262144 128256 --n 8192 "
        f"--peers {' '.join(OURS)}",
        f"logits --dtype bf16 --v 33 --n 5 --peers {' '.join(OURS)}",
    ),
    "heads": (
        f"heads --dtype bf16 --v 151936 --n 8192 --hidden 2048 4096 --peers {' '.join(OURS)}",
        f"heads --dtype bf16 --v 33 --n 5 --hidden 8 12 --peers {' '.join(OURS)}",
    ),
    "peers": (
        "logits heads --dtype bf16 --v 151936 --n 8192 --hidden 2048 4096 "
        f"--peers {' '.join(COMPILED)}",
        "logits heads --dtype bf16 --v 33 --n 5 --hidden 8 12 --peers kdloss kdloss-heads eager",
    ),
}


@dataclass(frozen=True)
class Plan:
    """A part of the check.

    Args:
        run: FIRST or SECOND.
        share: seconds of the run that it is meant to have.
        action: does it, within the part's limit.
        most: seconds that it never exceeds.
    """

    run: str
    share: float
    action: Callable[[Run, Part], None]
    most: float = 600.0


# --------------------------------------------------------------------------------------- build


def _build(run: Run, part: Part) -> None:
    """The CUDA module alone: nothing else that is compiled is needed here."""
    if run.device == "cpu":
        part.skip("the CPU's backend is used as it is")
        return
    has_compiler = run.environment["nvcc"] or os.environ.get("FUSED_KD_CUDA_OBJECTS")
    if not has_compiler:
        part.skip("no nvcc, and FUSED_KD_CUDA_OBJECTS names no objects: the cuda backend is left "
                  "as it is")  # fmt: skip
        return
    environment = {"MAX_JOBS": str(run.processors), "FUSED_KD_BUILD": "0", "FUSED_KD_CUDA": "1"}
    if not {"TORCH_CUDA_ARCH_LIST", "FUSED_KD_CUDA_OBJECTS"} & set(os.environ):
        environment["TORCH_CUDA_ARCH_LIST"] = run.environment["capability"]
    call(run, part, [sys.executable, "setup.py", "build_ext", "--inplace"], environment)
    run.refresh()
    why = run.environment["backends"].get("cuda")
    if why != "available":
        part.notes.append(f"FAILED backend cuda: {why}")
        part.status = "failed"


# --------------------------------------------------------------------------------------- tests


def _tests(backend: str) -> Callable[[Run, Part], None]:
    return lambda run, part: _pytest(run, part, backend)


def _pytest(run: Run, part: Part, backend: str) -> None:
    if importlib.util.find_spec("pytest") is None:
        part.skip("pytest is not installed")
        return
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider",
               "-p", "gpu_plugin", "--durations=5", "--tb=short", "-rs"]  # fmt: skip
    command += [f"tests/{name}" for name in TESTS]
    workers = min(WORKERS, 3 * run.processors // 4)
    if run.device == "cuda" and workers > 1:
        if importlib.util.find_spec("xdist") is None:
            part.notes.append("pytest-xdist is not installed: one test at a time")
        else:
            command += ["-n", str(workers), "--dist", "loadgroup"]
    until = time.time() + part.limit - GRACE
    path = os.pathsep.join(filter(None, [str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
    environment = {"GPU_CHECK_DEVICE": run.device, "GPU_CHECK_UNTIL": f"{until:.1f}",
                   "GPU_CHECK_TEST_SECONDS": str(TEST_SECONDS), "PYTHONPATH": path}  # fmt: skip
    if run.device == "cuda":
        environment["GPU_CHECK_BACKENDS"] = backend
    call(run, part, command, environment)


# -------------------------------------------------------------------------------------- scripts


def _module(name: str, *options: str, writes: bool = True) -> Callable[[Run, Part], None]:
    """A part that is a script of this folder, on the GPU with these options."""

    def action(run: Run, part: Part) -> None:
        given = list(options) if run.device == "cuda" else []
        if writes:
            given += ["--output", str(run.output / f"{part.name}.jsonl")]
        script(run, part, f"benchmarks.{name}", *given)

    return action


def _suite(run: Run, part: Part) -> None:
    real, tiny = SUITES[part.name]
    given = real.split() + list(REPEATS) if run.device == "cuda" else [*tiny.split(), "--repeats=2"]
    output = str(run.output / f"{part.name}.jsonl")
    script(run, part, "benchmarks", "run", "--in-process", "--output", output, *given)


def _triton_smoke(run: Run, part: Part) -> None:
    """The smoke of the Triton kernels, and what was compiled for it although a cache was given."""
    folder = run.variables.get("TRITON_CACHE_DIR")
    before = count(Path(folder)) if folder else 0
    _module("gpu_smoke", *TRITON)(run, part)
    if folder:
        run.say(f"{count(Path(folder)) - before} binaries were not in {folder}")


CUDA, TRITON = ("--backends", "cuda"), ("--backends", "triton")

PARTS: dict[str, Plan] = {
    "build": Plan(FIRST, 70, _build),
    "smoke": Plan(FIRST, 30, _module("gpu_smoke", *CUDA)),
    "operators": Plan(FIRST, 35, _module("gpu_operators", *CUDA)),
    "ncu": Plan(FIRST, 30, _module("gpu_counters", *CUDA)),
    "cuda-tests": Plan(FIRST, 55, _tests("cuda")),
    "heads-times": Plan(FIRST, 20, _module("gpu_heads", *CUDA)),
    "triton": Plan(SECOND, 30, _triton_smoke, most=30 + GRACE),
    "triton-operators": Plan(SECOND, 25, _module("gpu_operators", *TRITON)),
    "triton-tests": Plan(SECOND, 90, _tests("triton")),
    "logits": Plan(SECOND, 35, _suite),
    "heads": Plan(SECOND, 20, _suite),
    "peers": Plan(SECOND, 50, _suite),
    "memory": Plan(SECOND, 50, _module("gpu_sanitizer", *CUDA, writes=False)),
}


def names(runs: Iterable[str]) -> list[str]:
    """Return the parts of these runs, in order."""
    wanted = set(runs)
    return [name for name, plan in PARTS.items() if plan.run in wanted]


def minutes(chosen: Iterable[str]) -> float:
    """Return the minutes of the runs that these parts belong to."""
    return sum(MINUTES[run] for run in {PARTS[name].run for name in chosen})
