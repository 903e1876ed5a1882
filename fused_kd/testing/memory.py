"""Measure the peak of the CPU allocator; allocate tensors that end at a guard page."""

from __future__ import annotations

import ctypes
import gc
import mmap
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Peak(NamedTuple):
    """Bytes of torch's CPU allocator: two totals beyond that at the start, and one allocation."""

    highest: int  # at the peak
    left: int  # at the end, with the result of the function
    largest: int  # the largest single allocation


def cpu_peak(fn: Callable[[], object]) -> Peak:
    """Run `fn` and return the memory that it allocated on the CPU, in C++ operators too.

    The function's result is kept alive until the end of the measurement, then dropped.
    """
    gc.collect()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        kept = fn()
    assert profile.profiler is not None
    results = profile.profiler.kineto_results
    assert results is not None
    events = [event for event in results.events() if event.name() == "[memory]"]
    live = highest = largest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()  # a free is negative
        highest, largest = max(highest, live), max(largest, event.nbytes())
    del kept
    return Peak(highest, live, largest)


def guarded(count: int, dtype: torch.dtype, side: str = "after") -> Tensor:
    """Return a 1-D tensor of `count` zeros with a guard page after its last entry.

    An access beyond the end is a segmentation fault, so use it in a subprocess.

    Args:
        count: number of entries, at least 1.
        dtype: dtype of the tensor.
        side: "after", or "before" for a guard page in front of the first entry.
    """
    page, size = mmap.PAGESIZE, count * dtype.itemsize
    body = -(-size // page) * page
    memory = mmap.mmap(-1, body + 2 * page)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None).mprotect
    for offset in (0, page + body):
        assert protect(ctypes.c_void_p(base + offset), ctypes.c_size_t(page), 0) == 0
    start = page + (body - size if side == "after" else 0)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=start)
