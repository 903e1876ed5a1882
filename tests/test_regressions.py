"""Every bug of other projects in regressions.md has a test that exists."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
#: Case, upstream, file, test.
ROW = re.compile(r"^\| ([RN]-\d\d) \| .+ \| (\S+\.py) \| (\w+) \|$", re.MULTILINE)
NOT_TESTED = {"R-51", "N-35", "N-36", "N-38", "N-39"}  # regressions.md says why


def test_every_case_has_a_test() -> None:
    sources = {str(file.relative_to(HERE)): file.read_text() for file in HERE.rglob("*.py")}
    table = ROW.findall((HERE / "regressions.md").read_text())
    for case, file, test in table:
        assert f"\ndef {test}(" in sources[file], case
    named = re.findall(r"\ndef test_\w*?((?:_[RN]_\d\d)+)\(", "".join(sources.values()))
    numbers = {f"{kind}-{n}" for names in named for kind, n in re.findall("([RN])_(..)", names)}
    expected = {f"R-{i:02d}" for i in range(1, 66)} | {f"N-{i:02d}" for i in range(1, 40)}
    assert {case for case, _, _ in table} | numbers == expected - NOT_TESTED
