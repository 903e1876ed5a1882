"""Disassembled GPU code: its loops, and the fewest instructions of one pass through a loop.

A pass is what a thread issues from a loop's first instruction to the branch back. Where branches
leave a choice, the shortest way that does a given work is taken (so many exponentials, at least so
many sums and products): a fast path, since what is rare (a new maximum, an infinity, a ragged end)
costs more. Predicated instructions count: they are issued.
"""

from __future__ import annotations

import heapq
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

_LABEL = re.compile(r"\s*(\.L\w+):")
_INSTRUCTION = re.compile(
    r"\s+/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;"
)
_TARGET = re.compile(r"`\((\.L\w+)\)")
#: What never goes on to the next instruction, unless it is predicated.
_ENDS = ("EXIT", "RET", "BRX", "JMP", "JMX")


@dataclass(frozen=True)
class Instruction:
    opcode: str  # with its suffixes: "LDG.E.128"
    operands: str
    predicated: bool
    target: str | None  # a branch's label

    def may_go_on(self) -> bool:
        """To the next instruction. A branch can also have its condition among its operands."""
        if self.predicated:
            return True
        if self.opcode.startswith(("BRA", "UBRA")):
            return self.opcode not in ("BRA", "UBRA") or self.operands != f"`({self.target})"
        return not self.opcode.startswith(_ENDS)


@dataclass(frozen=True)
class Loop:
    """Instructions [begin, end]; the last branches back to the first."""

    begin: int
    end: int

    def holds(self, other: Loop) -> bool:
        return self != other and self.begin <= other.begin and other.end <= self.end


@dataclass
class Code:
    """One kernel."""

    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # the instruction that follows

    def opcodes(self, loop: Loop | None = None) -> Counter[str]:
        part = self.instructions if loop is None else self.instructions[loop.begin : loop.end + 1]
        return Counter(one.opcode for one in part)

    def loops(self) -> list[Loop]:
        """In order of their ends; blocks that the compiler put out of line look like loops too."""
        return [
            Loop(self.labels[one.target], i)
            for i, one in enumerate(self.instructions)
            if one.target in self.labels and self.labels[one.target] <= i
            if one.opcode.startswith(("BRA", "UBRA"))
        ]

    def innermost(self, opcode: str) -> list[Loop]:
        """The loops with this instruction that hold no other such loop, in order."""
        having = [loop for loop in self.loops() if opcode in self.opcodes(loop)]
        inner = [loop for loop in having if not any(loop.holds(other) for other in having)]
        return sorted(inner, key=lambda loop: loop.begin)

    def around(self, loop: Loop) -> Loop:
        """The smallest loop that holds this one."""
        return min((x for x in self.loops() if x.holds(loop)), key=lambda x: x.end - x.begin)

    def shortest_pass(
        self, loop: Loop, exactly: Mapping[str, int], least: Mapping[str, int] | None = None
    ) -> Counter[str]:
        """The instructions of the shortest pass that has so many of these opcodes.

        Raises:
            LookupError: there is no such pass.
        """
        wanted = [*exactly.items(), *(least or {}).items()]
        goal = tuple(number for _, number in wanted)
        before: dict[tuple[int, tuple[int, ...]], tuple[int, tuple[int, ...]] | None] = {}
        heap = [(1, loop.begin, (0,) * len(goal), None)]
        while heap:
            cost, i, counts, previous = heapq.heappop(heap)
            opcode = self.instructions[i].opcode
            counts = tuple(
                # beyond the least, more of it makes no difference
                min(count + (opcode == name), number + (name in exactly))
                for count, (name, number) in zip(counts, wanted, strict=True)
            )
            if (i, counts) in before or any(map(int.__gt__, counts, goal)):
                continue
            before[i, counts] = previous
            if i == loop.end and counts == goal:
                return self._path((i, counts), before)
            for j in self._next(i, loop):
                heapq.heappush(heap, (cost + 1, j, counts, (i, counts)))  # type: ignore[misc]
        raise LookupError(f"no pass of the loop has {dict(wanted)}")

    def _next(self, i: int, loop: Loop) -> Iterator[int]:
        """Where instruction i leads, forwards and inside the loop."""
        one = self.instructions[i]
        ways = [i + 1] if one.may_go_on() else []
        if one.target is not None and one.opcode.startswith(("BRA", "UBRA")):
            ways.append(self.labels[one.target])
        return (j for j in ways if i < j <= loop.end)

    def _path(self, last: tuple[int, tuple[int, ...]], before: Mapping) -> Counter[str]:  # type: ignore[type-arg]
        found: Counter[str] = Counter()
        node = last
        while node is not None:
            found[self.instructions[node[0]].opcode] += 1
            node = before[node]
        return found


def parse(listing: str) -> dict[str, Code]:
    """Kernels of `nvdisasm -c`, by mangled name."""
    parts = re.split(r"^\.text\.(\S+):$", listing, flags=re.MULTILINE)
    return {name: _parse_one(body) for name, body in zip(parts[1::2], parts[2::2], strict=True)}


def _parse_one(body: str) -> Code:
    code = Code()
    for line in body.splitlines():
        if found := _LABEL.match(line):
            code.labels[found[1]] = len(code.instructions)
        elif found := _INSTRUCTION.match(line):
            target = _TARGET.search(found[3])
            one = Instruction(found[2], found[3], bool(found[1]), target and target[1])
            code.instructions.append(one)
    return code


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on PATH, in CUDA_HOME, or in triton's wheel."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    folders = [os.environ.get("PATH", ""), f"{home}/bin"]
    triton = find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return shutil.which(name, path=os.pathsep.join(folders))


def disassemble(cubin: Path) -> dict[str, Code]:
    """The kernels of a cubin, by mangled name.

    Raises:
        FileNotFoundError: there is no nvdisasm.
    """
    tool = find_tool("nvdisasm")
    if tool is None:
        raise FileNotFoundError("no nvdisasm (on PATH, in CUDA_HOME, or in triton's wheel)")
    done = subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True, check=True)
    return parse(done.stdout)
