"""The command lines of the scripts that run on a GPU, or on the CPU to try them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from .device import BACKENDS, STAND_IN, backends
from .report import Parser, positive_float


def make_parser(
    name: str, about: str | None, seconds: float = 60.0, writes: bool = False
) -> Parser:
    """Return the parser of ``python -m benchmarks.<name>``; `writes`: it has an --output."""
    parser = Parser(prog=f"python -m benchmarks.{name}", description=about)
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    add("--backends", nargs="+", choices=(*BACKENDS, STAND_IN), metavar="BACKEND",
        help="default: all of this device")  # fmt: skip
    add("--seconds", type=positive_float, default=seconds, help="default: %(default)g")
    if writes:
        add("--output", type=Path, default=Path(f"out/{name}.jsonl"), metavar="FILE",
            help="default: %(default)s")  # fmt: skip
    return parser


def parse(parser: Parser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options; ends the process where the device or a backend does not exist."""
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; --device cpu tries everything at tiny sizes")
    unknown = set(options.backends or ()) - set(backends(options.device))
    if unknown:
        parser.error(f"--backends: not of this device: {' '.join(sorted(unknown))}")
    if "output" in options:
        options.output.parent.mkdir(parents=True, exist_ok=True)
    return options


def usable(options: argparse.Namespace) -> list[str]:
    """Return the wanted backends that can run; print why the others are left out."""
    found = []
    for name, why in backends(options.device).items():
        if options.backends and name not in options.backends:
            continue
        if why is None:
            found.append(name)
        else:
            print(f"LEFT OUT backend {name}: {why}", flush=True)
    return found
