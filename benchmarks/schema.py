"""The records of a file of results: JSON lines, each with "schema", "kind" and these fields."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA = 4


@dataclass(frozen=True)
class Run:
    """Begins a file, and is added by every ``--resume``."""

    environment: dict[str, Any]  # processor, card, versions, commit, ...
    packages: dict[str, str]  # version of each peer that is installed
    command: list[str]


@dataclass(frozen=True)
class Bound:
    """The lower bound of a case's time, measured in turns with the methods."""

    suite: str
    case: dict[str, Any]  # the fields of cases.Case
    name: str  # "copy" or "products"
    seconds: float  # the least that the case can take
    rate: float  # bytes or floating-point operations per second
    why: str = ""  # why it is not in the case's dtype
    time: dict[str, Any] | None = None


@dataclass(frozen=True)
class Result:
    """One method in one case."""

    suite: str
    case: dict[str, Any]
    method: str
    title: str
    is_ours: bool
    #: measured: its numbers are right, and it was timed; wrong: they are not; failed: it raised or
    #: crashed; no memory: too large; no time: too slow; skipped: it cannot take part.
    status: str
    why: str = ""  # if it is not "measured"
    nearest: str = ""  # what it computes if it cannot compute the same
    #: "loss", "gradients": relative to float64, or in units (accuracy.py). May be NaN or infinite;
    #: None: not compared.
    error: dict[str, float | None] = field(default_factory=dict)
    #: "median_s", "quartiles_s" (two), "fastest_s", "repeats", "undisturbed" (of the repeats)
    time: dict[str, Any] | None = None
    #: "allocator_bytes", "process_bytes": peaks beyond the inputs; None: unknown
    memory: dict[str, int | None] = field(default_factory=dict)
    bound_share: float | None = None  # the least time over its own; None without a lower bound


@dataclass(frozen=True)
class Done:
    """A case is complete: no method was cut off by the clock."""

    suite: str
    case: dict[str, Any]
    seconds: float
    threads: int


Record = Run | Bound | Result | Done
KINDS = {"run": Run, "bound": Bound, "result": Result, "done": Done}


def dump(record: Record) -> str:
    """Return a record as a line."""
    head = {"schema": SCHEMA, "kind": type(record).__name__.lower()}
    return json.dumps({**head, **asdict(record)}, ensure_ascii=False)


def load(text: str) -> Record:
    """Return the record of a line.

    Raises:
        ValueError: If the line is no record of this schema; the message says why.
    """
    try:
        fields = json.loads(text)
        if (schema := fields.pop("schema")) != SCHEMA:
            raise ValueError(f"its schema is {schema!r}, not {SCHEMA}")
        return KINDS[fields.pop("kind")](**fields)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
