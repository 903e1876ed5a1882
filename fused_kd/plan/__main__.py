"""Print memory and work of each way to compute the loss: ``python -m fused_kd.plan``."""

from __future__ import annotations

import argparse
import re
import sys

import torch

from ..checks import LOGIT_DTYPES
from . import levels
from .levels import Plan, plan, shown
from .models import MODELS

#: Heads for the same tokenizer differ by at most about this number of padding rows.
_PADDING = 1024
_UNITS = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def byte_count(text: str) -> int:
    """Return the number of bytes in a text such as 256MiB, 1.5 GB or 12345, rounded down.

    Raises:
        ArgumentTypeError: The text is not a size.
    """
    match = re.fullmatch(r"([0-9.]+) *([kmg]i?b)?", text.strip().lower())
    if match is None or match[1].count(".") > 1 or match[1] == ".":
        message = f"expected bytes such as 256MiB, 1GiB or 268435456; got {text!r}"
        raise argparse.ArgumentTypeError(message)
    return int(float(match[1]) * _UNITS.get(match[2], 1))


def _model(name: str) -> tuple[int, int]:
    if name.lower() in MODELS:
        return MODELS[name.lower()]
    raise argparse.ArgumentTypeError(f"unknown model {name!r}; known: {', '.join(MODELS)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fused_kd.plan",
        description=levels.__doc__,
        epilog="models: " + ", ".join(MODELS),
    )
    add = parser.add_argument
    add(
        "--rows",
        type=int,
        default=8192,
        help="number of tokens that are not ignored (default: %(default)s)",
    )
    add(
        "--model-like",
        type=_model,
        metavar="NAME",
        help="take the student's vocabulary and hidden size from model NAME",
    )
    add(
        "--teacher-like",
        type=_model,
        metavar="NAME",
        help="take the teacher's hidden size from model NAME (default: the student's)",
    )
    add("--vocab", type=int, help="vocabulary size of both models; overrides the named models")
    add("--hidden-student", type=int, help="student's hidden size; overrides --model-like")
    add("--hidden-teacher", type=int, help="teacher's hidden size; overrides --teacher-like")
    dtypes = [str(dtype).removeprefix("torch.") for dtype in LOGIT_DTYPES]
    add(
        "--dtype",
        choices=dtypes,
        default="bfloat16",
        help="dtype of hidden states and lm_heads (default: %(default)s)",
    )
    add(
        "--grad-accum-dtype",
        choices=dtypes,
        default="float32",
        help="dtype in which the weight gradient is summed over chunks (default: %(default)s)",
    )
    add(
        "--memory-budget",
        type=byte_count,
        metavar="SIZE",
        help="bytes for a chunk of rows with heads, such as 256MiB (default: automatic)",
    )
    add("--device", default="cpu", help="device that the loss runs on (default: %(default)s)")
    return parser


def _shapes(parser: argparse.ArgumentParser, options: argparse.Namespace) -> tuple[int, int, int]:
    """Return V and the hidden sizes of student and teacher; exit with 2 if they are not known.

    V is cut to the smaller vocabulary of the two models, which is printed; it exits if they differ
    by more than padding.
    """
    student = options.model_like or (None, None)
    teacher = options.teacher_like or student
    vocabularies = sorted({v for v, _ in (student, teacher) if v is not None})
    if options.vocab is None and len(vocabularies) > 1:
        if vocabularies[1] - vocabularies[0] > _PADDING:
            parser.error(
                f"the vocabularies differ, {vocabularies[0]} and {vocabularies[1]}: the two models "
                "need the same tokenizer (or pass --vocab)"
            )
        print(f"Heads of {vocabularies[1]} rows are cut to {vocabularies[0]}: the rest is padding.")
    vocab = _first(options.vocab, *vocabularies)
    hidden = _first(options.hidden_student, student[1])
    if vocab is None or hidden is None:
        parser.error("pass --model-like, or --vocab and --hidden-student")
    teacher_hidden = _first(options.hidden_teacher, teacher[1], hidden)
    assert teacher_hidden is not None
    return vocab, hidden, teacher_hidden


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)


def _report(result: Plan) -> str:
    levels = result.levels
    parts = list(dict.fromkeys(part for level in levels.values() for part in level.memory))
    lines = [f"{'':<24}" + "".join(f"{name:>17}" for name in levels)]

    def line(title: str, values: list[str]) -> None:
        lines.append(f"{title:<24}" + "".join(f"{value:>17}" for value in values))

    for part in parts:
        sizes = [level.memory.get(part, 0) for level in levels.values()]
        line(part, [shown(size) if size else "-" for size in sizes])
    line("peak beyond the inputs", [shown(level.peak) for level in levels.values()])
    line("products, TFLOP", [f"{level.flop / 1e12:.4g}" for level in levels.values()])
    line("memory traffic", [shown(level.traffic) for level in levels.values()])
    least = min(levels, key=lambda name: levels[name].peak)
    lines += [
        "",
        f"Heads on both sides use {result.explanation}: {result.chunks} in all.",
        f"Adding to the weight gradient is {result.weight_gradient_share:.0%} of its traffic.",
        f"Least memory: {least}, {levels[least].peak / result.eager.peak:.1%} of eager.",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Print the plan; return the exit status, 0. Exit with 2 for wrong arguments.

    Args:
        arguments: of the command line; None: those of the process.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    shapes = _shapes(parser, options)
    dtype, accumulate = (getattr(torch, x) for x in (options.dtype, options.grad_accum_dtype))
    try:
        result = plan(
            options.rows,
            *shapes,
            dtype,
            options.memory_budget,
            device=options.device,
            grad_accum_dtype=accumulate,
        )
    except (RuntimeError, ValueError) as error:
        parser.error(str(error))
    vocab, student, teacher = shapes
    print(
        f"{options.rows} rows, V = {vocab}, H = {student} (student) and {teacher} (teacher), "
        f"{options.dtype}, {options.device}; inputs {shown(result.inputs)}\n"
    )
    print(_report(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
