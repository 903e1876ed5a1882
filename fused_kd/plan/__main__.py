"""Print the memory and work of each way to compute the loss: ``python -m fused_kd.plan``."""

from __future__ import annotations

import argparse
import re
import sys

import torch

from ..checks import LOGIT_DTYPES
from . import levels
from .levels import Plan, plan, shown
from .models import MODELS

#: Heads for the same tokenizer differ by at most about this many padding rows.
_PADDING = 1024
_UNITS = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def byte_count(text: str) -> int:
    """Return the bytes of a text such as 256MiB, 1.5 GB or 12345."""
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
    add("--rows", type=int, default=8192, help="tokens that are not ignored (default: %(default)s)")
    add(
        "--model-like",
        type=_model,
        metavar="NAME",
        help="use the vocabulary and hidden size of NAME for the student",
    )
    add(
        "--teacher-like",
        type=_model,
        metavar="NAME",
        help="the same for the teacher (default: the student's)",
    )
    add("--vocab", type=int, help="vocabulary of both models, instead of the named models'")
    add("--hidden-student", type=int, help="hidden size, instead of the named student's")
    add("--hidden-teacher", type=int, help="hidden size, instead of the named teacher's")
    dtypes = [str(dtype).removeprefix("torch.") for dtype in LOGIT_DTYPES]
    add(
        "--dtype",
        choices=dtypes,
        default="bfloat16",
        help="of hidden states and heads (default: %(default)s)",
    )
    add(
        "--grad-accum-dtype",
        choices=dtypes,
        default="float32",
        help="of the sum of the weight gradient over chunks (default: %(default)s)",
    )
    add(
        "--memory-budget",
        type=byte_count,
        metavar="SIZE",
        help="of a chunk of rows of the heads, such as 256MiB (default: automatic)",
    )
    add("--device", default="cpu", help="where the loss runs (default: %(default)s)")
    return parser


def _shapes(parser: argparse.ArgumentParser, given: argparse.Namespace) -> tuple[int, int, int]:
    """Return the vocabulary and the hidden sizes of student and teacher."""
    student = given.model_like or (None, None)
    teacher = given.teacher_like or student
    vocabularies = sorted({v for v, _ in (student, teacher) if v is not None})
    if given.vocab is None and len(vocabularies) > 1:
        if vocabularies[1] - vocabularies[0] > _PADDING:
            parser.error(
                f"the vocabularies differ, {vocabularies[0]} and {vocabularies[1]}: the two models "
                "need the same tokenizer (or pass --vocab)"
            )
        print(f"Heads of {vocabularies[1]} rows are cut to {vocabularies[0]}: the rest is padding.")
    vocab = _first(given.vocab, *vocabularies)
    hidden = _first(given.hidden_student, student[1])
    if vocab is None or hidden is None:
        parser.error("pass --model-like, or --vocab and --hidden-student")
    teacher_hidden = _first(given.hidden_teacher, teacher[1], hidden)
    assert teacher_hidden is not None
    return vocab, hidden, teacher_hidden


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)


def _report(found: Plan) -> str:
    levels = found.levels
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
        f"Heads on both sides use {found.explanation}: {found.chunks} in all.",
        f"Adding to the weight gradient is {found.weight_gradient_share:.0%} of its traffic.",
        f"Least memory: {least}, {levels[least].peak / found.eager.peak:.1%} of eager.",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Print the plan; return the exit status."""
    parser = _parser()
    given = parser.parse_args(arguments)
    shapes = _shapes(parser, given)
    dtype, accumulate = (getattr(torch, x) for x in (given.dtype, given.grad_accum_dtype))
    try:
        found = plan(
            given.rows,
            *shapes,
            dtype,
            given.memory_budget,
            device=given.device,
            grad_accum_dtype=accumulate,
        )
    except (RuntimeError, ValueError) as error:
        parser.error(str(error))
    vocab, student, teacher = shapes
    print(
        f"{given.rows} rows, V = {vocab}, H = {student} (student) and {teacher} (teacher), "
        f"{given.dtype}, {given.device}; inputs {shown(found.inputs)}\n"
    )
    print(_report(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
