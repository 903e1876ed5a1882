"""The device that is measured: its clock, its memory, and what a figure on it depends on.

``python -m benchmarks.device [--device cpu]`` prints the last as JSON. Everything here also runs on
the CPU, so that the scripts built on it can be tried without a GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fused_kd import extension
from fused_kd.backends import why_not
from fused_kd.env import report
from fused_kd.testing import cpu_peak

from .measuring import Clock, time_once

ROOT = Path(__file__).resolve().parents[1]
#: The backends under test, and what stands in for both where there is no GPU.
BACKENDS, STAND_IN = ("cuda", "triton"), "cpu"
#: Clock cycles for which a GPU is kept busy before a timed call (about a millisecond): the host
#: gets ahead, so that the time is the device's and not that of launching.
HEAD_START = 2_000_000


def backends(device: str) -> dict[str, str | None]:
    """The backends to look at on this device, and why one cannot run."""
    names = BACKENDS if device == "cuda" else (STAND_IN,)
    return {name: why_not(name, device) for name in names}


def clock(device: str) -> Clock:
    """Times a call: by events of the GPU, or by the host's clock."""
    return _events if device == "cuda" else time_once


def _events(call: Callable[[], object]) -> tuple[float, bool]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    gc.disable()
    try:
        torch.cuda._sleep(HEAD_START)
        start.record()
        call()
        end.record()
        end.synchronize()
    finally:
        gc.enable()
    return start.elapsed_time(end) / 1e3, False


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """What the allocator handed out at most during the call, above the level before it.

    Give it a call that has been made before, or what is allocated once counts too.
    """
    if device == "cpu":
        return cpu_peak(call).highest
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = call()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


def room(device: str) -> int:
    """Bytes that the device has for tensors."""
    if device == "cpu":
        return 2**30
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def release(device: str) -> None:
    """Gives what is not in use back to the device."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


class Budget:
    """Seconds that a script may take."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        return self._end - time.monotonic()

    def allows(self, seconds: float) -> bool:
        return self.left() > seconds


def environment(device: str = "cpu") -> dict[str, Any]:
    """What a figure depends on besides the code."""
    found, info = report(), extension.cpu.build_info()
    return {
        "device": _processor_name(found) if device == "cpu" else torch.cuda.get_device_name(),
        **({} if device == "cpu" else _card()),
        "processor": found["processor"]["name"],
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": "none (not built)" if info is None else info["instruction_set"],
        "compiler": None if info is None else info["compiler"],
        **{key: found["versions"][key] for key in ("torch", "cuda", "triton", "python")},
        "nvcc": _said(_nvcc() or "nvcc", "--version").split("release ")[-1].split(",")[0] or None,
        "backends": {name: why or "available" for name, why in backends(device).items()},
        "fused_kd": found["versions"]["fused_kd"],
        "commit": _commit(),
        "platform": found["versions"]["platform"],
        "huge_pages": _huge_pages(),
        "load_average": [round(x, 2) for x in os.getloadavg()],
    }


def _huge_pages() -> str:
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return "unknown"
    return text.split("[")[-1].split("]")[0] if "[" in text else text.strip()


def _processor_name(found: dict[str, Any]) -> str:
    return f"CPU: {found['processor']['name']}"


def _card() -> dict[str, Any]:
    card = torch.cuda.get_device_properties(torch.cuda.current_device())
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "capability": f"{card.major}.{card.minor}",
        "multiprocessors": card.multi_processor_count,
        "memory_bytes": card.total_memory,
        "l2_bytes": getattr(card, "L2_cache_size", None),
        "driver": _said(*query).split("\n")[0] or None,
        "devices": torch.cuda.device_count(),
    }


def _nvcc() -> str | None:
    """The compiler of CUDA C++, where torch's extension builder would look for it."""
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    places = os.pathsep.join(str(Path(home) / "bin") for home in homes if home)
    return shutil.which("nvcc") or shutil.which("nvcc", path=places)


def _commit() -> str | None:
    commit = _said("git", "rev-parse", "--short", "HEAD")
    changed = _said("git", "status", "--porcelain", "--untracked-files=no")
    return f"{commit} and changes" if commit and changed else commit or None


def _said(*command: str) -> str:
    """What a program prints; nothing where it cannot run."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the environment; exit status 1 where there is no such device."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    device = parser.parse_args(arguments).device
    if device == "cuda" and not torch.cuda.is_available():
        print(f"torch {torch.__version__} finds no CUDA device", file=sys.stderr)
        return 1
    print(json.dumps(environment(device), default=str))
    return 0


if __name__ == "__main__":
    sys.exit(main())
