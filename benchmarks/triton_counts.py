"""Instructions that the Triton kernel executes per element, from its disassembly.

A kernel runs each of its basic blocks a number of times that follows from the shape:

* the loops over a slice are recognised by their vector loads and stores; how often each runs follows
  from V and the configuration (:func:`_trips`), averaged over the parts of a row;
* a loop that waits for the other programs of a row is counted once: what a program spends on waiting
  depends on the card;
* on all other branches the longest way is taken (an upper bound), with four exceptions: the slow
  paths of a division, which only subnormal numbers need; the division by S, which only rows at two
  strides need; the zeros of an ignored row; and the temperature, where the way with the fewest
  exponentials is T = 1 or 2, and the longest such way T = 2;
* the part of a row that holds the label also reports the row. The longest way with the most stores
  is counted for one program of a row, the longest with the fewest for the others.

Predicated instructions count: they are issued.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fused_kd.backends.triton_configuration import Configuration

from .sass import Code, Instruction, disassemble

#: Instructions that a card can issue per element, and operations of its special-function units, in
#: the time that memory takes for two reads and one write of 16 bits.
BUDGETS = {"H100": (59.0, 7.4), "H200": (46.7, 5.8), "B200": (30.0, 3.8)}
WARP = 32


@dataclass(frozen=True)
class Executed:
    """Per element of a row, by one thread."""

    instructions: float
    special: float  # exponentials, logarithms, reciprocals
    around: float  # of the instructions, those outside of the loops over a slice


@dataclass(frozen=True)
class _Loop:
    head: int
    last: int  # branches back to the head
    loads: int  # of vectors
    stores: int

    @property
    def of_logits(self) -> bool:
        return self.loads > 0


def executed(cubin: bytes, vocabulary: int, chosen: Configuration, visits: int) -> Executed:
    """Counts a compiled kernel that makes `visits` visits before the gradient's."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        (code,) = disassemble(file).values()
    graph = _Graph(code)
    loops = [loop for loop in graph.loops() if loop.of_logits]
    if len(loops) != 2 * (visits + 1):
        raise LookupError(f"expected two loops for each of {visits + 1} visits, found {loops}")
    whole, rest, entries = _trips(vocabulary, chosen)
    most = max(loop.loads for loop in loops)
    extra = special = body_instructions = 0.0
    for loop in loops:
        trips = whole if loop.loads == most else rest
        body = graph.way(loop.head, loop.last, stores=0)
        extra += (trips - 1) * len(body)
        body_instructions += trips * len(body)
        special += (trips - 1) * _special(code, body)
    total = 0.0
    for share, stores in ((1 / chosen.parts, 1), (1 - 1 / chosen.parts, -1)):
        way = graph.way(0, None, stores)
        missing = [loop for loop in loops if loop.last not in way]
        assert not missing, missing
        total += share * len(way)
        special += share * _special(code, way)
    total += extra
    return Executed(total / entries, special / entries, (total - body_instructions) / entries)


def _special(code: Code, way: set[int]) -> int:
    return sum(code.instructions[i].opcode.startswith("MUFU") for i in way)


def _trips(vocabulary: int, chosen: Configuration) -> tuple[float, float, float]:
    """Passes through the loop over whole tiles, through that over the rest, entries of a lane."""
    block = chosen.lanes * chosen.vector
    tile = block * chosen.unroll
    step = 8 * chosen.vector
    length = -(-vocabulary // chosen.parts)
    length = -(-length // step) * step if chosen.parts > 1 else vocabulary
    slices = [max(0, min(length, vocabulary - p * length)) for p in range(chosen.parts)]
    whole = sum(n // tile for n in slices) / chosen.parts
    rest = sum(-(-(n % tile) // block) for n in slices) / chosen.parts
    return whole, rest, vocabulary / chosen.parts / chosen.lanes


class _Graph:
    """The control flow of a kernel, a node for each instruction."""

    def __init__(self, code: Code) -> None:
        self.code = code
        self.after = [list(self._next(i)) for i in range(len(code.instructions))]
        self.order, self.back = self._depth_first()
        self.before: list[list[int]] = [[] for _ in self.after]
        for i, followers in enumerate(self.after):
            for j in followers:
                if (i, j) not in self.back:
                    self.before[j].append(i)

    def _next(self, i: int) -> Iterator[int]:
        one = self.code.instructions[i]
        if one.may_go_on() and i + 1 < len(self.code.instructions):
            yield i + 1
        if one.target is not None and one.opcode.startswith(("BRA", "UBRA")):
            yield self.code.labels[one.target]

    def _depth_first(self) -> tuple[list[int], set[tuple[int, int]]]:
        """A topological order of what can be reached, and the edges that go back."""
        done: list[int] = []
        state = {0: iter(self.after[0])}
        stack, back, seen = [0], set(), {0}
        while stack:
            i = stack[-1]
            for j in state[i]:
                if j in state:
                    back.add((i, j))
                elif j not in seen:
                    seen.add(j)
                    state[j] = iter(self.after[j])
                    stack.append(j)
                    break
            else:
                done.append(i)
                del state[i]
                stack.pop()
        return done[::-1], back

    def loops(self) -> list[_Loop]:
        return [self._loop(head, last) for last, head in sorted(self.back) if last != head]

    def _loop(self, head: int, last: int) -> _Loop:
        inside, todo = {head, last}, [last]
        while todo:
            i = todo.pop()
            if i != head:
                new = [j for j in self.before[i] if j not in inside]
                inside.update(new)
                todo += new
        names = [self.code.instructions[i].opcode for i in inside]
        loads, stores = (
            sum(name.startswith(kind) and name.endswith("128") for name in names)
            for kind in ("LDG", "STG")
        )
        return _Loop(head, last, loads, stores)

    def way(self, first: int, last: int | None, stores: int) -> set[int]:
        """The instructions of the way that `_cost` prefers, without going back."""
        cost = _cost(stores, {i for loop in self.loops() if loop.of_logits for i in (loop.last,)})
        best: dict[int, tuple[tuple[int, ...], int]] = {}
        for i in self.order:
            ways = [(best[j][0], j) for j in self.before[i] if j in best]
            if i == first:
                ways = [((0, 0, 0, 0, 0, 0), -1)]
            if ways:
                value, previous = max(ways)
                mine = cost(i, self.code.instructions[i])
                best[i] = (tuple(map(int.__add__, value, mine)), previous)
        if last is None:
            ends = [i for i in best if self.code.instructions[i].opcode == "EXIT"]
            last = max(ends, key=lambda i: best[i][0])
        found, i = set(), last
        while i != -1:
            found.add(i)
            i = best[i][1]
        return found


def _cost(stores: int, wanted: set[int]) -> Callable[[int, Instruction], tuple[int, ...]]:
    """What is preferred, most important first."""

    def cost(i: int, one: Instruction) -> tuple[int, ...]:
        return (
            i in wanted,  # through every loop over a slice
            -one.opcode.startswith("CALL"),
            -one.opcode.startswith("I2F"),
            stores * one.opcode.startswith("STG"),
            -(one.opcode == "MUFU.EX2"),
            1,
        )

    return cost
