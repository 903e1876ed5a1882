"""The version of the lines of results, and how lines of the version before are read."""

from __future__ import annotations

from typing import Any

SCHEMA = 3
#: Fields of a line of schema 2, how its names began, and how they begin now.
_RENAMED = (
    ("suite", "linear", "heads"),
    ("case_name", "linear", "heads"),
    ("entrant", "linearkdloss", "kdloss-heads"),
    ("title", "LinearKDLoss", "KDLoss, heads"),
    ("title", "torch.compile of it", "torch.compile(eager)"),
)


def renamed(line: dict[str, Any]) -> dict[str, Any]:
    """Return a line of schema 2 with the present names of suites, levels and methods."""
    found = dict(line)
    for name, old, new in _RENAMED:
        text = found.get(name)
        if isinstance(text, str) and text.startswith(old):
            found[name] = new + text.removeprefix(old)
    case = found.get("case")
    if isinstance(case, dict) and case.get("level") == "linear":
        found["case"] = {**case, "level": "heads"}
    return found
