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
#: The backends under test, and the one that replaces both without a GPU.
BACKENDS, STAND_IN = ("cuda", "triton"), "cpu"
#: Clock cycles for which a GPU is kept busy before a timed call (about a millisecond): the host
#: gets ahead, so that the time is the device's and not that of launching.
HEAD_START = 2_000_000


def backends(device: str) -> dict[str, str | None]:
    """Return the backends of this device, each with the reason why it cannot run or None."""
    names = BACKENDS if device == "cuda" else (STAND_IN,)
    return {name: why_not(name, device) for name in names}


def clock(device: str) -> Clock:
    """Return what times a call: events of the GPU, or the host's clock."""
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
    """Return the peak of what the allocator had allocated during a call, beyond the level before.

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
    """Return the bytes that the device has for tensors."""
    if device == "cpu":
        return 2**30
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def release(device: str) -> None:
    """Return what is not in use to the device."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


class Budget:
    """Seconds that a script may take."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Return the seconds that are left."""
        return self._end - time.monotonic()

    def allows(self, seconds: float) -> bool:
        """Return True if more than these seconds are left."""
        return self.left() > seconds


def environment(device: str = "cpu") -> dict[str, Any]:
    """Return what a figure depends on besides the code."""
    facts, info = report(), extension.cpu.build_info() or {}
    versions, processor = facts["versions"], facts["processor"]["name"]
    # the compiler of CUDA C++, where torch's extension builder would look for it
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    nvcc = next((path for home in homes if home and (path := shutil.which(f"{home}/bin/nvcc"))), "")
    return {
        "device": f"CPU: {processor}" if device == "cpu" else torch.cuda.get_device_name(),
        **({} if device == "cpu" else _card()),
        "processor": processor,
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": info.get("instruction_set", "none (not built)"),
        "compiler": info.get("compiler"),
        **{key: versions[key] for key in ("torch", "cuda", "triton", "python")},
        "nvcc": _output(nvcc or "nvcc", "--version").split("release ")[-1].split(",")[0] or None,
        "backends": {name: why or "available" for name, why in backends(device).items()},
        "fused_kd": versions["fused_kd"],
        "commit": _commit(),
        "platform": versions["platform"],
        "load_average": [round(x, 2) for x in os.getloadavg()],
    }


def _card() -> dict[str, Any]:
    card = torch.cuda.get_device_properties(torch.cuda.current_device())
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "capability": f"{card.major}.{card.minor}",
        "multiprocessors": card.multi_processor_count,
        "memory_bytes": card.total_memory,
        "l2_bytes": getattr(card, "L2_cache_size", None),
        "driver": _output(*query).split("\n")[0] or None,
        "devices": torch.cuda.device_count(),
    }


def _commit() -> str | None:
    commit = _output("git", "describe", "--always", "--exclude=*", "--dirty= and changes")
    return commit or None


def _output(*command: str) -> str:
    """Return what a program prints; nothing if it cannot run."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the environment; return 1 if there is no such device."""
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
