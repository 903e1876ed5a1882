"""The file of results: JSON lines, one object each, written and flushed as they come.

Every line has "schema" (:data:`.schema.SCHEMA`) and "kind":

* ``run``: begins the file, and is added by every ``--resume``. "environment" (processor, card,
  versions, commit, ...), "packages" (version of each peer that is installed), "command".
* ``floor``: what the machine can do, measured among the entrants of a case. "suite", "case" (the
  fields of cases.Case), "name" ("copy" or "products"), "seconds" (the least that the case can
  take), "rate" (bytes or floating-point operations per second), "time".
* ``result``: one entrant in one case. "suite", "case", "case_name", "entrant", "title",
  "is_ours", "status" (of :data:`STATUSES`), "why" (where it is not "measured"), "nearest" (what it
  computes where it cannot compute the same), "error" ("loss" and "gradients", relative to float64,
  None: not compared), "time", "memory" ("allocator_bytes", "process_bytes": peaks beyond the
  inputs; None: unknown), "bytes" (the least traffic; logits) or "flops" (of the products;
  heads), "floor_share" (the least time over its own; None without a floor, or with a "nearest").
* ``done``: a case is complete: no method was cut off by the clock. "suite", "case", "case_name",
  "seconds", "threads".

"time" is None, or has "median_s", "quartiles_s" (two), "fastest_s", "repeats", "undisturbed". A
later line about the same suite, case and entrant replaces an earlier one: a case that was
interrupted is measured again as a whole. Figures that are not finite are the strings "nan", "inf"
and "-inf", which JSON has no numbers for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, TextIO

from .cases import Case
from .schema import SCHEMA, renamed

#: What became of an entrant: its numbers are right, and it was timed; its numbers are wrong; it
#: raised or crashed; too large; too slow; cannot take part.
STATUSES = ("measured", "wrong", "failed", "no memory", "no time", "skipped")

#: Fields that hold figures, and how those are written that are not finite.
FIGURES, NOT_FINITE = ("error", "time", "floor_share", "seconds", "rate"), ("nan", "inf", "-inf")

Line = dict[str, Any]


#: Fields that readers rely on, by kind, and those of a time.
_TEXT: dict[str, Any] = dict.fromkeys(("case_name", "entrant", "title", "status", "why"), str)
_CASE: dict[str, Any] = {"suite": str, "case": dict}
FIGURE = (int, float, NoneType)
FIELDS: dict[str, dict[str, Any]] = {
    "run": {"environment": dict},
    "floor": {**_CASE, "name": str, "seconds": (int, float), "rate": (int, float)},
    "result": {**_CASE, **_TEXT, "is_ours": bool, "nearest": str, "error": (dict, NoneType),
               "time": (dict, NoneType), "memory": (dict, NoneType),
               "floor_share": FIGURE},
    "done": _CASE,
}  # fmt: skip
TIME: dict[str, Any] = {"median_s": (int, float), "quartiles_s": list, "repeats": int,
                        "undisturbed": int}  # fmt: skip
SIZES: dict[str, Any] = {"n": int, "v": int, "dtype": str}


def _check(found: Line, fields: dict[str, Any], what: str) -> None:
    for name, kind in fields.items():
        if name not in found:
            raise KeyError(f"{what} without {name}")
        if not isinstance(found[name], kind):
            raise TypeError(f"{name} of {what} is {found[name]!r}")


class Writer:
    """Appends lines to a stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, kind: str, **content: Any) -> None:
        line = {"schema": SCHEMA, "kind": kind, **content}
        print(dumps(line), file=self._stream, flush=True)


def dumps(line: Line) -> str:
    """A line as JSON."""
    return json.dumps(_written(line), ensure_ascii=False, allow_nan=False)


def loads(text: str) -> Line:
    """A line from JSON.

    Raises:
        ValueError: it is none.
    """
    line = json.loads(text)
    if not isinstance(line, dict):
        raise ValueError("not an object")
    return {key: _read(value) if key in FIGURES else value for key, value in line.items()}


def _written(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _written(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_written(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _read(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _read(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_read(one) for one in value]
    return float(value) if value in NOT_FINITE else value


@dataclass
class Report:
    """A file of results, as it was read: the last word on everything."""

    runs: list[Line] = field(default_factory=list)
    floors: dict[tuple[str, str], Line] = field(default_factory=dict)  # by suite and case name
    results: dict[tuple[str, str, str], Line] = field(default_factory=dict)  # and entrant
    done: set[tuple[str, str]] = field(default_factory=set)

    @property
    def environment(self) -> dict[str, Any]:
        found: dict[str, Any] = self.runs[-1]["environment"]
        return found

    @property
    def suites(self) -> list[str]:
        """In the order of the file."""
        return list(dict.fromkeys(suite for suite, _, _ in self.results))

    def cases(self, suite: str) -> list[Case]:
        """In the order of the file."""
        found = {name: Case(**line["case"]) for (s, name, _), line in self.results.items()
                 if s == suite}  # fmt: skip
        return list(found.values())

    def of(self, suite: str, case: Case) -> list[Line]:
        """The results of a case."""
        return [x for (s, name, _), x in self.results.items() if (s, name) == (suite, case.name)]

    def add(self, line: Line) -> None:
        """Takes a line.

        Raises:
            KeyError, TypeError: a field is missing, or of another type; the message names it.
        """
        kind = line["kind"]
        _check(line, FIELDS.get(kind, {}), kind)
        if kind == "run":
            self.runs.append(line)
            return
        _check(line["case"], SIZES, "case")
        for part, fields in (("time", TIME), ("error", {}), ("memory", {})):
            if line.get(part) is not None:
                found = line[part]
                _check(found, fields or dict.fromkeys(found, FIGURE), part)
        key = line["suite"], Case(**line["case"]).name
        if kind == "floor":
            self.floors[key] = line
        elif kind == "result":
            self.results[(*key, line["entrant"])] = line
        elif kind == "done":
            self.done.add(key)


def read(paths: Sequence[Path]) -> Report:
    """Files of results, as one report.

    Raises:
        ValueError: not such a file; the message names it and the line. A last line that was cut
            off by an interruption is passed over.
    """
    report = Report()
    for path in paths:
        for number, line in _lines(path):
            try:
                report.add(line)
            except (KeyError, TypeError) as error:
                why = error.args[0] if isinstance(error, KeyError) else error
                raise ValueError(f"{path}:{number}: no line of results ({why})") from error
    if not report.runs:
        raise ValueError(f"{', '.join(map(str, paths))}: no results in it")
    return report


def cut_off(path: Path) -> bool:
    """Drops a last line that does not end, so that lines can be appended; whether there was one."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        path.write_bytes(whole)
    return whole != content


def _lines(path: Path) -> Iterator[tuple[int, Line]]:
    try:
        texts = path.read_text().splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    for number, text in enumerate(texts, 1):
        try:
            line = loads(text)
            if line["schema"] == 2:
                line = renamed(line)
            elif line["schema"] != SCHEMA:
                raise ValueError(f"its schema is {line['schema']!r}, not {SCHEMA}")
        except (ValueError, TypeError, KeyError) as error:
            if number == len(texts) and not text.endswith("\n"):
                return
            raise ValueError(f"{path}:{number}: no line of results ({error})") from error
        yield number, line
