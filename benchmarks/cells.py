"""Cells of tables, and how figures are written in them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fused_kd.options import MIB

from .report import markdown_table, table

MISSING = "–"
#: From this many on, seconds are shown as such; below, as milliseconds.
LONG = 1.0


@dataclass(frozen=True)
class Table:
    """Cells, to be shown on a terminal, in Markdown, or as HTML."""

    head: list[str]
    rows: list[list[str]]
    left: int = 1  # columns that are aligned to the left, from the left
    note: bool = False  # the last column is one too

    def text(self) -> str:
        head, rows = self.head, self.rows
        for i in [*range(1, self.left), *([len(head) - 1] if self.note else [])]:
            width = max(len(row[i]) for row in [head, *rows])
            head, rows = _padded(head, i, width), [_padded(row, i, width) for row in rows]
        return table(head, rows)

    def markdown(self) -> str:
        rows = [[cell.replace("|", "\\|") for cell in row] for row in self.rows]
        lines = markdown_table(self.head, rows, self.left).split("\n")
        if self.note:
            lines[1] = lines[1].removesuffix("---: |") + ":--- |"
        return "\n".join(lines)

    def without_empty(self) -> Table:
        """Only the columns in which something stands, and the first."""
        kept = [i for i in range(len(self.head)) if i == 0 or any(row[i] for row in self.rows)]
        has_note = self.note and len(self.head) - 1 in kept
        rows = [[row[i] for i in kept] for row in self.rows]
        return Table([self.head[i] for i in kept], rows, self.left, has_note)


def _padded(row: list[str], column: int, width: int) -> list[str]:
    return [cell.ljust(width) if i == column else cell for i, cell in enumerate(row)]


def figure(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def unit_of(times: Sequence[float | None]) -> tuple[str, float]:
    """In which all of them are shown, and its seconds: by the fastest."""
    fastest = min((time for time in times if time is not None), default=0.0)
    return ("s", 1.0) if fastest >= LONG else ("ms", 1e-3)


def mebibytes(count: int | None) -> str:
    if count is None:
        return ""
    value = count / MIB
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def scientific(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"
