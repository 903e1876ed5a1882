"""Which function of a C++ file a line belongs to: enough of a reading for our own kernels."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

#: What can stand before a parenthesis in a declaration without being the function's name.
_NOT_NAMES = {"__launch_bounds__", "__cluster_dims__", "alignas", "__align__", "decltype"}
_CONTROL = re.compile(r"\b(if|for|while|switch|catch|else|do)\b")
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])+'", re.DOTALL)


@cache
def functions(file: str) -> tuple[tuple[str, int, int], ...]:
    """Return name, first and last line of each function's body; lambdas belong to their function.

    A file that is not there (the compiler's own) has none.
    """
    path = Path(file)
    if not path.is_file():
        return ()
    text = _COMMENT.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), path.read_text())
    text = re.sub(r"^[ \t]*#[^\n]*", "", text, flags=re.MULTILINE)
    found, open_, begin = [], [], 0
    for place in re.finditer(r"[{};]", text):
        head, i = text[begin : place.start()], place.start()
        if place[0] == "{":
            name = _name(head)
            start = text.count("\n", 0, begin + len(head) - len(head.lstrip())) + 1
            open_.append((name, start))
        elif place[0] == "}" and open_:
            name, start = open_.pop()
            if name:
                found.append((name, start, text.count("\n", 0, i) + 1))
        begin = i + 1
    return tuple(found)


def _name(head: str) -> str | None:
    """Return the function that this begins; None for a block, a type, a lambda, a list."""
    if "(" not in head or _CONTROL.search(head) or re.search(r"[=\[,(]\s*$|\]\s*\(|return", head):
        return None
    for found in re.finditer(r"(operator\s*\(\s*\)|[A-Za-z_]\w*)\s*\(", head):
        if found[1] not in _NOT_NAMES:
            return found[1].replace(" ", "")
    return None


def function_at(file: str, line: int) -> str | None:
    """Return the innermost function around a line."""
    around = [one for one in functions(file) if one[1] <= line <= one[2]]
    return min(around, key=lambda one: one[2] - one[1])[0] if around else None
