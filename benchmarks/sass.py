"""Disassemble GPU code with NVIDIA's tools; read the resources that they report."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

_LABEL = re.compile(r"\s*(\.L\w+|\$\S+):")
_INSTRUCTION = re.compile(
    r"\s+/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@(?P<guard>!?U?P\w+)\s+)?"
    r"(?P<opcode>[A-Z][A-Z0-9_.]*)\s*(?P<operands>.*?)\s*;"
)
_TARGET = re.compile(r"`\(([.$][^)]+)\)")
_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


class Instruction(NamedTuple):
    """One instruction, without its encoding."""

    opcode: str  # with its suffixes: "LDG.E.128"
    operands: str
    guard: str  # "!P0": lanes for which it is false do nothing; "": no guard

    @property
    def target(self) -> str:
        """Return the label of a branch; "" of another instruction."""
        match = _TARGET.search(self.operands)
        return match[1] if match else ""


class Code(NamedTuple):
    """A disassembled kernel."""

    instructions: list[Instruction]
    labels: dict[str, int]  # by label: the index of the next instruction


class Usage(NamedTuple):
    """Resources of one kernel."""

    registers: int  # of a thread
    stack: int  # bytes of local memory of a thread: its stack and spilled registers
    shared: int  # bytes of static shared memory, of which sm_90 and later reserve 1024


def find_tool(name: str) -> str | None:
    """Return the path of a CUDA program, on PATH, in CUDA_HOME or in triton's wheel; else None."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    folders = [os.environ.get("PATH", ""), f"{home}/bin"]
    triton = find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return shutil.which(name, path=os.pathsep.join(folders))


def run_tool(name: str, *arguments: str) -> str:
    """Return what a CUDA program prints; RuntimeError if it fails, FileNotFoundError if absent."""
    tool = find_tool(name)
    if tool is None:
        raise FileNotFoundError(f"no {name} (on PATH, in CUDA_HOME, or in triton's wheel)")
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{name} {' '.join(arguments)}: {done.stderr[-3000:]}")
    return done.stdout


def usage(cubin: Path) -> dict[str, Usage]:
    """Return the resources of a cubin's kernels, by mangled name; raises as run_tool()."""
    kernels = {}
    for name, *numbers in _USAGE.findall(run_tool("cuobjdump", "-res-usage", str(cubin))):
        registers, stack, shared, local = map(int, numbers)
        kernels[name] = Usage(registers, stack + local, shared)
    return kernels


def disassemble(cubin: Path) -> dict[str, Code]:
    """Return the disassembled kernels of a cubin, by mangled name; raises as run_tool()."""
    return parse(run_tool("nvdisasm", "-c", str(cubin)))


def parse(listing: str) -> dict[str, Code]:
    """Return the kernels of a listing by `nvdisasm -c`, by mangled name."""
    parts = re.split(r"^\.text\.(\S+):$", listing, flags=re.MULTILINE)
    kernels = {name: Code([], {}) for name in parts[1::2]}
    for code, body in zip(kernels.values(), parts[2::2], strict=True):
        for line in body.splitlines():
            if label := _LABEL.match(line):
                code.labels[label[1]] = len(code.instructions)
            elif match := _INSTRUCTION.match(line):
                code.instructions.append(Instruction(**match.groupdict("")))
    return kernels
