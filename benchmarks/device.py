"""The device that is measured: its clock, its memory, and what a figure on it depends on."""

from __future__ import annotations

import gc
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fused_kd import extension
from fused_kd.env import report
from fused_kd.testing import cpu_peak

from .measuring import Clock, available_memory, time_once

ROOT = Path(__file__).resolve().parents[1]
#: Clock cycles for which a GPU is kept busy before a timed call (about a millisecond): the host
#: gets ahead, so that the time is the device's and not that of launching.
HEAD_START = 2_000_000


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
        return available_memory()
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
    processor, card = facts["processor"]["name"], {}
    if device != "cpu":
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        card = {"memory_bytes": memory, "driver": _output(*query).split("\n")[0] or None}
    return {
        "device": f"CPU: {processor}" if device == "cpu" else torch.cuda.get_device_name(),
        **card,
        "processor": processor,
        "threads": torch.get_num_threads(),
        "instruction_set": info.get("instruction_set", "none (not built)"),
        "compiler": info.get("compiler"),
        **facts["versions"],
        "commit": _output("git", "describe", "--always", "--exclude=*", "--dirty= and changes"),
        "load_average": [round(x, 2) for x in os.getloadavg()],
    }


def _output(*command: str) -> str:
    """Return what a program prints; nothing if it cannot run."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
