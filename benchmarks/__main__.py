"""``python -m benchmarks run|plot|compare|list``: our losses and all peers, in one run.

Bad options end in one line and exit status 2; a run in which something crashed or ours is wrong, or
a comparison that finds a regression, with 1; an interrupted run, whose results are kept, with 130.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fused_kd.backends import why_not
from fused_kd.divergences import DIVERGENCES
from fused_kd.options import KDOptions
from fused_kd.plan.models import MODELS

from . import compare, device, picture, publish, records
from .cases import DTYPES, LOGITS, Case
from .methods import METHODS
from .one_case import Task
from .records import Report, Writer
from .report import Parser, positive_float, positive_int, table
from .runner import run
from .schema import Run
from .suites import ACCURACY, GUARD, SUITES

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = make_parser()
    options = parser.parse_args(words)
    try:
        if options.command == "run":
            return _run(options, words)
        if options.command == "list":
            return _list()
        if options.command == "compare":
            before, after = (records.read([path]) for path in options.files)
            text, ok = compare.compare(before, after, options.tolerance, options.against)
            print(text)
            return 0 if ok else 1
        return _plot(records.read(options.files, together=True), options.output)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))


def make_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    _run_options(commands.add_parser("run", help="measure suites, into a file of results"))
    plot = commands.add_parser("plot", help="pictures and a page of files of results")
    plot.add_argument("files", nargs="+", type=Path, metavar="FILE")
    plot.add_argument("--output", type=Path, default=Path("out/benchmarks"), metavar="DIR")
    both = commands.add_parser("compare", help="whether the second file has a regression")
    add = both.add_argument
    add("files", nargs=2, type=Path, metavar="FILE")
    add("--tolerance", type=positive_float, default=compare.TOLERANCE, help="default: %(default)g")
    add("--against", default=compare.BOUND, metavar="KEY", help="a method; default: %(default)s")
    commands.add_parser("list", help="suites, methods and why one cannot run here, models")
    return parser


def _run_options(parser: argparse.ArgumentParser) -> None:
    add, keys = parser.add_argument, [method.key for method in METHODS.values()]
    add(
        "suites", nargs="*", metavar="SUITE", help=f"of {' '.join(SUITES)} (default: all but guard)"
    )
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    add("--dtype", nargs="+", choices=list(DTYPES), help="default: bf16 fp32, or the suite's")
    add("--n", nargs="+", type=positive_int, help="rows (default: 512)")
    add("--v", nargs="+", type=positive_int, help="vocabularies (default: 32000 128256 262144)")
    hidden = "hidden sizes of student and teacher (default: 1024 2048)"
    add("--hidden", nargs=2, type=positive_int, metavar=("H_s", "H_t"), help=hidden)
    models = {"choices": list(MODELS), "metavar": "MODEL"}
    add("--model", **models, help="vocabulary and student's hidden size of this model (see list)")
    add("--teacher-model", **models, help="the teacher's hidden size, likewise")
    add("--temperature", nargs="+", type=_temperature, default=[2.0], help="default: 2")
    add("--divergence", nargs="+", choices=[*DIVERGENCES, "all"], help="default: forward_kl")
    add("--peers", nargs="+", default=[], choices=keys, metavar="KEY", help="these methods alone")
    add("--skip", nargs="+", default=[], choices=keys, metavar="KEY", help="all methods but these")
    add("--repeats", type=positive_int, default=15, help="of each, at most (default: 15)")
    each = "that the repeats of one method may take together (default: %(default)g)"
    add("--seconds-each", type=positive_float, default=8.0, metavar="S", help=each)
    limit = "of a call; slower methods get no time (default: %(default)g)"
    add("--limit-seconds", type=positive_float, default=30.0, metavar="S", help=limit)
    add("--seconds", type=positive_float, help="for everything; nothing is begun after that")
    add("--threads", type=positive_int, help="default: torch's choice")
    process = "no process for each case: quicker, but a crash ends the run"
    add("--in-process", action="store_true", help=process)
    output = Path("out/benchmarks.jsonl")
    add("--output", type=Path, default=output, metavar="FILE", help="default: %(default)s")
    exclusive = parser.add_mutually_exclusive_group().add_argument
    exclusive("--resume", action="store_true", help="measure what the output does not have yet")
    exclusive("--overwrite", action="store_true", help="replace the contents of the output")


def _temperature(text: str) -> float:
    try:
        return KDOptions(temperature=float(text)).temperature
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _run(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Measure what the output does not have yet.

    Raises:
        ValueError: If the options cannot be used, or the output can not.
    """
    _check(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    wanted = list(tasks(options))
    if not wanted:
        raise ValueError("--peers, --skip: no method left to measure")
    packages = {method.package: method.version() for method in METHODS.values()}
    here = {name: version for name, version in packages.items() if name and version}
    begin = Run(device.environment(options.device), here, list(words))
    report = _earlier(options, begin)
    waiting = [_together(report, task) for task in wanted if not _is_complete(report, task)]
    print(f"{len(wanted) - len(waiting)} of {len(wanted)} cases are there already")
    for name, value in begin.environment.items():
        print(f"  {name.replace('_', ' '):<16} {value}", flush=True)
    with options.output.open("a") as file:
        try:
            isolate = not options.in_process
            failed = run(waiting, Writer(file), begin, options.seconds, isolate)
        except KeyboardInterrupt:
            print(f"\ninterrupted; what is measured is kept: --resume --output {options.output}")
            return INTERRUPTED
    report = records.read([options.output])
    wrong = [
        result for task in wanted for result in report.of(task.suite, task.case)
        if result.is_ours and result.status in ("wrong", "failed")
    ]  # fmt: skip
    for result in wrong:
        print(f"FAILED {result.title}, {Case(**result.case).name}: {result.why}")
    print(
        f"written to {options.output}; tables and pictures: python -m benchmarks plot", flush=True
    )
    return 1 if failed or wrong else 0


def _check(options: argparse.Namespace) -> None:
    """Complete the options, or raise ValueError with the reason why they cannot be used."""
    for name in options.suites:
        if name not in SUITES:
            raise ValueError(f"unknown suite {name!r}; there are {' '.join(SUITES)}")
    if options.model is not None:
        vocabulary, hidden = MODELS[options.model]
        teacher = MODELS[options.teacher_model or options.model][1]
        options.v, options.hidden = options.v or [vocabulary], options.hidden or [hidden, teacher]
    elif options.teacher_model is not None:
        raise ValueError("--teacher-model needs --model")
    if "all" in (options.divergence or ()):
        options.divergence = list(DIVERGENCES)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device: torch {torch.__version__} finds no CUDA device")
    if options.device == "cpu" and (why := why_not("cpu", "cpu")) is not None:
        raise ValueError(f"the cpu backend cannot run: {why}")


def tasks(options: argparse.Namespace) -> Iterator[Task]:
    """Yield the tasks of the options."""
    usual = [name for name in SUITES if name != GUARD]
    limits = options.repeats, options.seconds_each, options.limit_seconds, options.threads
    for name in options.suites or usual:
        for case in dict.fromkeys(SUITES[name].cases(options)):
            if keys := SUITES[name].takes(case, options.peers, options.skip):
                yield Task(name, case, tuple(keys), name != ACCURACY, *limits)


def _is_complete(report: Report, task: Task) -> bool:
    """Return True if a file has the complete case, with all methods of the task."""
    key = task.suite, task.case
    keys = [METHODS[name].key for name in task.methods]
    return key in report.done and all((*key, method) in report.results for method in keys)


def _together(report: Report, task: Task) -> Task:
    """Add the methods that the file has in this case: times of two runs cannot be compared."""
    keys = {result.method for result in report.of(task.suite, task.case)}
    keys.update(METHODS[name].key for name in task.methods)
    return replace(task, methods=tuple(SUITES[task.suite].takes(task.case, keys, ())))


def _earlier(options: argparse.Namespace, begin: Run) -> Report:
    """Return the report in the output; refuse to lose or mix results, and an unusable output."""
    path = options.output
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        raise ValueError(f"--output: cannot write '{path}': it is no file")
    path.open("a").close()
    if not path.stat().st_size:
        return Report()
    if not (options.resume or options.overwrite):
        raise ValueError(f"--output: {path} is not empty; --resume, --overwrite, or another name")
    report = records.read([path])  # no other file is written over or appended to
    if options.overwrite:
        path.write_text("")
        return Report()
    if found := records.differences(report.runs[-1], begin):
        raise ValueError(f"--resume: {path} was made elsewhere: {'; '.join(found)}")
    content = path.read_bytes()  # a last line that does not end is dropped
    path.write_bytes(content[: content.rfind(b"\n") + 1])
    return report


def _plot(report: Report, folder: Path) -> int:
    """Write the page and the pictures of a report, and print where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures, page = list(picture.draw(report, folder)), folder / "report.md"
    shown = "\n".join(f"![{path.stem}]({path.name})" for path in pictures)
    page.write_text(f"# Benchmarks\n\n{shown}\n\n{publish.page(report)}\n")
    print(*pictures, page, sep="\n")
    return 0


def _list() -> int:
    print(table(["suite", "what"], [[name, suite.what] for name, suite in SUITES.items()]))
    where = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for method in METHODS.values():
        hidden = (0, 0) if method.level == LOGITS else (8, 8)
        cases = (Case(8, 64, "fp32", 2.0, d, method.level, *hidden, where) for d in DIVERGENCES)
        reasons = [method.why_not(case) for case in cases]
        why = "runs here" if None in reasons else reasons[0]
        words = method.key, method.level, method.title, method.version() or "", why, method.nearest
        rows.append(list(words))
    head = ["method", "level", "", "version", f"on {where}", "computes instead"]
    print(f"\n{table(head, rows)}\n")
    print(table(["model", "V", "H"], [[m, str(v), str(h)] for m, (v, h) in MODELS.items()]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
