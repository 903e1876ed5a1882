"""Measure the seconds of a call and its peak of memory; describe the machine."""

from __future__ import annotations

import gc
import os
import subprocess
import timeit
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

from fused_kd import extension
from fused_kd.env import report
from fused_kd.testing import cpu_peak

Call = Callable[[], object]
#: Clock cycles for which a GPU is kept busy before a timed call (about a millisecond): the host
#: gets ahead, so that the time is the device's and not that of launching.
HEAD_START = 2_000_000
#: The distributions that have the peers' losses.
PEERS = {"liger-kernel", "trl", "torchtune", "nvidia-modelopt", "flash-linear-attention"}
PEERS |= {"cut-cross-entropy", "axolotl", "ms-swift"}


def clock(call: Call, device: str) -> float:
    """Return the seconds of one call, by the host's clock ("cpu") or else by events of the GPU."""
    if device == "cpu":
        return timeit.timeit(call, number=1)  # without garbage collection
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def peak_bytes(call: Call, device: str) -> int:
    """Return the most bytes that were allocated during a call, beyond those allocated before it.

    Pass a call that has run before; otherwise what is allocated only once counts too.
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


def environment(device: str = "cpu") -> dict[str, Any]:
    """Return what results depend on: device, threads, versions, commit, load."""
    facts, info = report(), extension.cpu.build_info() or {}
    processor = facts["processor"]["name"]
    git = f"git -C {Path(__file__).parent} describe --always --exclude='*' --dirty=' and changes'"
    status, commit = subprocess.getstatusoutput(git)
    return {
        "device": f"CPU: {processor}" if device == "cpu" else torch.cuda.get_device_name(),
        "processor": processor,
        "threads": torch.get_num_threads(),
        "instruction_set": info.get("instruction_set", "none (not built)"),
        **facts["versions"],
        "commit": commit if status == 0 else "",
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "packages": {x.name: x.version for x in distributions() if x.name in PEERS},
    }
