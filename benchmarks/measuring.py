"""How things are measured: interleaved repetitions, disturbed ones told apart, peaks of memory.

Contestants take turns (A B C A B C ...), so that drift of the machine hits all alike, and what is
reported is the median and the quartiles. A repetition during which threads of ours waited for a
processor that somebody else held is measured again, a limited number of times.
"""

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
#: Rounds of repeats beyond the wanted number, as a multiple of it, while disturbed ones recur.
PATIENCE = 2
#: Calls of each contestant before the first that counts.
WARM_UP = 2


@dataclass(frozen=True)
class Contestant:
    """One thing to time.

    Args:
        name: unique among those measured together.
        call: what is timed.
        restore: run before every call, outside the timed region.
        repeats: calls wanted; None: as many as the others.
        patience: rounds of repeats beyond the wanted number, as a multiple of it.
    """

    name: str
    call: Callable[[], object]
    restore: Callable[[], object] = lambda: None
    repeats: int | None = None
    patience: int = PATIENCE


@dataclass
class Timing:
    """Seconds of the repetitions of one contestant."""

    name: str
    clean: list[float] = field(default_factory=list)
    disturbed: list[float] = field(default_factory=list)
    wanted: int = 0
    error: Exception | None = None  # it raised, and is not called again

    def take(self, contestant: Contestant, clock: Clock) -> None:
        """One repetition."""
        if self.error is not None:
            return
        try:
            contestant.restore()
            seconds, is_disturbed = clock(contestant.call)
        except Exception as error:  # the others go on
            self.error = error
            return
        (self.disturbed if is_disturbed else self.clean).append(seconds)

    def wants_more(self, patience: int) -> bool:
        """Whether it is to be measured again, so many times its repeats at most."""
        calls = len(self.clean) + len(self.disturbed)
        return self.error is None and self.noisy and calls < self.wanted * (1 + patience)

    @property
    def samples(self) -> list[float]:
        """The undisturbed repetitions, filled up with the fastest disturbed ones if too few."""
        missing = max(0, self.wanted - len(self.clean))
        return self.clean + sorted(self.disturbed)[:missing]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.samples) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high

    @property
    def noisy(self) -> bool:
        """Too few undisturbed repetitions: the figure may be too high."""
        return len(self.clean) < self.wanted

    def cells(self, unit: float = 1e-3, digits: int = 1) -> list[str]:
        """Median and quartiles for a table, in units of so many seconds."""
        low, high = (f"{q / unit:.{digits}f}" for q in self.quartiles)
        mark = " noisy" if self.noisy else ""
        return [f"{self.median / unit:.{digits}f}", f"[{low}, {high}]{mark}"]

    def as_dict(self) -> dict[str, Any]:
        """What goes into the results file."""
        low, high = self.quartiles
        return {
            "median_s": self.median,
            "quartiles_s": [low, high],
            "fastest_s": min(self.samples),
            "repeats": len(self.samples),
            "undisturbed": len(self.clean),
        }


def interleave(
    contestants: Sequence[Contestant],
    repeats: int,
    advance: Callable[[str], object] = lambda name: None,
    clock: Clock | None = None,
    warm_up: int = WARM_UP,
) -> dict[str, Timing]:
    """Times each contestant `repeats` times, in turns, after a warm-up.

    Args:
        contestants: each with its own or this number of repeats.
        repeats: of those that do not say.
        advance: called with a contestant's name before every call that counts.
        clock: what times a call; None: :func:`time_once`.
        warm_up: calls of each before the first that counts.
    """
    timings = {c.name: Timing(c.name, wanted=c.repeats or repeats) for c in contestants}
    assert len(timings) == len(contestants), "two contestants of one name"

    def repeat(one: Contestant) -> None:
        advance(one.name)
        timings[one.name].take(one, clock or time_once)

    for one in contestants:
        for _ in range(warm_up):
            one.restore()
            one.call()
    rounds = max((t.wanted for t in timings.values()), default=0)
    for turn in range(rounds):
        for one in contestants:
            # fewer repeats are spread over all rounds
            before, after = (int(t * timings[one.name].wanted / rounds + 0.5)
                             for t in (turn, turn + 1))  # fmt: skip
            if after > before:
                repeat(one)
    while waiting := [c for c in contestants if timings[c.name].wants_more(c.patience)]:
        for one in waiting:
            repeat(one)
    return timings


def time_once(call: Callable[[], object]) -> tuple[float, bool]:
    """Seconds by the host's clock, and whether our threads waited for a processor."""
    gc.disable()
    try:
        waited = waiting_for_processor()
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        waited = waiting_for_processor() - waited
    finally:
        gc.enable()
    return seconds, waited > DISTURBED * seconds


def waiting_for_processor() -> float:
    """Seconds that the threads of this process have been ready to run and did not; 0 if unknown."""
    total = 0
    for entry in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(entry.read_text().split()[1])
        except (OSError, IndexError, ValueError):  # the thread is gone; no such statistics
            continue
    return total * 1e-9


def process_peak(call: Callable[[], object]) -> int | None:
    """Bytes by which the resident memory of the process rose during `call`; None if unknown.

    Sees what torch's allocator does not, and pages only where they are touched: give it a call
    that has been made before. What the heap has left over is given back first.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        before = _resident("VmRSS")
    except OSError:
        call()
        return None
    kept = call()
    peak = _resident("VmHWM")
    del kept
    return max(0, peak - before)


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(f"no {name}")


def available_memory() -> int:
    """Bytes that may be allocated before the machine swaps or kills; all there are if unknown."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return sys.maxsize


def ratio(numerator: Timing | float, denominator: Timing | float) -> float:
    """Of medians."""
    top, bottom = (x.median if isinstance(x, Timing) else x for x in (numerator, denominator))
    return top / bottom
