"""The files of both compiled modules, and the flags that each is compiled with.

setup.py builds from these lists, and so do tests and benchmarks that compile single files. Paths
are relative to ROOT.
"""

from __future__ import annotations

import platform
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
X86 = platform.machine().lower() in ("x86_64", "amd64")

# ----------------------------------------------------------------------------------- the host

#: The compiled modules call nothing newer than torch 2.10.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
# -g0: Python's own flags ask for symbols, which make the module twelve times as large.
HOST_FLAGS = ["-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
HOST_FLAGS += ["-fno-math-errno", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-psabi"]
if X86:
    HOST_FLAGS += ["-DFUSED_KD_X86"]

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
AVX512 += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # GCC's own headers
#: The flags of each instruction set, for its own translation units alone.
INSTRUCTION_SETS = {"generic": []}
if X86:
    INSTRUCTION_SETS |= {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}
#: The same, and of the sets that have a matrix product but no row kernels.
PRODUCT_SETS = dict(INSTRUCTION_SETS)
if X86:
    PRODUCT_SETS["amx"] = [*INSTRUCTION_SETS["avx512_bf16"], "-mamx-tile", "-mamx-bf16"]
# Scheduling before register allocation interleaves a loop's exponentials: 12 % on the sums.
SCHEDULE = ["-fschedule-insns", "-fsched-pressure"]
#: The flags of each kernel file, in addition to HOST_FLAGS.
KERNEL_FLAGS = {
    f"csrc/cpu/{kind}_{name}.cpp": [*schedule, *flags]
    for kind, schedule, sets in (
        ("rows", SCHEDULE, INSTRUCTION_SETS),
        ("product", [], PRODUCT_SETS),
    )
    for name, flags in sets.items()
}
CPU_SOURCES = [
    *KERNEL_FLAGS,
    "csrc/cpu/rows.cpp",
    "csrc/cpu/measure.cpp",
    "csrc/cpu/product.cpp",
    "csrc/cpu/classes.cpp",
    "csrc/cpu/huge_pages.cpp",
    "csrc/cpu/amx.cpp",
    "csrc/cpu/dispatch.cpp",
    "csrc/bindings/cpu_ops.cpp",
    "csrc/bindings/product_ops.cpp",
    "csrc/bindings/classes_ops.cpp",
    "csrc/bindings/module.cpp",
]

# ------------------------------------------------------------------------------- CUDA devices

CUDA_KERNELS = [
    "csrc/cuda/launch.cu",
    "csrc/cuda/runtime.cu",
    "csrc/cuda/rows_f32.cu",
    "csrc/cuda/rows_bf16.cu",
    "csrc/cuda/rows_f16.cu",
]
CUDA_BINDING = "csrc/bindings/cuda_ops.cpp"
# As on the CPU, only the contractions that are written as fma: tvd is exactly 0 for equal rows.
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false"]
#: A binary for each family of GPUs, and PTX for later ones.
CUDA_ARCHITECTURES = "7.5;8.0;9.0;10.0;12.0+PTX"
