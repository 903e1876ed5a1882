"""Short listings of GPU code."""

from __future__ import annotations

from benchmarks.sass import Code, parse


def code_of(text: str) -> Code:
    """Return the kernel in a listing of lines or semicolons; labels begin with a dot."""
    lines = [line.strip() for line in text.replace("\n", ";").split(";") if line.strip()]
    listing = [
        line if line[0] == "." else f"  /*{i:04x}*/ {line} ;" for i, line in enumerate(lines)
    ]
    return parse("\n".join([".text.kernel:", *listing]))["kernel"]
