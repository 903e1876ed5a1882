"""``python -m benchmarks run|plot|compare|list``: ours and every peer, in one run.

Bad options end in one line and exit status 2; a run in which something crashed or ours is wrong, or
a comparison that finds a difference, with 1; an interrupted run, whose results are kept, with 130.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fused_kd.backends import why_not
from fused_kd.divergences import DIVERGENCES
from fused_kd.options import KDOptions
from fused_kd.plan.models import MODELS

from . import compare, device, page, pictures, records, runner, tables
from .cases import DTYPES, LOGITS, Case
from .entrants import ENTRANTS
from .one_case import Task
from .report import Parser, positive_float, positive_int, show_environment, table
from .suites import SUITES

COMMANDS = ("run", "plot", "compare", "list")
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = make_parser()
    options = parser.parse_args(given)
    if options.command == "run":
        return _run(parser, options, given)
    if options.command == "list":
        return _list()
    try:
        if options.command == "compare":
            before, after = (records.read([path]) for path in options.files)
            text, is_same = compare.compare(before, after, options.tolerance)
            print(text)
            return 0 if is_same else 1
        return _plot(runner.read_together(options.files), options.output)
    except (ValueError, OSError) as error:
        parser.error(str(error))
        raise AssertionError from error  # not reached


def make_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    _run_options(commands.add_parser("run", help="measure suites, into a file of results"))
    plot = commands.add_parser("plot", help="pictures and a page of files of results")
    plot.add_argument("files", nargs="+", type=Path, metavar="FILE")
    plot.add_argument("--output", type=Path, default=Path("out/benchmarks"), metavar="DIR")
    both = commands.add_parser("compare", help="whether two files of results agree")
    both.add_argument("files", nargs=2, type=Path, metavar="FILE")
    both.add_argument("--tolerance", type=positive_float, default=compare.TOLERANCE,
                      help="of every ratio (default: %(default)s)")  # fmt: skip
    commands.add_parser("list", help="suites, losses and why one cannot run here, models")
    return parser


# ---------------------------------------------------------------------------------------- run


def _run_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("suites", nargs="*", metavar="SUITE", help=f"of {' '.join(SUITES)} (default: all)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    add("--dtype", nargs="+", choices=list(DTYPES), metavar="DTYPE",
        help=f"of {' '.join(DTYPES)} (default: bf16 fp32, or the suite's)")  # fmt: skip
    add("--n", nargs="+", type=positive_int, help="rows (default: 512)")
    add("--v", nargs="+", type=positive_int, help="vocabularies (default: 32000 128256 262144)")
    add("--hidden", nargs=2, type=positive_int, metavar=("H_s", "H_t"),
        help="hidden sizes of student and teacher (default: 1024 2048)")  # fmt: skip
    add("--model", help="vocabulary and student's hidden size of this model (see list)")
    add("--teacher-model", metavar="MODEL", help="the teacher's hidden size, likewise")
    add("--temperature", nargs="+", type=positive_float, default=[2.0], help="default: 2")
    add("--divergence", nargs="+", choices=[*DIVERGENCES, "all"], default=["forward_kl"],
        help=f"of {' '.join(DIVERGENCES)} all (default: forward_kl)")  # fmt: skip
    add("--peers", nargs="+", default=[], metavar="KEY", help="these losses alone (see list)")
    add("--skip", nargs="+", default=[], metavar="KEY", help="all losses but these")
    add("--repeats", type=positive_int, default=15, help="of each, at most (default: 15)")
    add("--seconds-each", type=positive_float, default=8.0, metavar="S",
        help="that the repeats of one loss may take together (default: %(default)g)")  # fmt: skip
    add("--limit-seconds", type=positive_float, default=30.0, metavar="S",
        help="of a call; slower methods get no time (default: %(default)g)")  # fmt: skip
    add("--seconds", type=positive_float, help="for everything; nothing is begun after that")
    add("--threads", type=positive_int, help="default: torch's choice")
    add("--in-process", action="store_true",
        help="no process for each case: quicker, but a crash ends the run")  # fmt: skip
    add("--output", type=Path, default=Path("out/benchmarks.jsonl"), metavar="FILE",
        help="default: %(default)s")  # fmt: skip
    add("--resume", action="store_true", help="measure what the output does not have yet")
    add("--overwrite", action="store_true", help="replace the contents of the output")


def _run(parser: Parser, options: argparse.Namespace, given: Sequence[str]) -> int:
    _check(parser, options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    tasks, here = _tasks(options), device.environment(options.device)
    if not tasks:
        parser.error("--peers, --skip: no method left to measure")
    report = _earlier(parser, options, here)
    waiting = [_together(report, task) for task in tasks if not _is_there(report, task)]
    if len(waiting) < len(tasks):
        print(f"{len(tasks) - len(waiting)} of {len(tasks)} cases are there already")
    show_environment(f"benchmarks: {len(waiting)} cases", here)

    def show(task: Task) -> None:
        if task.times:
            found = records.read([options.output])
            print(f"\n{tables.case_table(found, task.suite, task.case)}", flush=True)

    try:
        with options.output.open("a") as file:
            failed = runner.run(waiting, file, here, given, show, options.seconds,
                                isolate=not options.in_process)  # fmt: skip
    except KeyboardInterrupt:
        print(f"\ninterrupted; what is measured is kept: --resume --output {options.output}")
        return INTERRUPTED
    found = records.read([options.output])
    for suite in dict.fromkeys(task.suite for task in tasks):
        print(f"\n{tables.conclusion(found, suite)}", flush=True)
    print(f"\n{tables.goals_table(found)}\nwritten to {options.output}", flush=True)
    return 1 if failed or _ours_failed(found, tasks) else 0


def _is_there(report: records.Report, task: Task) -> bool:
    """Return True if a file has the complete case, with all methods of the task."""
    key = task.suite, task.case.name
    keys = (ENTRANTS[name].key for name in task.entrants)
    return key in report.done and all((*key, one) in report.results for one in keys)


def _together(report: records.Report, task: Task) -> Task:
    """Add the methods that the file has in this case: times of two runs cannot be compared."""
    keys = {line["entrant"] for line in report.of(task.suite, task.case)}
    keys.update(ENTRANTS[name].key for name in task.entrants)
    return replace(task, entrants=tuple(SUITES[task.suite].takes(task.case, keys, ())))


def _ours_failed(report: records.Report, tasks: Sequence[Task]) -> bool:
    """Print each of ours that is wrong or raised; return True if there is one."""
    lines = [line for task in tasks for line in report.of(task.suite, task.case)
             if line["is_ours"] and line["status"] in ("wrong", "failed")]  # fmt: skip
    for line in lines:
        print(f"FAILED {line['title']}, {line['case_name']}: {line['why']}", flush=True)
    return bool(lines)


def _check(parser: Parser, options: argparse.Namespace) -> None:
    """Check all options before anything is measured."""
    for name in options.suites:
        if name not in SUITES:
            parser.error(f"unknown suite {name!r}; there are {' '.join(SUITES)}")
    keys = dict.fromkeys(entrant.key for entrant in ENTRANTS.values())
    for option in ("peers", "skip"):
        for key in getattr(options, option):
            if key not in keys:
                parser.error(f"--{option}: unknown loss {key!r}; there are {' '.join(keys)}")
    for option in ("model", "teacher_model"):
        name = getattr(options, option)
        if name is not None and name not in MODELS:
            where = "--" + option.replace("_", "-")
            parser.error(f"{where}: unknown model {name!r}; see python -m benchmarks list")
    if options.model is not None:
        vocabulary, hidden = MODELS[options.model]
        teacher = MODELS[options.teacher_model or options.model][1]
        options.v, options.hidden = options.v or [vocabulary], options.hidden or [hidden, teacher]
    elif options.teacher_model is not None:
        parser.error("--teacher-model needs --model")
    if "all" in options.divergence:
        options.divergence = list(DIVERGENCES)
    for temperature in options.temperature:
        try:
            KDOptions(temperature=temperature)
        except ValueError as error:
            parser.error(f"--temperature: {error}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device: torch {torch.__version__} finds no CUDA device")
    if options.device == "cpu" and (why := why_not("cpu", "cpu")) is not None:
        parser.error(f"the cpu backend cannot run: {why}")
    if options.resume and options.overwrite:
        parser.error("--resume keeps the output and --overwrite does not: give one of them")


def _tasks(options: argparse.Namespace) -> list[Task]:
    """Return the tasks of the chosen suites."""
    found = []
    for name in options.suites or SUITES:
        suite = SUITES[name]
        for case in dict.fromkeys(suite.cases(options)):
            keys = suite.takes(case, options.peers, options.skip)
            if not keys:
                continue
            found.append(Task(name, case, tuple(keys), suite.times, options.repeats,
                              options.seconds_each, options.limit_seconds,
                              options.threads))  # fmt: skip
    return found


def _earlier(
    parser: Parser, options: argparse.Namespace, here: dict[str, object]
) -> records.Report:
    """Return the report in the output; refuse to lose or mix results, and an unusable output."""
    path, report = options.output, records.Report()
    try:
        if path.exists() and not path.is_file():
            parser.error(f"--output: cannot write '{path}': it is no file")
        has_lines = path.exists() and path.stat().st_size > 0
        if has_lines and not (options.resume or options.overwrite):
            parser.error(f"--output: {path} is not empty; --resume, --overwrite, or another name")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
        if has_lines:  # nothing else is written over either
            report = records.read([path])
    except OSError as error:
        parser.error(f"--output: cannot write '{path}': {error.strerror}")
    except ValueError as error:
        parser.error(f"--output: {error}")
    if options.overwrite:
        path.write_text("")
        return records.Report()
    now = {"environment": here, "packages": runner.packages()}
    if report.runs and (found := runner.differences(report.runs[-1], now)):
        parser.error(f"--resume: {path} was made elsewhere: {'; '.join(found)}")
    if records.cut_off(path):  # it may have been a whole one, which is counted no more
        report = records.read([path]) if path.stat().st_size else records.Report()
    return report


# ----------------------------------------------------------------------------- plot and list


def _plot(report: records.Report, folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    made = pictures.draw(report, folder)
    written = page.write(report, folder / "report.html")
    for path in [*made, written]:
        print(path)
    return 0


def _list() -> int:
    print(table(["suite", "what"], [[suite.name, suite.what] for suite in SUITES.values()]))
    print()
    where = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for entrant in ENTRANTS.values():
        hidden = (0, 0) if entrant.level == LOGITS else (8, 8)
        cases = (Case(8, 64, "fp32", 2.0, divergence, entrant.level, *hidden, where)
                 for divergence in DIVERGENCES)  # fmt: skip
        reasons = [entrant.why_not(case) for case in cases]
        why = None if None in reasons else reasons[0]
        rows.append([entrant.key, entrant.level, entrant.title, entrant.version() or "",
                     why or "runs here", entrant.nearest])  # fmt: skip
    print(table(["loss", "level", "", "version", f"on {where}", "computes instead"], rows))
    print()
    print(table(["model", "V", "H"], [[m, str(v), str(h)] for m, (v, h) in MODELS.items()]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
