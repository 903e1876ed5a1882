"""Calls on a GPU that may fail: an error is one line; a lost context or a hang ends the process.

A "sticky" CUDA error (an access out of bounds, a trap) makes every later call of the process fail
too. Its first line is worth a report, those after it are not.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

#: Exit statuses: the device's context was lost; a call did not return.
LOST, HUNG = 3, 4
#: Characters of an error that are printed.
SHOWN = 300

_Result = TypeVar("_Result")


def lost(device: str) -> str | None:
    """Return why nothing can run on the device any more, or None."""
    if device != "cuda":
        return None
    import torch

    try:
        torch.cuda.synchronize()
        torch.zeros(1, device=device).add_(1).item()
    except Exception as error:
        return said(error)
    return None


def said(error: Exception) -> str:
    """Return an error as one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:SHOWN]


class Guard:
    """Makes calls and counts those that failed.

    Args:
        device: "cuda" or "cpu".
        seconds: that a call may take before the process ends.
    """

    def __init__(self, device: str, seconds: float) -> None:
        self.device, self.seconds, self.failed = device, seconds, 0

    def __call__(self, what: str, call: Callable[[], _Result]) -> _Result | None:
        """Return the call's result once the device is done with it; None if it failed."""
        watch = threading.Timer(self.seconds, self._hung, [what])
        watch.daemon = True
        watch.start()
        try:
            result = call()
            self._synchronize()
            return result
        except Exception as error:
            self.fail(f"{what}: {said(error)}")
            why = lost(self.device)
            if why is not None:
                self.fail(f"the device's context is lost: {why}")
                _leave(LOST)
            return None
        finally:
            watch.cancel()

    def fail(self, text: str) -> None:
        """Count a failure and print it."""
        self.failed += 1
        print(f"FAILED {text}", flush=True)

    def _synchronize(self) -> None:
        """Wait for the device: an error of a kernel shows then."""
        if self.device == "cuda":
            import torch  # takes seconds, and the names above need none

            torch.cuda.synchronize()

    def _hung(self, what: str) -> None:
        self.fail(f"{what}: no end within {self.seconds:g} s")
        _leave(HUNG)


def _leave(status: int) -> None:
    """End the process at once: destructors would wait for the device."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
