"""``python -m benchmarks run|plot|compare|list|publish``: our losses and all peers, in one run.

A run in which something crashed or ours is wrong, and a comparison that finds a regression, end
with status 1, bad options with 2, an interrupted run, whose results are kept, with 130.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from math import inf
from pathlib import Path

import torch

from fused_kd.divergences import DIVERGENCES
from fused_kd.testing import DTYPES

from . import runner
from .cases import SUITES, Case
from .methods import METHODS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status."""
    options = vars(make_parser().parse_args(arguments))
    command = options.pop("command")
    try:
        if command == "run":
            return runner.run(argparse.Namespace(**options))
        if command == "list":
            return _list()
        from . import publish  # with pandas, which `run` does not need

        return getattr(publish, command)(**options)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="methods, and why one cannot run here")
    add = commands.add_parser("plot", help="a page and pictures of files of results").add_argument
    add("files", nargs="+", type=Path)
    add("--output", type=Path, default=Path("out/benchmarks"), metavar="FOLDER")
    add = commands.add_parser("compare", help="whether the second has a regression").add_argument
    add("files", nargs="+", type=Path, metavar="FILE", help="before, and after (runs: the best)")
    add("--tolerance", type=float, default=0.1, help="of ratios; default: %(default)g")
    add = commands.add_parser("publish", help="README and docs from all results").add_argument
    add("--accuracy", type=Path, metavar="FILE", help="its errors, too, into docs/numerics.md")
    add = commands.add_parser("run", help="measure suites, into a file of results").add_argument
    add("suites", nargs="*", metavar="SUITE", help=f"{' '.join(SUITES)}; default: all but guard")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", nargs="+", choices=list(DTYPES))
    add("--n", nargs="+", type=int, help="numbers of rows")
    add("--v", nargs="+", type=int, help="vocabularies")
    add("--hidden", nargs=2, type=int, help="hidden sizes of student and teacher")
    add("--temperature", nargs="+", type=float)
    add("--divergence", nargs="+", choices=DIVERGENCES)
    keys = sorted({method.key for method in METHODS.values()})
    add("--peers", nargs="+", default=[], choices=keys, metavar="KEY", help="only these methods")
    add("--repeats", type=int, default=15, help="of each method, at most")
    add("--seconds-each", type=float, default=8.0, help="of all repeats of one method")
    add("--limit-seconds", type=float, default=30.0, help="of a call; slower ones get no time")
    add("--seconds", type=float, default=inf, help="of the run; nothing is begun after that")
    add("--threads", type=int, help="default: torch's choice")
    add("--in-process", action="store_true", help="quicker, but a crash ends the run")
    add("--output", type=Path, default=Path("out/benchmarks.jsonl"), metavar="FILE")
    add("--resume", action="store_true", help="measure what the output does not have yet")
    return parser


def _list() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for method in METHODS.values():
        cases = [Case(8, 64, "fp32", 2.0, name, method.level, 8, 8, device) for name in DIVERGENCES]
        reasons = [method.why_not(case) for case in cases]
        why = "runs here" if None in reasons else reasons[0]
        print(f"{method.key:<24} {method.level:<7} {method.title:<36} {why}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
