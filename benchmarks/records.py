"""Files of results: written a line at a time as it comes, read as a Report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from .cases import Case
from .schema import Bound, Done, Record, Result, Run, dump, load

#: What must be the same for results to be in one file.
SAME = ("device", "processor", "instruction_set", "driver", "threads", "torch", "fused_kd",
        "commit", "platform")  # fmt: skip


class Writer:
    """Appends lines to a stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def add(self, record: Record) -> None:
        """Append a record."""
        print(dump(record), file=self._stream, flush=True)


@dataclass
class Report:
    """Files of results; the last record of a method in a case wins."""

    runs: list[Run] = field(default_factory=list)
    bounds: dict[tuple[str, Case], Bound] = field(default_factory=dict)
    results: dict[tuple[str, Case, str], Result] = field(default_factory=dict)
    done: set[tuple[str, Case]] = field(default_factory=set)

    @property
    def environment(self) -> dict[str, Any]:
        """Return what the figures depend on."""
        return self.runs[-1].environment

    def of(self, suite: str, case: Case) -> list[Result]:
        """Return the results of a case."""
        return [x for key, x in self.results.items() if key[:2] == (suite, case)]

    def add(self, record: Record | str | None) -> None:
        """Add a record; raise TypeError if its case has other fields than a Case."""
        if isinstance(record, Run):
            self.runs.append(record)
        if not isinstance(record, Bound | Result | Done):
            return
        key = record.suite, Case(**record.case)
        if isinstance(record, Bound):
            self.bounds[key] = record
        elif isinstance(record, Result):
            self.results[(*key, record.method)] = record
        else:
            self.done.add(key)


def read(paths: Sequence[Path], together: bool = False) -> Report:
    """Return files of results as one report; `together`: they must be of one machine and version.

    Raises:
        ValueError: If one is no such file; the message names the file and the line. A last line
            that was cut off by an interruption is skipped.
    """
    report = Report()
    for path in paths:
        try:
            lines = path.read_text().splitlines(keepends=True)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: cannot be read ({error})") from error
        for number, line in enumerate(lines, 1):
            if not line.endswith("\n"):
                break
            try:
                report.add(load(line))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}:{number}: no line of results ({error})") from error
    if not report.runs:
        raise ValueError(f"{', '.join(map(str, paths))}: no results in it")
    for run in report.runs if together else ():
        if found := differences(run, report.runs[-1]):
            raise ValueError(f"files of different machines or versions: {'; '.join(found)}")
    return report


def differences(before: Run, now: Run) -> list[str]:
    """Return in what two runs differ that must be the same: environment, versions of peers.

    A peer that only one of them has is no difference: the other one left it out.
    """
    pairs = [(name, before.environment.get(name), now.environment.get(name)) for name in SAME]
    old, new = before.packages, now.packages
    pairs += [(name, old[name], new[name]) for name in old if name in new]
    return [f"{name} was {was!r} and is {value!r}" for name, was, value in pairs if was != value]
