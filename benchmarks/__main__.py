"""The command line: ``python -m benchmarks run|plot|compare|list|publish``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Any

import torch

from fused_kd.divergences import DIVERGENCES
from fused_kd.testing import DTYPES

from . import runner
from .cases import SUITES, Case
from .methods import METHODS

DESCRIPTION = """Time and check fused_kd and other libraries' losses.

Exit status: 0; 1 if a method crashed, a result of ours is wrong, or compare finds a regression;
2 for bad options; 130 if interrupted (results are kept)."""
COMMANDS = {
    "run": "measure suites and append to a result file",
    "plot": "draw a page and pictures from result files",
    "compare": "compare two result files; report regressions",
    "list": "list the methods; say which cannot run here, and why",
    "publish": "rewrite the tables of README and docs from the results",
}
_LINES = "\n".join(f"  {name:<16}{about}" for name, (_, about) in SUITES.items())
DEFAULT = " (default: %(default)s)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command in `arguments` (None: in sys.argv); return the exit status of DESCRIPTION."""
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
    """Return the parser of the command line; `command` is one of COMMANDS."""
    raw: Any = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser("python -m benchmarks", description=DESCRIPTION, **raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run, plot, compare, *_ = (
        commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", **raw)
        for name, text in COMMANDS.items()
    )
    folder, file = Path("out/benchmarks"), Path("out/benchmarks.jsonl")
    plot.add_argument("files", nargs="+", type=Path, help="results of one machine")
    plot.add_argument("--output", type=Path, default=folder, help="folder to write" + DEFAULT)
    text = "results before, and after; of several runs after, the best time of a method counts"
    compare.add_argument("files", nargs="+", type=Path, help=text)
    text = "growth of our ratios that is no regression" + DEFAULT
    compare.add_argument("--tolerance", type=float, default=0.1, help=text)
    run.epilog = f"suites:\n{_LINES}\n\nSizes default to those of the suite."
    add = run.add_argument
    add("suites", nargs="*", metavar="SUITE", help="see below (default: all but guard)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to run" + DEFAULT)
    add("--dtype", nargs="+", choices=list(DTYPES), help="dtypes of logits, hidden states, heads")
    add("--n", nargs="+", type=int, help="numbers of rows")
    add("--v", nargs="+", type=int, help="vocabulary sizes")
    add("--k", nargs="+", type=int, help="numbers of a top-k teacher's entries")
    add("--hidden", nargs=2, type=int, help="hidden sizes of student and teacher")
    add("--temperature", nargs="+", type=float, help="temperatures of the divergence")
    add("--divergence", nargs="+", choices=DIVERGENCES, help="divergences from the teacher")
    keys = sorted({method.key for method in METHODS.values()})
    text = "methods to measure; keys from `python -m benchmarks list`"
    add("--peers", nargs="+", default=[], choices=keys, metavar="KEY", help=text)
    add("--repeats", type=int, default=15, help="calls to time, at most" + DEFAULT)
    add("--seconds-each", type=float, default=8.0, help="seconds for all of them" + DEFAULT)
    text = "seconds that one call may take; the times of slower methods are left out" + DEFAULT
    add("--limit-seconds", type=float, default=30.0, help=text)
    add("--seconds", type=float, default=inf, help="seconds after which nothing is begun")
    add("--threads", type=int, help="CPU threads (default: torch's choice)")
    add("--in-process", action="store_true", help="quicker, but a crash ends the run")
    add("--output", type=Path, default=file, help="the result file" + DEFAULT)
    add("--resume", action="store_true", help="measure what the output does not have yet")
    return parser


def _list() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for method in METHODS.values():
        sizes = 8, 64, "bf16", 1.0  # some have no other temperature
        cases = [Case(*sizes, name, method.level, 8, 8, device, 8) for name in DIVERGENCES]
        reasons = [method.why_not(case) or "" for case in cases]  # "": it runs here
        why = min(reasons, key=lambda why: (why != "", why.startswith("it has no"))) or "runs here"
        print(f"{method.key:<26} {method.level:<7} {method.title:<44} {why}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
