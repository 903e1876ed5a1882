"""Compile CUDA kernels with nvcc as the extension does. Needs no GPU."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterable
from pathlib import Path

from .sass import run_tool

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc" / "cuda"
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tvd", "mse", "none")  # csrc/kd_math.h's order
NVCC_FLAGS = runpy.run_path(str(ROOT / "csrc" / "kernel_sources.py"))["NVCC_FLAGS"]
#: The most registers that a thread of each kernel may take; rows_cluster: those with which three
#: blocks of 256 threads fit on a multiprocessor, two for jsd. No instance spills.
REGISTERS = {"rows_general": 128, "rows_cluster": 80, "rows_cluster jsd": 128, "scale_rows": 48}
REGISTERS |= {"rows_general_classes": 128, "rows_cluster_classes": 80}
REGISTERS |= {"measure_rows": 128, "measure_support": 80}


def compile_with_nvcc(source: Path, output: Path, target: str, *flags: str) -> Path:
    """Compile a file for a target ("90a") as setup.py does; return `output`. Raises as run_tool."""
    flags = (*NVCC_FLAGS, *flags, f"-arch=sm_{target}", f"-I{SOURCES}")
    run_tool("nvcc", *flags, str(source), "-o", str(output))
    return output


def instantiate(file: Path, kernels: Iterable[tuple[str, ...]]) -> Path:
    """Write a source that instantiates kernels, (name, *template arguments) each; return `file`."""
    lines = ['#include "measure.cuh"', "using namespace fused_kd;"]
    for kernel, *arguments in kernels:
        name = f"fused_kd::{kernel}<{', '.join(arguments)}>"
        lines.append(f"template __global__ void {name}(const __grid_constant__ Params);")
    file.write_text("\n".join(lines) + "\n")
    return file


def describe(mangled: str) -> tuple[str, int]:
    """Return a mangled name's kernel and the registers it may take; RuntimeError if not ours."""
    match = re.match(r"_ZN8fused_kd\d+(\w+?)I(?:LNS_10DivergenceE(\d)E)?LNS_5DtypeE", mangled)
    if match is None:
        raise RuntimeError(f"not a kernel of ours: {mangled}")
    divergence = DIVERGENCES[int(match[2])] if match[2] else ""
    return match[1], REGISTERS.get(f"{match[1]} {divergence}", REGISTERS[match[1]])
