"""Build the C++ programs and libraries of tests/ with the compiler alone: no torch."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from kernel_sources import AVX2, HOST_FLAGS, INSTRUCTION_SETS, KERNEL_FLAGS, ROOT, X86

from support.processes import passes
from support.processes import run as run_command

RACE = 66  # ThreadSanitizer's exit status
COMPILER = os.environ.get("CXX", "g++")

FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra"]
FLAGS += ["-Wno-unused-parameter", "-Wno-psabi", "-Werror"]
SANITIZE = ["-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"]
SANITIZE += ["-fno-sanitize-recover=undefined"]
EMULATED = [*AVX2, "-include", "tests/native/avx512_emulated.h"]

_CPU = Path("/proc/cpuinfo")
_FEATURES = set(_CPU.read_text().split()) if _CPU.exists() else set()
#: Instruction set: its compiler flags. AVX-512 and AMX are emulated by headers, compiled with AVX2,
#: which takes four times as long to compile.
TABLES: dict[str, list[str]] = {"generic": []}
if X86:
    TABLES["avx2"] = AVX2
    TABLES["avx512"] = EMULATED
    TABLES["avx512_bf16"] = [*EMULATED, "-DEMULATE_AVX512BF16"]
    TABLES["amx"] = [*TABLES["avx512_bf16"], "-include", "tests/native/amx_emulated.h"]
#: The same, but avx512_bf16 is not emulated if this processor has it.
NATIVE = dict(TABLES)
if "avx512_bf16" in _FEATURES:
    NATIVE["avx512_bf16"] = INSTRUCTION_SETS["avx512_bf16"]


def need_compiler() -> None:
    if shutil.which(COMPILER) is None:
        pytest.skip(f"the check programs need a C++ compiler: no {COMPILER}")


def need_avx2() -> None:
    """Skip the test if this processor has no AVX2, which the emulation of AVX-512 needs."""
    if not X86 or "avx2" not in _FEATURES:
        pytest.skip("AVX-512 is emulated with AVX2: this processor has none")


def compile_one(*arguments: object) -> None:
    """Run the compiler and assert that it succeeds; skip the test if there is none."""
    need_compiler()
    passes(run_command(COMPILER, *arguments, cwd=ROOT))


def compile_all(commands: Sequence[Sequence[object]]) -> None:
    """Run `compile_one` for each list of arguments, up to four at a time; raises as that."""
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        list(pool.map(lambda command: compile_one(*command), commands))


def copy_source(target: Path, *folders: str) -> Path:
    """Copy what a build needs, and `folders`, to `target`; return `target`."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*_not_built.txt")
    for name in ("csrc", "fused_kd", *folders):
        shutil.copytree(ROOT / name, target / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, target)
    return target


def _alias(name: str) -> str:
    # The linker's option that replaces a table without an object by the generic one, since
    # dispatch.cpp names every table.
    options = []
    for kind in ("kernels", "product") if name in INSTRUCTION_SETS else ("product",):
        mangled = [f"_ZN8fused_kd{len(f'{kind}_{x}')}{kind}_{x}E" for x in (name, "generic")]
        options.append(f"--defsym={mangled[0]}={mangled[1]}")
    return ",".join(["-Wl", *options])


def build(folder: Path, tables: list[str], sanitize: bool = False) -> list[Path]:
    """Compile check_kernels, check_rows and check_product with the kernels of some tables.

    In the programs every table counts as supported; check_rows and check_product run the tables
    named as arguments, `amx` only check_product, since it has no row kernels. avx512 and amx are
    always emulated, avx512_bf16 with sanitizers or if this processor lacks it. Without a compiler
    the test is skipped.

    Returns:
        The paths of the three programs, in this order.
    """
    extra = SANITIZE if sanitize else []
    flags = TABLES if sanitize else NATIVE
    pointers = ",".join(f"&kernels_{name}" for name in tables if name in INSTRUCTION_SETS)
    everywhere = ["-DFUSED_KD_X86"] if X86 else []
    # the largest first
    units = [f"rows_{name}" for name in tables[::-1] if name in INSTRUCTION_SETS]
    units += [f"product_{name}" for name in tables[::-1]]
    jobs = {unit: [*flags[unit.partition("_")[2]], f"csrc/cpu/{unit}.cpp"] for unit in units}
    jobs["check_kernels"] = [f"-DTABLES={pointers}", "tests/native/check_kernels.cpp"]
    for name in ("check_rows", "check_product"):
        jobs[name] = [f"tests/native/{name}.cpp"]
    for name in ("rows", "measure", "product"):
        jobs[name] = [f"csrc/cpu/{name}.cpp"]
    jobs["dispatch"] = [*everywhere, "-D__builtin_cpu_supports(x)=1", "csrc/cpu/dispatch.cpp"]
    objects = {name: folder / f"{name}.o" for name in jobs}
    compile_all([[*FLAGS, *extra, *jobs[name], "-c", "-o", objects[name]] for name in jobs])
    kernels = [objects[unit] for unit in units]
    aliases = [_alias(name) for name in TABLES if name not in tables]
    programs = {
        "check_kernels": ["check_kernels"],
        "check_rows": ["check_rows", "rows", "measure", "product", "dispatch"],
        "check_product": ["check_product", "product", "dispatch"],
    }
    for program, parts in programs.items():
        files = [*kernels, *(objects[part] for part in parts)]
        link = aliases if "dispatch" in parts else []
        compile_one(*extra, *files, *link, "-pthread", "-o", folder / program)
    return [folder / program for program in programs]


def build_conversions(folder: Path, name: str) -> Path:
    """Compile tests/native/conversions.cpp for an instruction set, with the module's own flags.

    Returns:
        The path of the shared library.
    """
    kernels = f"csrc/cpu/rows_{name}.cpp"
    defines = re.findall(r"#define (FUSED_KD_\w+) (\w+)", (ROOT / kernels).read_text())
    target = folder / f"conversions_{name}.so"
    command = [*HOST_FLAGS, *KERNEL_FLAGS[kernels], "-Werror"]
    command += [f"-D{key}={value}" for key, value in defines]
    compile_one(*command, "-shared", "tests/native/conversions.cpp", "-o", target)
    return target


def run(program: Path, *arguments: str) -> None:
    """Run a check program; assert that it succeeds, and that none of its checks failed."""
    assert passes(run_command(program, *arguments)).strip().endswith(" 0 failed")


def run_emulated(program: Path, *arguments: object) -> tuple[int, str]:
    """Run a program of tests/cuda_on_cpu/; return its exit status and output.

    The status is RACE after a data race, negative after a signal. If ThreadSanitizer cannot run
    here, the test is skipped.
    """
    options = {"TSAN_OPTIONS": f"halt_on_error=1:exitcode={RACE}", "ASAN_OPTIONS": ""}
    done = run_command(program, *arguments, **options)
    text = done.stdout + done.stderr
    if "unexpected memory mapping" in text:
        pytest.skip("ThreadSanitizer cannot run here: the kernel randomises addresses too widely")
    return done.returncode, text
