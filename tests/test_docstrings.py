"""A function's docstring begins with a verb in the imperative. (Whether there is one: ruff's D.)"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("benchmarks", "csrc", "demo", "docs", "examples", "fused_kd", "tests", "tools")
#: A new verb is added here, in order; "Returns" and "Memory" are no imperatives.
IN_ORDER = """
    Accumulate Add Allocate Append Apply Assert Begin Bind Build Call Cast Check Choose Clear Close
    Collect Combine Compare Compile Compute Configure Convert Copy Count Create Decide Describe
    Detach Discard Divide Draw Drop Enter Evaluate Expand Fill Find Fold Format Gather Handle Ignore
    Import Insert Install Iterate Launch Load Log Make Measure Merge Move Multiply Normalize Open
    Overwrite Pack Parse Prepare Print Process Raise Read Rebase Recompute Record Reduce Refuse
    Register Release Remove Rename Replace Require Rescale Reset Resolve Restore Return Round Run
    Save Scale Select Send Set Skip Split Start Stop Store Subtract Synchronize Take Train Transpose
    Undo Update Use Validate Wait Warn Widen Wrap Write Yield
"""
VERBS = frozenset(IN_ORDER.split())


def first_words(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the place of each function that has a docstring, and the docstring's first word."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if is_function and (text := ast.get_docstring(node)) is not None:
            place = f"{path.relative_to(ROOT).as_posix()}:{node.lineno} {node.name}"
            yield place, (text.split(maxsplit=1) or [""])[0].rstrip(".,:")


def test_docstrings_of_functions_begin_with_a_verb() -> None:
    paths = [ROOT / "setup.py", *(x for place in PLACES for x in (ROOT / place).rglob("*.py"))]
    words = [pair for path in sorted(paths) for pair in first_words(path)]
    assert words
    wrong = [f"{place}: {word} ..." for place, word in words if word not in VERBS]
    assert not wrong, "begin with a verb in the imperative:\n" + "\n".join(wrong)


def test_the_verbs_are_sorted() -> None:
    assert sorted(VERBS) == IN_ORDER.split()
