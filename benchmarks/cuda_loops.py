"""What an element costs in the loops of the CUDA kernel that reads each logit once.

Counted in the disassembly of rows_cluster with 16-bit logits on both sides: the shortest pass that
does what the source asks of a group of eight elements.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from .sass import Code, Loop

#: Per element, one read, forward and backward: what an H100 can issue, and its special-function
#: units can do, in the time that memory takes (2.16 elements a clock and multiprocessor).
INSTRUCTIONS, EXPONENTIALS = 59.0, 7.4
GROUP = 8
#: Groups of a thread between two waits for a bulk copy (CHUNK / THREADS of csrc/cuda/sizes.h).
CHUNK_GROUPS = 2
EX2, ADD, MUL, FMA = "MUFU.EX2", "FADD", "FMUL", "FFMA"
#: Exponentials that a group needs in each visit, without the hard term's. The gradient of
#: reverse_kl needs no teacher's probability.
VISITS = {
    "forward_kl": {"first": 16, "gradient": 16},
    "reverse_kl": {"first": 16, "gradient": 8},
    "jsd": {"first": 16, "second": 16, "gradient": 16},
    "tvd": {"first": 16, "second": 16, "gradient": 16},
    "mse": {"first": 0, "gradient": 0},
}


@dataclass(frozen=True)
class Work:
    """Of one divergence with the hard term: instructions of one group's pass, by visit."""

    temperature: str  # how the hard term's exponential is made depends on it
    visits: dict[str, Counter[str]]
    overhead: int  # instructions around each CHUNK_GROUPS passes of the first visit

    def per_element(self, visit: str) -> float:
        around = self.overhead / CHUNK_GROUPS if visit == "first" else 0
        return (sum(self.visits.get(visit, {}).values()) + around) / GROUP

    @property
    def instructions(self) -> float:
        return sum(map(self.per_element, self.visits))

    @property
    def exponentials(self) -> float:
        return sum(found[EX2] for found in self.visits.values()) / GROUP

    @property
    def special(self) -> float:
        """Exponentials, logarithms and reciprocals: one kind of unit does them all."""
        found = sum(self.visits.values(), Counter())
        return sum(n for name, n in found.items() if name.startswith("MUFU")) / GROUP

    @property
    def within(self) -> bool:
        return self.instructions <= INSTRUCTIONS and self.special <= EXPONENTIALS


def loops_of(divergence: str, code: Code) -> dict[str, Loop]:
    """The loop of each visit: those that read 16 bytes of each side from shared memory.

    Raises:
        LookupError: they aren't as expected (another number of them, or unrolled).
    """
    loops = code.innermost("LDS.128")
    counts = [code.opcodes(loop)["LDS.128"] for loop in loops]
    names = VISITS[divergence]
    if counts != [2] * len(names):
        raise LookupError(f"{divergence}: expected one loop for each of {list(names)}: {loops}")
    return dict(zip(names, loops, strict=True))


def works(divergence: str, code: Code) -> Iterator[Work]:
    """With the hard term, at each temperature that makes a difference."""
    loops = loops_of(divergence, code)
    if divergence == "mse":
        yield _work("any T", code, loops, {v: ({EX2: 8}, {}) for v in loops})
        return
    needs = VISITS[divergence]
    off = {v: code.shortest_pass(loop, {EX2: needs[v]}) for v, loop in loops.items()}
    # the hard term's sum; its part of the gradient
    hard = {"first": {ADD: off["first"][ADD] + 1}, "gradient": {FMA: off["gradient"][FMA] + GROUP}}
    square = {v: {MUL: off[v][MUL] + GROUP} for v in hard}
    for temperature, more, least in (
        ("T = 1", 0, hard),
        ("T = 2", 0, {v: hard[v] | square[v] for v in hard}),
        ("another T", GROUP, hard),
    ):
        wanted = {v: ({EX2: needs[v] + more * (v in hard)}, least.get(v, {})) for v in loops}
        yield _work(temperature, code, loops, wanted)


def _work(
    temperature: str,
    code: Code,
    loops: dict[str, Loop],
    wanted: dict[str, tuple[dict[str, int], dict[str, int]]],
) -> Work:
    visits = {v: code.shortest_pass(loop, *wanted[v]) for v, loop in loops.items()}
    chunk = code.shortest_pass(code.around(loops["first"]), *wanted["first"])
    return Work(temperature, visits, sum(chunk.values()) - sum(visits["first"].values()))
