"""``python -m benchmarks.cuda_resources [--targets 90a] [--write docs/backends.md]``

What the CUDA kernels take of a GPU, from the compiler alone (nvcc; no GPU, no torch): registers,
spills and shared memory of every instance, and the instructions and exponentials per element of
the cluster kernel's loops, counted in the disassembly on the fast path (see benchmarks/sass.py).
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .cuda_loops import EXPONENTIALS, INSTRUCTIONS, works
from .report import Parser, Progress, markdown_table, show, writable_file
from .sass import disassemble, find_tool

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc" / "cuda"
TARGETS = ("75", "80", "90a", "100")
KERNELS = ("rows_general", "rows_cluster", "scale_rows")
DTYPES = ("f32", "bf16", "f16")  # Dtype of csrc/problem.h, in its order
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tvd", "mse", "none")  # of csrc/kd_math.h
NAME = "cuda_resources"
#: What the extension is compiled with.
NVCC_FLAGS = ast.literal_eval(
    re.search(r"^NVCC_FLAGS = (.*)$", (ROOT / "setup.py").read_text(), re.MULTILINE)[1]  # type: ignore[index]
)
#: Registers of each kernel at most; rows_cluster: as many as let three blocks of 256 threads share
#: a multiprocessor, two for jsd. No instance spills, or has shared memory besides what its launch
#: gives it.
REGISTERS = {"rows_general": 128, "rows_cluster": 80, "rows_cluster jsd": 128, "scale_rows": 48}


@dataclass(frozen=True)
class Instance:
    """One kernel for one target."""

    kernel: str  # rows_general, rows_cluster, scale_rows
    divergence: str  # "" for scale_rows
    student: str
    same: bool  # the teacher has the student's type
    target: str
    registers: int
    spills: int  # bytes stored and loaded
    stack: int
    shared: int  # bytes, static

    @property
    def budget(self) -> int:
        return REGISTERS.get(f"{self.kernel} {self.divergence}", REGISTERS[self.kernel])

    @property
    def empty(self) -> bool:
        """Clusters begin with sm_90: before it the kernel has no body."""
        return self.kernel == "rows_cluster" and int(self.target.rstrip("a")) < 90


# ---------------------------------------------------------------------------------- the compiler


def compile_cubin(source: Path, target: str, folder: Path) -> tuple[Path, list[Instance]]:
    """Compiles one file for one target, as the extension is.

    Raises:
        FileNotFoundError: there is no nvcc.
        RuntimeError: the compiler's message.
    """
    nvcc = find_tool("nvcc")
    if nvcc is None:
        raise FileNotFoundError("no nvcc (on PATH, or in CUDA_HOME)")
    cubin = folder / f"{source.stem}_{target}.cubin"
    command = [nvcc, *NVCC_FLAGS, "-cubin", f"-arch=sm_{target}", "-Xptxas=-v"]
    command += [f"-I{SOURCES}", str(source), "-o", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{source.name} for sm_{target}: {done.stderr[-3000:]}")
    return cubin, parse_log(done.stderr)


def parse_log(log: str) -> list[Instance]:
    """What `ptxas -v` says of each kernel."""
    parts = re.split(r"Compiling entry function '(\S+)' for 'sm_(\w+)'", log)
    instances = []
    for mangled, target, told in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        stack, stores, loads = _numbers(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", told
        )
        (registers,) = _numbers(r"Used (\d+) registers", told)
        shared = re.search(r"(\d+) bytes smem", told)
        instances.append(
            Instance(
                *describe(mangled), target, registers, stores + loads, stack,
                int(shared[1]) if shared else 0,
            )
        )  # fmt: skip
    return instances


def _numbers(pattern: str, text: str) -> list[int]:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the compiler does not tell {pattern!r}: {text[:500]}")
    return [int(number) for number in found.groups()]


def describe(mangled: str) -> tuple[str, str, str, bool]:
    """Kernel, divergence, student's type, whether the teacher's is the same: template arguments."""
    found = re.match(
        r"_ZN8fused_kd\d+(\w+?)I(?:LNS_10DivergenceE(\d)E)?LNS_5DtypeE(\d)E(?:Lb([01])E)?E", mangled
    )
    if found is None:
        raise RuntimeError(f"not a kernel of ours: {mangled}")
    divergence = DIVERGENCES[int(found[2])] if found[2] else ""
    return found[1], divergence, DTYPES[int(found[3])], found[4] != "0"


def instantiate(folder: Path, kernels: Iterable[tuple[str, ...]]) -> Path:
    """A file that has only these kernels: name and template arguments, as C++ writes them."""
    lines = ['#include "rows.cuh"', "using namespace fused_kd;"]
    for name, *arguments in kernels:
        lines.append(
            f"template __global__ void fused_kd::{name}<{', '.join(arguments)}>"
            "(const __grid_constant__ Params);"
        )
    file = folder / "some_kernels.cu"
    file.write_text("\n".join(lines) + "\n")
    return file


@dataclass
class Compiled:
    """Every instance of every target, and the cubin of each file."""

    instances: list[Instance]
    cubins: dict[tuple[str, str], Path]  # by student's type and target


def compile_all(targets: Sequence[str], folder: Path) -> Compiled:
    """The three files of the row kernels; MAX_JOBS at a time."""
    jobs = [(dtype, target) for target in targets for dtype in DTYPES]
    found = Compiled([], {})
    with Progress("compiling", len(jobs)) as progress:

        def compile_one(job: tuple[str, str]) -> tuple[Path, list[Instance]]:
            done = compile_cubin(SOURCES / f"rows_{job[0]}.cu", job[1], folder)
            progress.advance(f"rows_{job[0]}.cu for sm_{job[1]}")
            return done

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            for job, (cubin, instances) in zip(jobs, pool.map(compile_one, jobs), strict=True):
                found.cubins[job] = cubin
                found.instances += [one for one in instances if not one.empty]
    return found


# ------------------------------------------------------------------------------------ the tables


def _range(instances: Iterable[Instance]) -> str:
    registers = sorted({one.registers for one in instances})
    return f"{registers[0]}–{registers[-1]}" if len(registers) > 1 else f"{registers[0]}"


def kernels_table(instances: Sequence[Instance]) -> str:
    """One line for each kernel and target."""
    rows = []
    for kernel in KERNELS:
        for target in dict.fromkeys(one.target for one in instances):
            these = [x for x in instances if (x.kernel, x.target) == (kernel, target)]
            if not these:
                continue
            rows.append([
                f"`{kernel}`", f"sm_{target}", str(len(these)), _range(these),
                str(sum(x.spills for x in these)), str(sum(x.stack for x in these)),
                str(max(x.shared for x in these)),
            ])  # fmt: skip
    head = ["kernel", "target", "instances", "registers", "bytes spilled", "stack", "static shared"]
    return markdown_table(head, rows, left=2)


def divergences_table(instances: Sequence[Instance]) -> str:
    """Registers with bfloat16 on both sides."""
    bf16 = [x for x in instances if x.divergence and x.student == "bf16" and x.same]
    # each once, in the order of the targets
    columns = dict.fromkeys((x.kernel, x.target) for k in KERNELS for x in bf16 if x.kernel == k)
    rows = []
    for divergence in DIVERGENCES:
        cells = [
            str(x.registers)
            for column in columns
            for x in bf16
            if (x.kernel, x.target, x.divergence) == (*column, divergence)
        ]
        rows.append([f"`{divergence}`" if divergence != "none" else "hard term alone", *cells])
    head = ["divergence", *(f"`{kernel[5:]}` sm_{target}" for kernel, target in columns)]
    return markdown_table(head, rows)


def loops_table(cubin: Path) -> str:
    """Instructions and exponentials per element of rows_cluster, bfloat16 on both sides."""
    rows = []
    for mangled, code in disassemble(cubin).items():
        kernel, divergence, student, same = describe(mangled)
        if (kernel, student, same) != ("rows_cluster", "bf16", True) or divergence == "none":
            continue
        for work in works(divergence, code):
            cells = [f"{work.per_element(visit):.1f}" for visit in ("first", "second", "gradient")]
            total = f"{work.instructions:.1f}"
            within = "yes" if work.within else "**no**"
            rows.append([
                f"`{divergence}`", work.temperature, *cells, total,
                f"{work.exponentials:.1f}", f"{work.special:.1f}", within,
            ])  # fmt: skip
    rows.sort(key=lambda row: DIVERGENCES.index(row[0].strip("`")))
    head = ["divergence", "hard term at", "first visit", "second", "gradient", "together",
            "exponentials", "special functions", "within"]  # fmt: skip
    return markdown_table(head, rows, left=2)


def report(targets: Sequence[str], folder: Path) -> str:
    """All tables, in Markdown."""
    found = compile_all(targets, folder)
    parts = [
        "Every instance (divergence, student's type, teacher's the same or not). Shared memory is "
        "given at launch (`csrc/cuda/sizes.h`).",
        kernels_table(found.instances),
        "Registers with bfloat16 on both sides:",
        divergences_table(found.instances),
    ]
    if "90a" in targets:
        parts += [
            "Instructions per element in the loops of `rows_cluster`, bfloat16, sm_90a, on the "
            "fast path (no new maximum, no infinity), forward and backward in one read. Special "
            "functions: exponentials and reciprocals. An H100 at the speed of its memory has time "
            f"for {INSTRUCTIONS:g} instructions, {EXPONENTIALS:g} of them special functions.",
            loops_table(found.cubins["bf16", "90a"]),
        ]
    parts.append(f"`python -m benchmarks.cuda_resources`, nvcc {nvcc_version()}")
    return "\n\n".join(parts)


def nvcc_version() -> str:
    told = subprocess.run([str(find_tool("nvcc")), "--version"], capture_output=True, text=True)
    found = re.search(r"release ([\d.]+)", told.stdout)
    return found[1] if found else "of unknown version"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables, or writes them; returns the exit status."""
    parser = Parser(prog="python -m benchmarks.cuda_resources", description=__doc__)
    add = parser.add_argument
    add("--targets", default=",".join(TARGETS), help="default: %(default)s")
    add("--write", type=writable_file, metavar="FILE", help="between the markers of this file")
    options = parser.parse_args(arguments)
    for tool in ("nvcc", "nvdisasm"):
        if find_tool(tool) is None:
            parser.error(f"no {tool} (on PATH, in CUDA_HOME, or in triton's wheel)")
    parser.check_markers(options.write, NAME)
    with tempfile.TemporaryDirectory() as folder:
        try:
            text = report(options.targets.split(","), Path(folder))
        except RuntimeError as error:
            parser.error(str(error))
    show(text, options.write, NAME)
    return 0


if __name__ == "__main__":
    sys.exit(main())
