"""What a run shows: a line of progress and tables; and what every command line needs."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO


class Progress:
    """One line on standard error: redrawn on a terminal, now and then a new one elsewhere."""

    SECONDS = 15  # between lines, where it is no terminal

    def __init__(self, label: str, total: int, stream: TextIO | None = None) -> None:
        self.label, self.total, self.done = label, total, 0
        self.stream = stream or sys.stderr
        self.start = self.drawn = time.perf_counter()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.stream.isatty():
            print("\r\033[K", end="", file=self.stream, flush=True)

    def advance(self, note: str = "") -> None:
        """One more step is done; there may be more than `total` of them."""
        self.done += 1
        self._draw(note)

    def at(self, share: float, note: str = "") -> None:
        """So much of the whole is done."""
        self.done = int(share * self.total)
        self._draw(note)

    def _draw(self, note: str) -> None:
        now = time.perf_counter()
        share = min(100, 100 * self.done // max(1, self.total))
        line = f"{self.label}: {share:3d} %, {now - self.start:.0f} s  {note}"
        if self.stream.isatty():
            if now - self.drawn > 0.1:
                self.drawn = now
                print(f"\r\033[K{line}", end="", file=self.stream, flush=True)
        elif now - self.drawn > self.SECONDS:
            self.drawn = now
            print(line, file=self.stream, flush=True)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns under a rule; the first to the left, the others to the right."""
    widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]

    def align(line: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([align(head), rule, *(align(row) for row in rows)])


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """The same in Markdown; the first `left` columns to the left."""
    rule = [":---" if i < left else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *rows])


def verdict(reached: bool) -> str:
    return "reached" if reached else "NOT reached"


def show_environment(what: str, found: dict[str, Any]) -> None:
    """The head of a run: what is measured, and on what."""
    print(what)
    for name, value in found.items():
        print(f"  {name.replace('_', ' '):<16} {value}", flush=True)


def markers(name: str) -> tuple[str, str]:
    """The lines of a document between which the table of this name stands."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def between_markers(document: str, text: str, name: str) -> str:
    """The document with `text` between its two markers, which are appended if missing.

    Raises:
        ValueError: one marker without the other, or in the wrong order, or more than one.
    """
    begin, end = markers(name)
    counts = document.count(begin), document.count(end)
    if counts == (0, 0):
        return document + ("\n" if document else "") + f"{begin}\n{text}\n{end}\n"
    if counts != (1, 1) or document.index(begin) > document.index(end):
        raise ValueError(f"expected one {begin} and after it one {end}")
    before, rest = document.split(begin)
    return f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"


class Parser(argparse.ArgumentParser):
    """Bad options: one line and exit code 2."""

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: error: {message}\n")

    def check_markers(self, file: Path | None, name: str) -> None:
        """Before anything is measured: that `show` will be able to write."""
        if file is not None:
            try:
                between_markers(file.read_text(), "", name)
            except ValueError as error:
                self.error(f"{file}: {error}")


def show(text: str, file: Path | None, name: str) -> None:
    """Prints a table, or writes it between the markers of a file."""
    if file is None:
        print(text)
    else:
        file.write_text(between_markers(file.read_text(), text, name))
        print(f"table written to {file}")


def positive_int(text: str) -> int:
    """For `type=` of an option."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1; got {text!r}")
    return value


def positive_float(text: str) -> float:
    """For `type=` of an option."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a finite number above 0; got {text!r}")
    return value


def writable_file(text: str) -> Path:
    """For `type=` of an option."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a directory, not a file")
    try:
        path.open("a").close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {text!r}: {error.strerror}") from error
    return path
