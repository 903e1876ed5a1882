"""How things are measured: interleaved repetitions, disturbed ones told apart, peaks of memory."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Makes a call and returns its seconds, and whether it was disturbed.
Clock = Callable[[Callable[[], object]], tuple[float, bool]]
#: A repetition is disturbed if our threads waited this share of it for a processor.
DISTURBED = 0.03


@dataclass
class Turn:
    """One call to time, and the seconds of its repetitions."""

    name: str  # unique among those measured together
    call: Callable[[], object]
    restore: Callable[[], object]  # run before every call, outside the timed region
    wanted: int
    most: int  # calls, while disturbed ones recur
    clean: list[float] = field(default_factory=list)
    disturbed: list[float] = field(default_factory=list)
    error: Exception | None = None  # it raised, and is not called again

    def take(self, clock: Clock) -> None:
        """Measure one repetition."""
        try:
            self.restore()
            seconds, is_disturbed = clock(self.call)
        except Exception as error:  # the others continue
            self.error = error
        else:
            (self.disturbed if is_disturbed else self.clean).append(seconds)

    @property
    def is_complete(self) -> bool:
        """Return True if there are enough undisturbed repetitions, or no more are allowed."""
        calls = len(self.clean) + len(self.disturbed)
        return self.error is not None or len(self.clean) >= self.wanted or calls >= self.most

    def time(self) -> dict[str, Any]:
        """Return the "time" of a record; disturbed repetitions count only if others lack."""
        missing = max(0, self.wanted - len(self.clean))
        samples = self.clean + sorted(self.disturbed)[:missing]
        several = samples if len(samples) > 1 else samples * 2
        low, median, high = statistics.quantiles(several, n=4, method="inclusive")
        return {
            "median_s": median,
            "quartiles_s": [low, high],
            "fastest_s": min(samples),
            "repeats": len(samples),
            "undisturbed": len(self.clean),
        }


def interleave(turns: Sequence[Turn], clock: Clock, advance: Callable[[str], object]) -> None:
    """Time each call its wanted number of times, in turns: A B C A B C ...

    So drift of the machine affects all of them equally. Fewer repeats are spread over all rounds.
    `advance` is called with the name before every call.
    """
    rounds = max((turn.wanted for turn in turns), default=0)
    for number in range(rounds):
        for turn in turns:
            before, after = (int(t * turn.wanted / rounds + 0.5) for t in (number, number + 1))
            if after > before and turn.error is None:
                advance(turn.name)
                turn.take(clock)
    while waiting := [turn for turn in turns if not turn.is_complete]:
        for turn in waiting:
            advance(turn.name)
            turn.take(clock)


def time_once(call: Callable[[], object]) -> tuple[float, bool]:
    """Return the host's seconds of a call, and whether our threads waited for a processor."""
    gc.disable()
    try:
        waited = _waiting_for_processor()
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        waited = _waiting_for_processor() - waited
    finally:
        gc.enable()
    return seconds, waited > DISTURBED * seconds


def _waiting_for_processor() -> float:
    """Return the seconds that this process's threads were ready and did not run; 0 if unknown."""
    total = 0
    for entry in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(entry.read_text().split()[1])
        except (OSError, IndexError, ValueError):  # the thread is gone; no such statistics
            continue
    return total * 1e-9


def process_peak(call: Callable[[], object]) -> int | None:
    """Return by how many bytes the process's resident memory rose during a call; None: unknown.

    It sees what torch's allocator does not, and pages only if they are touched: give it a call that
    was made before. Free heap is returned to the system first.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        before = _bytes("/proc/self/status", "VmRSS")
    except OSError:
        call()
        return None
    kept = call()
    peak = _bytes("/proc/self/status", "VmHWM")
    del kept
    return max(0, peak - before)


def available_memory() -> int:
    """Return the bytes that may be allocated before the machine swaps; all there are if unknown."""
    try:
        return _bytes("/proc/meminfo", "MemAvailable")
    except OSError:
        return sys.maxsize


def _bytes(path: str, name: str) -> int:
    for line in Path(path).read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(f"no {name} in {path}")
