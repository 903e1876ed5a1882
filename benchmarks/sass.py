"""Disassembled GPU code: instructions, the source lines that they come from, basic blocks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

_LABEL = re.compile(r"\s*(\.L\w+|\$\S+):")
_INSTRUCTION = re.compile(
    r"\s+/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;"
)
_LINE = re.compile(r'\s*//## File "([^"]+)", line (\d+)( inlined at)?')
_TARGET = re.compile(r"`\(([.$][^)]+)\)")
#: What never goes on to the next instruction, unless it is predicated.
_ENDS = ("EXIT", "RET", "BRX", "JMP", "JMX")
_BRANCHES = ("BRA", "UBRA")

#: A file and a line of it.
Place = tuple[str, int]


@dataclass(frozen=True)
class Instruction:
    """One instruction; nothing of its encoding."""

    opcode: str  # with its suffixes: "LDG.E.128"
    operands: str
    guard: str = ""  # "@!P0": a lane without it does nothing
    target: str | None = None  # a branch's label
    address: int = 0
    places: tuple[Place, ...] = ()  # its source line, the line that this is inlined at, and so on

    @property
    def branches(self) -> bool:
        """Return whether it may go to its target."""
        return self.opcode.startswith(_BRANCHES)

    @property
    def goes_on(self) -> bool:
        """Return whether it may go on to the next instruction."""
        if self.guard:
            return True
        if self.branches:  # the condition can also be an operand
            return self.opcode not in _BRANCHES or self.operands != f"`({self.target})"
        return not self.opcode.startswith(_ENDS)

    @property
    def ends_block(self) -> bool:
        """Return whether lanes may part, wait or leave here."""
        return (
            self.branches
            or not self.goes_on
            or self.opcode.startswith((*_ENDS, "CALL", "BSYNC", "WARPSYNC", "BAR", "UCGABAR_WAIT"))
            or ".TRYWAIT" in self.opcode
        )


@dataclass
class Code:
    """One kernel."""

    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # the instruction that follows

    def opcodes(self) -> Counter[str]:
        """Return how often each opcode occurs."""
        return Counter(one.opcode for one in self.instructions)

    @cached_property
    def blocks(self) -> list[range]:
        """The basic blocks, in order: only the first instruction is ever jumped to."""
        starts = {0, *self.labels.values()}
        for i, one in enumerate(self.instructions):
            if one.ends_block:
                starts.add(i + 1)
        cuts = sorted(start for start in starts if start < len(self.instructions))
        return [range(a, b) for a, b in zip(cuts, [*cuts[1:], len(self.instructions)], strict=True)]

    def successors(self) -> list[list[int]]:
        """Return, for each block, the blocks that may follow."""
        number = {block.start: i for i, block in enumerate(self.blocks)}
        returns = [
            number[i + 1]
            for i, one in enumerate(self.instructions)
            if one.opcode.startswith("CALL") and i + 1 in number
        ]

        def following(block: range) -> Iterator[int]:
            last = self.instructions[block.stop - 1]
            if last.target in self.labels and (last.branches or last.opcode.startswith("CALL")):
                yield number[self.labels[last.target]]
            if last.opcode.startswith("RET"):
                yield from returns
            if last.goes_on and block.stop in number:
                yield number[block.stop]

        return [list(dict.fromkeys(following(block))) for block in self.blocks]


def parse(listing: str) -> dict[str, Code]:
    """Return the kernels of `nvdisasm -c`, by mangled name."""
    parts = re.split(r"^\.text\.(\S+):$", listing, flags=re.MULTILINE)
    return {name: _parse_one(body) for name, body in zip(parts[1::2], parts[2::2], strict=True)}


def _parse_one(body: str) -> Code:
    code = Code()
    places: list[Place] = []
    complete = True  # the lines read so far are a whole chain
    for line in body.splitlines():
        if found := _LINE.match(line):
            if complete:
                places = []
            places.append((found[1], int(found[2])))
            complete = not found[3]
        elif found := _LABEL.match(line):
            code.labels[found[1]] = len(code.instructions)
            if found[1].startswith("$"):
                places = []  # a subroutine of the compiler's
        elif found := _INSTRUCTION.match(line):
            target = _TARGET.search(found[4])
            code.instructions.append(
                Instruction(
                    found[3], found[4], (found[2] or "").strip(), target and target[1],
                    int(found[1], 16), tuple(places),
                )
            )  # fmt: skip
            complete = True
    return code


def find_tool(name: str) -> str | None:
    """Return a program of the CUDA toolkit: on PATH, in CUDA_HOME, or in triton's wheel."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    folders = [os.environ.get("PATH", ""), f"{home}/bin"]
    triton = find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return shutil.which(name, path=os.pathsep.join(folders))


def disassemble(cubin: Path, lines: bool = False) -> dict[str, Code]:
    """Return the kernels of a cubin, by mangled name.

    Args:
        cubin: The file.
        lines: Whether to read source lines, of what was compiled with `-lineinfo`.

    Raises:
        FileNotFoundError: there is no nvdisasm.
    """
    tool = find_tool("nvdisasm")
    if tool is None:
        raise FileNotFoundError("no nvdisasm (on PATH, in CUDA_HOME, or in triton's wheel)")
    command = [tool, "-c", *(["-gi"] if lines else []), str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return parse(done.stdout)
