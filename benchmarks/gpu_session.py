"""What the scripts of the GPU check share: calls that may fail, times, results.

They read GPU_CHECK_DEVICE (cuda or cpu; default: cuda), GPU_CHECK_BACKENDS (default: all of the
device; the CPU's own stands in for both of a GPU's), GPU_CHECK_UNTIL (the time in seconds since the
epoch after which nothing is begun) and GPU_CHECK_OUTPUT (a file to which JSON lines are appended).
"""

from __future__ import annotations

import faulthandler
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from fused_kd.backends import why_not

from .measuring import clock

BACKENDS = {"cuda": ["cuda", "triton"], "cpu": ["cpu"]}
#: Seconds that a call may take, compilation included.
PATIENCE = 20
#: Calls that count, after those that compile and allocate.
REPEATS, WARM_UP = 10, 2

_Result = TypeVar("_Result")


class Session:
    """A run of a script: its device, its backends, its results, its exit status."""

    def __init__(self) -> None:
        read = os.environ.get
        self.device, self.status = read("GPU_CHECK_DEVICE", "cuda"), 0
        self.is_gpu = self.device == "cuda"
        self._file = open(read("GPU_CHECK_OUTPUT", os.devnull), "a")  # noqa: SIM115  for the run
        names = read("GPU_CHECK_BACKENDS", "").split() if self.is_gpu else []
        reasons = {name: why_not(name, self.device) for name in names or BACKENDS[self.device]}
        self.backends = [name for name, why in reasons.items() if why is None]
        for name, why in reasons.items():
            if why is not None:
                self.fail(f"backend {name}: {why}")

    def skips(self, what: str) -> bool:
        """Return True, and print it, if the time is up."""
        is_up = time.time() > float(os.environ.get("GPU_CHECK_UNTIL", "inf"))
        if is_up:
            print(f"LEFT OUT {what}: the time is up", flush=True)
        return is_up

    def fail(self, text: str) -> None:
        """Print a failure; the script's exit status is 1 then."""
        self.status = 1
        print(f"FAILED {text}", flush=True)

    def write(self, **content: Any) -> None:
        """Add a line to the results."""
        print(json.dumps(content), file=self._file, flush=True)

    def call(self, what: str, function: Callable[[], _Result]) -> _Result | None:
        """Return the function's result once the device is done with it; None if it raised.

        If the call hangs, the process ends: the last line of the results names the call. If the
        device's context is lost (an access out of bounds, a trap), every later call would fail too,
        so the error of the second synchronization ends the script.
        """
        self.write(begins=what)
        faulthandler.dump_traceback_later(PATIENCE, exit=True, file=sys.__stderr__)
        try:
            result = function()
            self.synchronize()
            return result
        except Exception as error:
            self.fail(f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            self.synchronize()
            return None
        finally:
            faulthandler.cancel_dump_traceback_later()

    def synchronize(self) -> None:
        """Wait for the device: an error of a kernel shows then."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def time(
        self,
        what: str,
        function: Callable[[], object],
        bound: float | None = None,
        restore: Callable[[], object] = lambda: None,
    ) -> float | None:
        """Return the median seconds of a call, each after a call of `restore`; None if one raised.

        Prints and writes them, and how many times as long as the lower bound they are.
        """

        def median() -> float:
            times = []
            for _ in range(WARM_UP + REPEATS):
                restore()
                times.append(clock(function, self.device))
            return statistics.median(times[WARM_UP:])

        seconds = self.call(what, median)
        self.write(what=what, seconds=seconds, bound=bound)
        if seconds is not None:
            ratio = f"{seconds / bound:8.3f} x bound" if bound else ""
            print(f"{what:<60} {1e3 * seconds:10.4f} ms {ratio}", flush=True)
        return seconds


class Output(torch.autograd.Function):
    """Logits in their own memory as the output of a layer: they may be overwritten."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient
