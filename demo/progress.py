"""The progress of a phase: one line that is redrawn on a terminal, a few plain lines elsewhere."""

import shutil
import sys
import time
from types import TracebackType


class Progress:
    """A context that shows the progress of `total` steps; call `advance` once per step."""

    WIDTH = 24  # of the bar
    PLAIN_LINES = 8  # per phase, if the output is no terminal

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.done = label, total, 0
        self.terminal = sys.stdout.isatty()
        self.start = self.drawn = time.perf_counter()

    def __enter__(self) -> "Progress":
        if self.terminal:
            self.draw("")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.terminal:
            print(flush=True)

    def advance(self, note: str = "") -> None:
        """Count one more step, and show it with `note` next to the bar."""
        self.done += 1
        now, last = time.perf_counter(), self.done == self.total
        if self.terminal and (last or now - self.drawn > 0.1):
            self.drawn = now
            self.draw(note)
        elif not self.terminal:
            before, after = (
                (n * self.PLAIN_LINES) // self.total for n in (self.done - 1, self.done)
            )
            if after > before:
                print(f"{self.label:<10} {self.state(note)}", flush=True)

    def state(self, note: str) -> str:
        """Return steps, remaining (at the end: used) seconds and note as text."""
        used = time.perf_counter() - self.start
        if self.done < self.total:
            rest = used / max(self.done, 1) * (self.total - self.done)
            clock = f"{rest:3.0f} s left" if self.done else ""
        else:
            clock = f"{used:3.0f} s     "
        digits = len(str(self.total))
        return f"{self.done:{digits}d}/{self.total}  {clock}  {note}".rstrip()

    def draw(self, note: str) -> None:
        """Draw the line again; the rest of the old one is erased."""
        filled = self.WIDTH * self.done // self.total
        bar = "━" * filled + "╌" * (self.WIDTH - filled)
        line = f"{self.label:<10} {bar} {self.state(note)}"
        line = line[: shutil.get_terminal_size().columns - 1]  # a wrapped line cannot be redrawn
        print(f"\r\033[K{line}", end="", flush=True)
