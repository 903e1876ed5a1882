"""docs/numerics.md has a row for every divergence, with its number of passes."""

from __future__ import annotations

import re
from pathlib import Path

from fused_kd.divergences import TABLE

PAGE = (Path(__file__).parents[1] / "docs" / "numerics.md").read_text(encoding="utf-8")


def test_every_divergence_has_a_row() -> None:
    section = PAGE.partition("## Formulas")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|.* (\d) \|$", section, re.MULTILINE)
    assert rows == [(name, str(1 + entry.two_passes)) for name, entry in TABLE.items()]
