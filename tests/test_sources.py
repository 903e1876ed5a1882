"""Rules of the sources: imports in one direction, 64-bit sizes, formulas in the docs."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from fused_kd.divergences import DIVERGENCES

ROOT = Path(__file__).resolve().parents[1]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(path): path for path in (ROOT / "fused_kd").rglob("*.py")}


def imported(name: str) -> Iterator[str]:
    """Yield the modules that importing `name` imports; not those that its functions import."""
    package = name.split(".") if FILES[name].name == "__init__.py" else name.split(".")[:-1]
    statements: list[ast.AST] = [ast.parse(FILES[name].read_text(encoding="utf-8"))]
    while statements:
        node = statements.pop()
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
            yield from (full if full in FILES else base for full in names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, (ast.Module, ast.If, ast.Try, ast.With, ast.ExceptHandler)):
            statements.extend(ast.iter_child_nodes(node))


def test_no_imports_go_in_circles() -> None:
    graph = {name: set(imported(name)) & FILES.keys() - {name} for name in FILES}
    assert graph["fused_kd.functional"] >= {"fused_kd.engines", "fused_kd.checks"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_no_int_holds_a_size_or_an_offset() -> None:
    narrow = re.compile(
        r"\b(?:int|unsigned|long|u?int32_t)\s+(?:\w*(?:stride|numel|row|offset)\w*|[NV])\s*[;,)=]"
    )
    files = [f for f in (ROOT / "csrc").rglob("*") if f.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert len(files) > 5
    assert narrow.search("int row_stride = 3;")  # it can fail
    for file in files:
        assert not (match := narrow.search(file.read_text())), (file.name, match)


def test_every_divergence_has_a_row_of_formulas() -> None:
    page = (ROOT / "docs" / "numerics.md").read_text(encoding="utf-8")
    section = page.partition("## Formulas")[2].partition("\n## ")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \|.* \d \|$", section, re.MULTILINE)) == DIVERGENCES
