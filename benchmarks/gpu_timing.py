"""Times of single calls on a GPU, each shown and kept as it is measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, TextIO

from . import device, records
from .gpu_guard import Guard

#: Calls that count, after those that compile and allocate.
REPEATS, WARM_UP = 10, 2
#: Seconds that the calls of one time may take before the process ends.
PATIENCE = 45.0


class Times:
    """Measures calls on a device; a call that raises is one line and the next goes on."""

    def __init__(self, where: str, file: TextIO) -> None:
        self.device, self.guard = where, Guard(where, PATIENCE)
        self._clock, self._writer = device.clock(where), records.Writer(file)

    def measure(
        self, what: str, call: Callable[[], object], restore: Callable[[], object] | None = None
    ) -> float | None:
        """Return the median of the seconds of a call; None if it failed."""
        return self.guard(what, lambda: self._median(call, restore))

    def _median(self, call: Callable[[], object], restore: Callable[[], object] | None) -> float:
        seconds = []
        for _ in range(WARM_UP + REPEATS):
            if restore is not None:
                restore()
            seconds.append(self._clock(call)[0])
        return statistics.median(seconds[WARM_UP:])

    def show(self, what: str, seconds: float | None, floor: float | None, **about: Any) -> None:
        """Print and keep a time, and how many times as long as `floor` it is."""
        ratio = None if seconds is None or not floor else seconds / floor
        self._writer.write("time", what=what, seconds=seconds, floor=floor, ratio=ratio, **about)
        if seconds is None:
            return
        over = "" if ratio is None else f"{ratio:8.3f} x floor"
        more = "".join(f"  {key} {value}" for key, value in about.items() if key != "group")
        print(f"{about.get('group', ''):<24} {what:<44} {1e3 * seconds:10.4f} ms{over}{more}",
              flush=True)  # fmt: skip
