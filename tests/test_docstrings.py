"""A function's docstring begins with a verb in the imperative. (Whether there is one: ruff's D.)"""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "fused_kd"
#: A new verb is added here; "Returns" and "Memory" are no imperatives.
# fmt: off
VERBS = {
    "Accumulate", "Add", "Allocate", "Append", "Apply", "Assert", "Begin", "Bind", "Build", "Call",
    "Cast", "Check", "Choose", "Clear", "Close", "Collect", "Combine", "Compare", "Compile",
    "Compute", "Configure", "Convert", "Copy", "Count", "Create", "Decide", "Describe", "Detach",
    "Discard", "Divide", "Drop", "Enter", "Evaluate", "Expand", "Fill", "Find", "Fold", "Format",
    "Gather", "Handle", "Ignore", "Import", "Insert", "Install", "Iterate", "Launch", "Load", "Log",
    "Make", "Merge", "Move", "Multiply", "Normalize", "Open", "Overwrite", "Pack", "Parse",
    "Prepare", "Print", "Process", "Raise", "Read", "Rebase", "Recompute", "Record", "Reduce",
    "Refuse", "Register", "Release", "Remove", "Rename", "Replace", "Require", "Rescale", "Reset",
    "Resolve", "Restore", "Return", "Round", "Run", "Save", "Scale", "Select", "Set", "Skip",
    "Split", "Start", "Stop", "Store", "Subtract", "Synchronize", "Take", "Transpose", "Undo",
    "Update", "Use", "Validate", "Wait", "Warn", "Widen", "Wrap", "Write", "Yield",
}
# fmt: on


def test_docstrings_of_functions_begin_with_a_verb() -> None:
    seen, wrong = 0, []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            if is_function and (text := ast.get_docstring(node)) is not None:
                seen += 1
                first, *_ = text.split(maxsplit=1) or [""]
                if first.rstrip(".,:") not in VERBS:
                    wrong.append(f"fused_kd/{name}:{node.lineno} {node.name}: {first} ...")
    assert seen > 0
    assert not wrong, "begin with a verb in the imperative:\n" + "\n".join(wrong)
