"""``python -m examples [NAME ...] [--steps N]``: every example, beside the framework's own loss.

Each runs in a process of its own; what it measured is a line of out/examples/results.jsonl. With
``--write`` the lines become those of examples/results.jsonl, whose other lines stay, and the table
and the picture of docs/integrations.md are made from that.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.report import between_markers, markers
from examples import picture
from fused_kd.options import MIB

ROOT = Path(__file__).resolve().parents[1]
NAME = "integrations"
MEASURED, COMMITTED = Path("out/examples/results.jsonl"), Path("examples/results.jsonl")
DOCUMENT, PICTURE = Path("docs/integrations.md"), Path("docs/integrations.svg")
#: Name of a module here: the framework that it compares with, and what else that needs here.
EXAMPLES = {
    "transformers_trainer": ("transformers", "accelerate"),  # a Trainer asks for it when it is made
    "trl_gkd": ("trl", "transformers"),
    "trl_distillation": ("trl", "transformers"),
    "liger": ("liger_kernel", "transformers"),
    "torchtune": ("torchtune", "transformers"),
    "model_optimizer": ("modelopt", "transformers"),
    "lightning_module": ("lightning", "transformers"),
    "accelerate_loop": ("accelerate", "transformers"),
}
#: What the text of all examples needs.
TEXT = "mistral_common"


def main(arguments: list[str] | None = None) -> int:
    """Runs the examples; returns 1 if one failed, or if there is nothing to write."""
    parser = argparse.ArgumentParser(prog="python -m examples", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {' '.join(EXAMPLES)}")
    parser.add_argument("--steps", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--write", action="store_true", help="keep the results, write the table")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in EXAMPLES]:
        parser.error(f"unknown example {unknown[0]!r}; there are {' '.join(EXAMPLES)}")
    if options.steps < 1:
        parser.error(f"--steps must be at least 1; got {options.steps}")
    (ROOT / MEASURED).unlink(missing_ok=True)
    failed = [name for name in options.names or EXAMPLES if not _run(name, options.steps)]
    if options.write and not failed:
        if not (ROOT / MEASURED).exists():
            print("nothing was measured: nothing is written")
            return 1
        write()
    for name in failed:
        print(f"FAILED {name}")
    return 1 if failed else 0


def _run(name: str, steps: int) -> bool:
    missing = [package for package in (*EXAMPLES[name], TEXT) if find_spec(package) is None]
    if missing:
        print(f"left out: {name}: not installed: {', '.join(missing)}")
        return True
    command = [sys.executable, "-m", f"examples.{name}", "--steps", str(steps)]
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def write() -> None:
    """Merges what was measured into what is committed, and makes the document from that."""
    lines = _lines(COMMITTED) | _lines(MEASURED)
    (ROOT / COMMITTED).write_text("".join(json.dumps(line) + "\n" for line in lines.values()))
    document = ROOT / DOCUMENT
    document.write_text(between_markers(document.read_text(), table([*lines.values()]), NAME))
    (ROOT / PICTURE).write_text(picture.curves([*lines.values()]))


def _lines(file: Path) -> dict[str, dict[str, Any]]:
    """By the name of the comparison."""
    path = ROOT / file
    found = path.read_text().splitlines() if path.exists() else []
    return {line["name"]: line for line in map(json.loads, found)}


def table(lines: list[dict[str, Any]]) -> str:
    """Of all comparisons; a cell is "own / ours" where there are two."""
    machines = ", ".join(dict.fromkeys(line["processor"] for line in lines))
    heads = ("", "with", "steps", "last loss, own / ours", "losses differ by", "weights differ by",
             "training moved a weight by", "s a step, own / ours", "MiB, own / ours")  # fmt: skip
    rows = [heads, ("---",) * len(heads)]
    for line in lines:
        rows.append((
            line["name"], line["framework"], str(line["steps"]),
            f"{line['losses_own'][-1]:.5f} / {line['losses_ours'][-1]:.5f}",
            f"{line['largest_loss_difference']:.1e}", f"{line['largest_weight_difference']:.1e}",
            f"{line['largest_weight_change']:.1e}",
            f"{line['seconds_own']:.2f} / {line['seconds_ours']:.2f}",
            f"{_mebibytes(line['peak_own'])} / {_mebibytes(line['peak_ours'])}",
        ))  # fmt: skip
    return "\n".join([f"{machines}:", "", *("| " + " | ".join(row) + " |" for row in rows)])


def _mebibytes(size: int | None) -> str:
    return "?" if size is None else f"{size / MIB:.0f}"


def document_is_right() -> bool:
    """Whether table and picture are those of the committed results."""
    (begin, end), lines = markers(NAME), [*_lines(COMMITTED).values()]
    text = (ROOT / DOCUMENT).read_text()
    is_there = f"{begin}\n{table(lines)}\n{end}" in text
    return is_there and picture.digest(lines) in (ROOT / PICTURE).read_text()


if __name__ == "__main__":
    sys.exit(main())
