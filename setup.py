"""Builds the optional compiled module fused_kd._C; everything declarative is in pyproject.toml.

Environment: FUSED_KD_BUILD=0 skips the compiled module, =1 makes its absence an error; MAX_JOBS
caps parallel compilation; DEBUG=1 builds with assertions and symbols; FUSED_KD_SANITIZE=1 with the
address and undefined-behaviour sanitizers.
"""

from __future__ import annotations

import os
import platform
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

CPU = "csrc/cpu"
X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-Wno-maybe-uninitialized"]
# Scheduling before register allocation interleaves a loop's exponentials: 12 % on the sums.
SCHEDULE = ["-fschedule-insns", "-fsched-pressure"]
# One translation unit per instruction set: its flags belong to that file alone.
KERNELS = {f"{CPU}/rows_generic.cpp": SCHEDULE}
if X86:
    KERNELS[f"{CPU}/rows_avx2.cpp"] = [*SCHEDULE, *AVX2]
    KERNELS[f"{CPU}/rows_avx512.cpp"] = [*SCHEDULE, *AVX512]
    KERNELS[f"{CPU}/rows_avx512_bf16.cpp"] = [*SCHEDULE, *AVX512, "-mavx512bf16"]
SOURCES = [
    *KERNELS,
    f"{CPU}/rows.cpp",
    f"{CPU}/dispatch.cpp",
    "csrc/bindings/cpu_ops.cpp",
    "csrc/bindings/module.cpp",
]
REASON_FILE = "fused_kd/_not_built.txt"


def flag(name: str) -> bool:
    return os.environ.get(name, "0") == "1"


def compile_flags() -> list[str]:
    flags = [
        "-std=c++17",
        "-O3",
        "-fPIC",
        "-fvisibility=hidden",
        "-ffp-contract=off",
        "-fno-math-errno",
    ]
    flags += ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-psabi"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000"]  # nothing newer than torch 2.10
    if X86:
        flags += ["-DFUSED_KD_X86"]
    if flag("DEBUG"):
        flags += ["-O0", "-g"]
    if flag("FUSED_KD_SANITIZE"):
        flags += ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"]
        flags += ["-fno-sanitize-recover=undefined"]
    return flags


def extension() -> Extension:
    """Raises ImportError where torch or pybind11 can't be imported by the build."""
    import pybind11
    import torch
    from torch.utils import cpp_extension

    libraries = [path for path in cpp_extension.library_paths() if os.path.isdir(path)]
    flags = [*compile_flags(), f'-DFUSED_KD_TORCH_VERSION="{torch.__version__}"']
    return Extension(
        "fused_kd._C",
        SOURCES,
        # pybind11's own headers first: torch bundles another copy
        include_dirs=[pybind11.get_include(), *cpp_extension.include_paths()],
        library_dirs=libraries,
        libraries=["torch_cpu", "c10"],
        extra_compile_args=flags,
        extra_link_args=["-fsanitize=address,undefined"] if flag("FUSED_KD_SANITIZE") else [],
        depends=[str(path) for path in Path("csrc").rglob("*.h")],
    )


class BuildExtension(build_ext):
    """Compiles in parallel, adds each kernel file's own flags, and lets the package do without."""

    def build_extension(self, ext: Extension) -> None:
        self._compile_with_own_flags()
        try:
            super().build_extension(ext)
        except Exception as error:
            if flag("FUSED_KD_BUILD"):
                raise
            # the program and its exit status; the whole command line was printed
            told = re.sub(r"Command '\['([^']*)'.*\]'", r"command '\1'", str(error).splitlines()[0])
            write_reason(self, f"compiling it failed: {told}")

    def copy_extensions_to_source(self) -> None:  # an editable install of a module that isn't there
        built = Path(self.build_lib)
        self.extensions = [
            e for e in self.extensions if (built / self.get_ext_filename(e.name)).exists()
        ]
        super().copy_extensions_to_source()

    def _compile_with_own_flags(self) -> None:
        compile_one = self.compiler._compile

        def compile_all(sources, output_dir=None, macros=None, include_dirs=None, debug=0,
                        extra_preargs=None, extra_postargs=None, depends=None):  # fmt: skip
            _, objects, postargs, pp_opts, build = self.compiler._setup_compile(
                output_dir, macros, include_dirs, sources, depends, extra_postargs
            )
            cc_args = self.compiler._get_cc_args(pp_opts, debug, extra_preargs)
            jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)

            def compile_source(item):
                obj, (source, extension) = item
                own = [*postargs, *KERNELS.get(source, [])]
                compile_one(obj, source, extension, cc_args, own, pp_opts)

            with ThreadPoolExecutor(jobs) as pool:
                list(pool.map(compile_source, build.items()))
            return objects

        self.compiler.compile = compile_all


class BuildPython(build_py):
    """Leaves the reason beside the package when there is no compiled module."""

    def run(self) -> None:
        super().run()
        if NOT_BUILT:
            write_reason(self, NOT_BUILT)


def write_reason(command, reason: str) -> None:
    in_source = getattr(command, "editable_mode", False) or getattr(command, "inplace", False)
    root = Path(".") if in_source else Path(command.build_lib)
    target = root / REASON_FILE
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(reason + "\n")
    print(f"fused_kd: pure Python, {reason}")


def decide() -> tuple[list[Extension], str]:
    wanted = os.environ.get("FUSED_KD_BUILD", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"FUSED_KD_BUILD must be 0 or 1; got {wanted!r}")
    if wanted == "0":
        return [], "FUSED_KD_BUILD=0 when it was installed"
    try:
        return [extension()], ""
    except ImportError as error:
        if wanted == "1":
            raise
        return [], f"{error} when it was built: install with 'pip install --no-build-isolation .'"


Path(REASON_FILE).unlink(missing_ok=True)
EXTENSIONS, NOT_BUILT = decide()
setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": BuildExtension, "build_py": BuildPython})
