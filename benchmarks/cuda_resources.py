"""``python -m benchmarks.cuda_resources [--targets 90a] [--write docs/backends.md]``

What the CUDA kernels take of a GPU, from the compiler alone (nvcc; no GPU, no torch): registers,
spills and shared memory of every instance, and the instructions per element that the cluster kernel
executes (see benchmarks/cuda_executed.py). ``--executed forward_kl`` counts one kernel only, in a
few seconds, and shows in which functions its instructions are.
"""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .cuda_executed import Executed, Planner, execute, labels_of, same_code
from .executed_tables import executed_table, executed_text, functions_table, opcodes_table
from .report import Parser, Progress, markdown_table, show, writable_file
from .sass import Code, disassemble, find_tool

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc" / "cuda"
TARGETS = ("75", "80", "90a", "100")
KERNELS = ("rows_general", "rows_cluster", "scale_rows")
DTYPES = ("f32", "bf16", "f16")  # Dtype of csrc/problem.h, in its order
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tvd", "mse", "none")  # of csrc/kd_math.h
NAME = "cuda_resources"
#: What the extension is compiled with.
NVCC_FLAGS = runpy.run_path(str(ROOT / "csrc" / "kernel_sources.py"))["NVCC_FLAGS"]
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


def compile_cubin(
    source: Path, target: str, folder: Path, *more: str, include: Path = SOURCES
) -> tuple[Path, list[Instance]]:
    """Compile one file for one target, as the extension is, with `more` flags.

    Raises:
        FileNotFoundError: there is no nvcc.
        RuntimeError: the compiler's message.
    """
    nvcc = find_tool("nvcc")
    if nvcc is None:
        raise FileNotFoundError("no nvcc (on PATH, or in CUDA_HOME)")
    cubin = folder / f"{source.stem}_{target}.cubin"
    command = [nvcc, *NVCC_FLAGS, "-cubin", f"-arch=sm_{target}", "-Xptxas=-v"]
    command += [*more, f"-I{include}", str(source), "-o", str(cubin)]
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


def instantiate(
    folder: Path, kernels: Iterable[tuple[str, ...]], name: str = "some_kernels"
) -> Path:
    """Write a file that has only these kernels: name and template arguments, as C++ has them."""
    lines = ['#include "rows.cuh"', "using namespace fused_kd;"]
    for kernel, *arguments in kernels:
        lines.append(
            f"template __global__ void fused_kd::{kernel}<{', '.join(arguments)}>"
            "(const __grid_constant__ Params);"
        )
    file = folder / f"{name}.cu"
    file.write_text("\n".join(lines) + "\n")
    return file


def jobs_at_once() -> int:
    """Return MAX_JOBS, or the number of processors."""
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


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

        with ThreadPoolExecutor(jobs_at_once()) as pool:
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


# --------------------------------------------------------------------------- what is executed


def cluster_code(divergence: str, folder: Path, sources: Path = SOURCES) -> Code:
    """Return rows_cluster for bfloat16 on both sides and sm_90a, with its source lines.

    Raises:
        RuntimeError: the compiler's message; or it makes other code when it keeps lines.
    """
    kernel = ("rows_cluster", f"Divergence::{divergence}", "Dtype::bf16", "true")
    codes = []
    for name, more in ((f"{divergence}_lines", ["-lineinfo"]), (divergence, [])):
        source = instantiate(folder, [kernel], name)
        cubin, _ = compile_cubin(source, "90a", folder, *more, include=sources)
        (code,) = disassemble(cubin, lines=bool(more)).values()
        codes.append(code)
    if not same_code(*codes):
        raise RuntimeError(f"{divergence}: -lineinfo changes the code")
    return codes[0]


def executed(divergences: Sequence[str], folder: Path, sources: Path = SOURCES) -> list[Executed]:
    """Count what rows_cluster executes, at each temperature that makes a difference."""
    planner = Planner(sources, NVCC_FLAGS, folder)
    jobs = [(name, label) for name in divergences for label in labels_of(name)]
    found = []
    with Progress("counting", len(jobs)) as progress, ThreadPoolExecutor(jobs_at_once()) as pool:
        codes = pool.map(lambda name: cluster_code(name, folder, sources), divergences)
        for divergence, code in zip(divergences, codes, strict=True):
            for label in labels_of(divergence):
                number = DIVERGENCES.index(divergence)
                found.append(execute(divergence, number, label, code, planner))
                progress.advance(f"{divergence}, {label}")
    return found


def executed_report(divergences: Sequence[str], folder: Path, sources: Path) -> str:
    """Return the count, and where its instructions are."""
    found = executed(divergences, folder, sources)
    parts = [executed_table(found)]
    for one in found:
        if one.temperature in ("T = 2", "any T"):
            parts += [f"{one.divergence}, {one.temperature}:", functions_table(one)]
            parts.append(opcodes_table(one))
    return "\n\n".join(parts)


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
        parts += [executed_text(), executed_table(executed(DIVERGENCES, folder))]
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
    add("--executed", metavar="DIVERGENCES", help="count these kernels only: forward_kl,jsd or all")
    add("--sources", type=Path, default=SOURCES, help="of --executed: another csrc/cuda")
    add("--write", type=writable_file, metavar="FILE", help="between the markers of this file")
    options = parser.parse_args(arguments)
    for tool in ("nvcc", "nvdisasm"):
        if find_tool(tool) is None:
            parser.error(f"no {tool} (on PATH, in CUDA_HOME, or in triton's wheel)")
    parser.check_markers(options.write, NAME)
    with tempfile.TemporaryDirectory() as folder:
        try:
            if options.executed:
                names = _chosen(parser, options.executed)
                text = executed_report(names, Path(folder), options.sources.resolve())
            else:
                text = report(options.targets.split(","), Path(folder))
        except (RuntimeError, NotImplementedError) as error:
            parser.error(str(error))
    show(text, None if options.executed else options.write, NAME)
    return 0


def _chosen(parser: Parser, text: str) -> Sequence[str]:
    names = DIVERGENCES if text == "all" else text.split(",")
    if strange := set(names) - set(DIVERGENCES):
        parser.error(f"--executed: expected some of {', '.join(DIVERGENCES)}, got {strange}")
    return names


if __name__ == "__main__":
    sys.exit(main())
