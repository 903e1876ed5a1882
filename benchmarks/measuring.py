"""What is measured: seconds, peaks of memory, lower bounds of time, and the machine."""

from __future__ import annotations

import gc
import os
import subprocess
import time
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

from fused_kd import extension
from fused_kd.env import report
from fused_kd.testing import cpu_peak

from .cases import LOGITS
from .problems import Call, Problem

#: Clock cycles for which a GPU is kept busy before a timed call (about a millisecond): the host
#: gets ahead, so that the time is the device's and not that of launching.
HEAD_START = 2_000_000
#: The 16-bit products are slow if a few rows of them take more than SLOW times as long as in
#: float32; each is tried TRIES times.
FEW_ROWS, SLOW, TRIES = 8, 4.0, 3
#: The distributions that the peers come from.
PEERS = {"liger-kernel", "trl", "torchtune", "nvidia-modelopt", "flash-linear-attention"}
PEERS |= {"cut-cross-entropy"}


def clock(call: Call, device: str) -> float:
    """Return the seconds of a call, by the host's clock or by events of the GPU."""
    gc.disable()
    try:
        if device == "cpu":
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HEAD_START)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    finally:
        gc.enable()


def peak_bytes(call: Call, device: str) -> int:
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


@dataclass(frozen=True)
class LowerBound:
    """A call that no method of the case can be faster than, to be timed in turns with them.

    Logits: reading both (N, V) matrices once and writing one, at the bandwidth of a copy. Heads:
    the four matrix products, whole, in the dtype of the case, or in float32 if that is faster (a
    processor without 16-bit products emulates them).
    """

    name: str  # copy or products
    call: Call
    times: float = 1.0  # of the call's seconds: what the case takes at least
    why: str = ""  # it is not in the case's dtype


def lower_bound(problem: Problem) -> LowerBound:
    """Return the lower bound of a case."""
    case = problem.case
    if case.level == LOGITS:
        return LowerBound("copy", problem.bound(), 1.5)  # it moves two of three matrices
    if case.dtype != "fp32" and case.device == "cpu":
        narrow, fp32 = (
            min(clock(problem.bound(FEW_ROWS, dtype), "cpu") for _ in range(TRIES))
            for dtype in (None, torch.float32)
        )
        if narrow > SLOW * fp32:
            why = f"in float32; in {case.dtype} they take {narrow / fp32:.0f} times as long"
            return LowerBound("products", problem.bound(None, torch.float32), why=why)
    return LowerBound("products", problem.bound())


def environment(device: str = "cpu") -> dict[str, Any]:
    """Return what a figure depends on besides the code."""
    facts, info = report(), extension.cpu.build_info() or {}
    processor, card = facts["processor"]["name"], {}
    if device != "cpu":
        card = {"memory_bytes": torch.cuda.get_device_properties(0).total_memory}
    git = f"git -C {Path(__file__).parent} describe --always --exclude='*' --dirty=' and changes'"
    status, commit = subprocess.getstatusoutput(git)
    return {
        "device": f"CPU: {processor}" if device == "cpu" else torch.cuda.get_device_name(),
        **card,
        "processor": processor,
        "threads": torch.get_num_threads(),
        "instruction_set": info.get("instruction_set", "none (not built)"),
        **facts["versions"],
        "commit": commit if status == 0 else "",
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "packages": {x.name: x.version for x in distributions() if x.name in PEERS},
    }
