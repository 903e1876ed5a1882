"""Builds the C++ programs and libraries of tests/native/ with the compiler alone: no torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from kernel_sources import AVX2, HOST_FLAGS, KERNEL_FLAGS, ROOT, X86

COMPILER = os.environ.get("CXX", "g++")

FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra"]
FLAGS += ["-Wno-unused-parameter", "-Wno-psabi", "-Werror"]
SANITIZE = ["-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"]
SANITIZE += ["-fno-sanitize-recover=undefined"]
EMULATED = [*AVX2, "-include", "tests/native/avx512_emulated.h"]

#: Instruction set: its own flags here. AVX-512 is emulated, on any processor with AVX2.
TABLES: dict[str, list[str]] = {"generic": []}
if X86:
    TABLES["avx2"] = AVX2
    TABLES["avx512"] = EMULATED
    TABLES["avx512_bf16"] = [*EMULATED, "-DEMULATE_AVX512BF16"]


def need_compiler() -> None:
    if shutil.which(COMPILER) is None:
        pytest.skip(f"the check programs need a C++ compiler: no {COMPILER}")


def need_avx2() -> None:
    """Skips where the emulation cannot run."""
    if not X86 or "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("AVX-512 is emulated with AVX2: this processor has none")


def _compile(job: tuple[Path, list[str]]) -> None:
    target, arguments = job
    command = [COMPILER, *FLAGS, *arguments, "-c", "-o", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def _alias(name: str) -> str:
    """dispatch.cpp names every table: one that isn't linked becomes the generic one."""
    options = []
    for kind in ("kernels", "product"):
        mangled = [f"_ZN8fused_kd{len(f'{kind}_{x}')}{kind}_{x}E" for x in (name, "generic")]
        options.append(f"--defsym={mangled[0]}={mangled[1]}")
    return ",".join(["-Wl", *options])


def build(folder: Path, tables: list[str], sanitize: bool = False) -> tuple[Path, Path, Path]:
    """Compiles check_kernels, check_rows and check_product with these tables; the programs.

    Every table counts as one that the processor has: the last two take by name those to run.
    """
    extra = SANITIZE if sanitize else []
    pointers = ",".join(f"&kernels_{name}" for name in tables)
    everywhere = ["-DFUSED_KD_X86"] if X86 else []
    # the largest first
    units = [f"{kind}_{name}" for kind in ("rows", "product") for name in tables[::-1]]
    jobs = {unit: [*TABLES[unit.partition("_")[2]], f"csrc/cpu/{unit}.cpp"] for unit in units}
    jobs["check_kernels"] = [f"-DTABLES={pointers}", "tests/native/check_kernels.cpp"]
    for name in ("check_rows", "check_product"):
        jobs[name] = [f"tests/native/{name}.cpp"]
    for name in ("rows", "product"):
        jobs[name] = [f"csrc/cpu/{name}.cpp"]
    jobs["dispatch"] = [*everywhere, "-D__builtin_cpu_supports(x)=1", "csrc/cpu/dispatch.cpp"]
    objects = {name: folder / f"{name}.o" for name in jobs}
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        list(pool.map(_compile, [(objects[name], [*extra, *jobs[name]]) for name in jobs]))
    kernels = [objects[unit] for unit in units]
    aliases = [_alias(name) for name in TABLES if name not in tables]
    programs = {
        "check_kernels": ["check_kernels"],
        "check_rows": ["check_rows", "rows", "dispatch"],
        "check_product": ["check_product", "product", "dispatch"],
    }
    for program, parts in programs.items():
        files = [str(path) for path in [*kernels, *(objects[part] for part in parts)]]
        link = [*aliases, "-pthread"] if "dispatch" in parts else ["-pthread"]
        command = [COMPILER, *extra, *files, *link, "-o", str(folder / program)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder / "check_kernels", folder / "check_rows", folder / "check_product"


def build_conversions(folder: Path, name: str) -> Path:
    """Compile tests/native/conversions.cpp for an instruction set, with the module's own flags.

    Returns:
        The shared library.
    """
    kernels = f"csrc/cpu/rows_{name}.cpp"
    defines = re.findall(r"#define (FUSED_KD_\w+) (\w+)", (ROOT / kernels).read_text())
    target = folder / f"conversions_{name}.so"
    command = [COMPILER, *HOST_FLAGS, *KERNEL_FLAGS[kernels], "-Werror"]
    command += [f"-D{key}={value}" for key, value in defines]
    command += ["-shared", "tests/native/conversions.cpp", "-o", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return target


def run(program: Path, *arguments: str) -> None:
    """Runs a check program; its output is the failure's message."""
    done = subprocess.run(
        [str(program), *arguments], capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert done.stdout.strip().endswith(" 0 failed"), done.stdout
