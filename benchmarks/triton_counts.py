"""Instructions that the Triton kernel executes per element, from its disassembly.

A kernel runs each of its basic blocks a number of times that follows from the shape:

* The loops over a slice are recognised by their loads. How often each runs follows from V and the
  configuration (:func:`trips`), averaged over the parts of a row.
* A loop that waits for the other programs of a row is counted once: what a program spends on
  waiting depends on the card.
* Elsewhere the longest way is taken (an upper bound), with exceptions: the slow paths of a
  division, which only subnormal numbers need; the division by S, which only rows at two strides
  need; the zeros of an ignored row. At T = 2 the way is the longest of those with the fewest
  exponentials, at another temperature the longest of those with the most.
* The program that has the label in its part also reports the row: the longest way with the most
  stores is counted for one program of a row, the longest with the fewest for the others.

The loops have no branch that depends on the logits. Predicated instructions count: they are issued.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fused_kd.backends.triton.configuration import Configuration

from .sass import Code, Instruction, disassemble

#: Instructions that a card can issue per element, and operations of its special-function units, in
#: the time that its memory takes for two reads and one write of 16 bits.
BUDGETS = {"H100": (59.0, 7.4), "H200": (46.7, 5.8), "B200": (30.0, 3.8)}


@dataclass(frozen=True)
class Executed:
    """By one thread, for an entry of a row."""

    instructions: float
    special: float  # exponentials, logarithms, reciprocals
    around: float  # of the instructions, those outside of the loops over a slice


@dataclass(frozen=True)
class _Loop:
    head: int
    last: int  # branches back to the head
    loads: int  # of logits


def executed(
    cubin: bytes, vocabulary: int, chosen: Configuration, passes: int, two: bool = True
) -> Executed:
    """Return the counts of a kernel that passes over each row `passes` times.

    Args:
        cubin: The compiled kernel, of a launch that does everything.
        vocabulary: V.
        chosen: The configuration that it is compiled for.
        passes: Those for statistics, and the gradient's.
        two: Whether T = 2, else a temperature that is neither 1 nor 2.

    Raises:
        LookupError: The loops are not as expected.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        (code,) = disassemble(file).values()
    return count(code, vocabulary, chosen, passes, two)


def count(
    code: Code, vocabulary: int, chosen: Configuration, passes: int, two: bool = True
) -> Executed:
    """Return the same of a disassembled kernel."""
    graph = _Graph(code)
    loops = [loop for loop in graph.loops() if loop.loads]
    if len(loops) != 2 * passes:
        raise LookupError(f"expected two loops for each of {passes} passes; found {loops}")
    whole, rest, entries = trips(vocabulary, chosen)
    most = max(loop.loads for loop in loops)
    instructions = special = inside = 0.0
    for share, stores in ((1 / chosen.parts, 1), (1 - 1 / chosen.parts, -1)):
        way = graph.way(0, None, stores, two)  # one pass through each loop
        if any(loop.last not in way for loop in loops):
            raise LookupError("no way leads through all loops")
        instructions += share * len(way)
        special += share * _special(code, way)
    for loop in loops:
        rounds = whole if loop.loads == most else rest
        body = graph.way(loop.head, loop.last, 0, two)
        inside += rounds * len(body)
        instructions += (rounds - 1) * len(body)
        special += (rounds - 1) * _special(code, body)
    return Executed(instructions / entries, special / entries, (instructions - inside) / entries)


def _special(code: Code, way: set[int]) -> int:
    return sum(code.instructions[i].opcode.startswith("MUFU") for i in way)


def trips(vocabulary: int, chosen: Configuration) -> tuple[float, float, float]:
    """Return the rounds of the loop over tiles and of that over the rest; a lane's entries."""
    block = chosen.lanes * chosen.vector
    tile, step = block * chosen.unroll, 8 * chosen.vector
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
        if one.goes_on and i + 1 < len(self.code.instructions):
            yield i + 1
        if one.target is not None and one.opcode.startswith(("BRA", "UBRA")):
            yield self.code.labels[one.target]

    def _depth_first(self) -> tuple[list[int], set[tuple[int, int]]]:
        """Return what can be reached in a topological order, and the edges that go back."""
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
        """Return the loops of more than one instruction."""
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
        # what waits reads a counter, with a memory order
        loads = sum(name.startswith("LDG") and "STRONG" not in name for name in names)
        return _Loop(head, last, loads)

    def way(self, first: int, last: int | None, stores: int, two: bool) -> set[int]:
        """Return the instructions of a way from `first` that never goes back.

        Args:
            first: The first instruction.
            last: The last one; None: the kernel's end.
            stores: 1 for the way with the most of them, -1 for the fewest, 0 for any.
            two: Whether T = 2, see :func:`executed`.
        """
        needed = {loop.last for loop in self.loops() if loop.loads}
        best: dict[int, tuple[tuple[int, ...], int]] = {}
        for i in self.order:
            ways = [(best[j][0], j) for j in self.before[i] if j in best]
            value, previous = max(ways) if ways else ((0,) * 6, -1)
            if ways or i == first:
                mine = _preferred(self.code.instructions[i], i in needed, stores, two)
                best[i] = (tuple(map(int.__add__, value, mine)), previous)
        if last is None:
            ends = [i for i in best if self.code.instructions[i].opcode == "EXIT"]
            last = max(ends, key=lambda i: best[i][0])
        found, i = set(), last
        while i != -1:
            found.add(i)
            i = best[i][1]
        return found


def _preferred(one: Instruction, needed: bool, stores: int, two: bool) -> tuple[int, ...]:
    """Return what makes a way better, most important first; each is added up along the way."""
    return (
        needed,  # through every loop over a slice
        -one.opcode.startswith("CALL"),  # the slow path of a division
        -one.opcode.startswith("I2F"),  # a division of integers
        stores * one.opcode.startswith("STG"),
        (one.opcode == "MUFU.EX2") * (-1 if two else 1),
        1,
    )
