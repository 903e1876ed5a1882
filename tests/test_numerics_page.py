"""docs/numerics.md has a row of formulas for every divergence."""

from __future__ import annotations

import re
from pathlib import Path

from fused_kd.divergences import DIVERGENCES

PAGE = (Path(__file__).parents[1] / "docs" / "numerics.md").read_text(encoding="utf-8")


def test_every_divergence_has_a_row() -> None:
    section = PAGE.partition("## Formulas")[2].partition("\n## ")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \|.* \d \|$", section, re.MULTILINE)) == DIVERGENCES
