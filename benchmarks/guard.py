"""``python -m benchmarks.guard [--write]``: the ratios that ``test_guard.py`` holds to a baseline.

Each is a time of KDLoss over a time that moves with the machine, both measured in turns on one
thread, so that neither the machine's speed nor its load decides. ``--write`` makes the measured
ratios the committed baseline of the instruction set in use; do it on a quiet machine.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fused_kd.backends import why_not

from .cases import LOGITS, Case
from .device import environment
from .entrants import ENTRANTS, Loss
from .entrants.compositions import eager
from .entrants.ours import FORWARD, IN_PLACE, KDLOSS
from .measuring import Contestant, interleave, ratio
from .problems import LogitsProblem
from .report import Parser, Progress, table

BASELINE = Path(__file__).with_name("baseline.json")
REPEATS = 9
#: A ratio may be this many times the baseline's, on the baseline's processor and on another one.
SLACK, SLACK_ELSEWHERE = 1.5, 3.0

WAYS = {"in place": IN_PLACE, "out of place": KDLOSS, "forward only": FORWARD}

_LARGE = {d: Case(128, 128256, d) for d in ("bf16", "fp32")}  # far larger than the caches
_SMALL = {d: Case(64, 32768, d) for d in ("bf16", "fp32")}


@dataclass(frozen=True)
class Guard:
    """KDLoss one way, over what it is compared with."""

    case: Case
    way: str  # a key of WAYS
    against: str  # "copy", "eager", "forward_kl"

    @property
    def name(self) -> str:
        c = self.case
        return f"{c.divergence} {c.dtype} {c.n}x{c.v} {self.way} / {self.against}"

    def pair(self, problem: LogitsProblem) -> tuple[Contestant, Contestant]:
        """Ours, and the other."""
        ours = problem.call(self._loss(self.case))
        return (
            Contestant("ours", ours, problem.restore),
            Contestant("other", self._other(problem), problem.restore),
        )

    def _other(self, problem: LogitsProblem) -> Callable[[], object]:
        if self.against == "copy":
            return problem.floor()
        if self.against == "eager":
            return problem.call(eager(self.case))
        return problem.call(self._loss(self.case.with_(divergence=self.against)))

    def _loss(self, case: Case) -> Loss:
        return ENTRANTS[f"{LOGITS}/{WAYS[self.way]}"].build(case)


def _guards() -> Iterator[Guard]:
    for dtype, large in _LARGE.items():
        for way in ("in place", "out of place", "forward only"):
            yield Guard(large, way, "copy")
        yield Guard(_SMALL[dtype], "in place", "eager")
    for divergence in ("reverse_kl", "jsd", "tvd", "mse"):
        yield Guard(_SMALL["bf16"].with_(divergence=divergence), "in place", "forward_kl")


GUARDS = tuple(_guards())


@contextmanager
def one_thread() -> Iterator[None]:
    """A ratio does not depend then on how many processors are free."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(guard: Guard, problem: LogitsProblem, repeats: int = REPEATS) -> float:
    """The ratio, of medians."""
    with one_thread():
        timings = interleave(guard.pair(problem), repeats)
    return ratio(timings["ours"], timings["other"])


def read_baseline(path: Path = BASELINE) -> dict[str, Any]:
    """By instruction set: "processor", "torch", "ratios" by the guard's name."""
    return json.loads(path.read_text()) if path.exists() else {}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, shows, and writes if told to; returns the exit status."""
    parser = Parser(prog="python -m benchmarks.guard", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"into {BASELINE.name}")
    options = parser.parse_args(arguments)
    reason = why_not("cpu", "cpu")
    if reason is not None:
        parser.error(f"the cpu backend cannot run: {reason}")
    ratios = {}
    with Progress("guards", len(GUARDS)) as progress:
        for guard in GUARDS:
            ratios[guard.name] = round(measure(guard, LogitsProblem(guard.case), 3 * REPEATS), 4)
            progress.advance(guard.name)
    found = environment()
    every = read_baseline()
    old = every.get(found["instruction_set"], {}).get("ratios", {})
    rows = [[name, f"{r:.3f}", f"{old[name]:.3f}" if name in old else "-"]
            for name, r in ratios.items()]  # fmt: skip
    print(table(["guard, one thread", "now", "baseline"], rows))
    if options.write:
        kept = {name: found[name] for name in ("processor", "torch", "compiler")}
        every[found["instruction_set"]] = {**kept, "ratios": ratios}
        BASELINE.write_text(json.dumps(every, indent=2, ensure_ascii=False) + "\n")
        print(f"written to {BASELINE.name}, for {found['instruction_set']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
