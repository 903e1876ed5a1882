"""Tables, documents with a table between markers, and what every command line needs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return columns under a rule; the first to the left, the others to the right."""
    widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]

    def align(line: Sequence[str]) -> str:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        return "  ".join([line[0].ljust(widths[0]), *cells[1:]]).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([align(head), rule, *map(align, rows)])


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return the same in Markdown; the first `left` columns to the left."""
    rule = [":---" if i < left else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *rows])


def markers(name: str) -> tuple[str, str]:
    """Return the lines of a document between which the table of this name is."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def between_markers(document: str, text: str, name: str) -> str:
    """Return the document with `text` between its two markers.

    Raises:
        ValueError: If there is not one marker of each kind, in the right order.
    """
    begin, end = markers(name)
    counts = document.count(begin), document.count(end)
    if counts != (1, 1) or document.index(begin) > document.index(end):
        raise ValueError(f"expected one {begin} and after it one {end}")
    before, rest = document.split(begin)
    return f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with exit status 2."""

    def error(self, message: str) -> Any:
        """End the process."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def positive_int(text: str) -> int:
    """Return an option's value (for `type=`)."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1; got {text!r}")
    return int(text)


def positive_float(text: str) -> float:
    """Return an option's value (for `type=`)."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a finite number above 0; got {text!r}")
    return value
