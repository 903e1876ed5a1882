"""Builds the optional compiled modules: fused_kd._C (CPU) and fused_kd._cuda (CUDA devices).

Everything declarative is in pyproject.toml. The modules are apart, so that the CPU's does not
depend on what a CUDA toolkit makes of the other.

Environment: FUSED_KD_BUILD=0 skips both, =1 makes the absence of the CPU's an error; FUSED_KD_CUDA
is the same for the CUDA module, which is otherwise built where torch is a CUDA build and nvcc is
there (no device is needed); both, FUSED_KD_BUILD=0 and FUSED_KD_CUDA=1, build the CUDA module
alone. TORCH_CUDA_ARCH_LIST names its architectures; FUSED_KD_CUDA_OBJECTS names a folder of its
kernels compiled beforehand, by `python setup.py cuda_objects --output FOLDER`, which needs nvcc but
no torch. MAX_JOBS caps parallel compilation; DEBUG=1 builds with assertions and symbols;
FUSED_KD_SANITIZE=1 builds the CPU's with the address and undefined-behaviour sanitizers.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import site
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Distribution, Extension, __version__, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc"))  # an isolated build has no cwd

import cuda_objects

CPU = "csrc/cpu"
X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-Wno-maybe-uninitialized"]
# Scheduling before register allocation interleaves a loop's exponentials: 12 % on the sums.
SCHEDULE = ["-fschedule-insns", "-fsched-pressure"]
# One translation unit per instruction set: its flags belong to that file alone.
INSTRUCTION_SETS = {"generic": []}
if X86:
    INSTRUCTION_SETS |= {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}
KERNELS = {}
for _name, _flags in INSTRUCTION_SETS.items():
    KERNELS[f"{CPU}/rows_{_name}.cpp"] = [*SCHEDULE, *_flags]
    KERNELS[f"{CPU}/product_{_name}.cpp"] = _flags
SOURCES = [
    *KERNELS,
    f"{CPU}/rows.cpp",
    f"{CPU}/product.cpp",
    f"{CPU}/dispatch.cpp",
    "csrc/bindings/cpu_ops.cpp",
    "csrc/bindings/product_ops.cpp",
    "csrc/bindings/module.cpp",
]
CUDA = "csrc/cuda"
CUDA_KERNELS = [
    f"{CUDA}/launch.cu",
    f"{CUDA}/runtime.cu",
    f"{CUDA}/rows_f32.cu",
    f"{CUDA}/rows_bf16.cu",
    f"{CUDA}/rows_f16.cu",
]
CUDA_BINDING = "csrc/bindings/cuda_ops.cpp"
# A binary for each family that differs, and PTX for what comes later.
CUDA_ARCHITECTURES = "7.5;8.0;9.0;10.0;12.0+PTX"
# As for the CPU, only the contractions that are written as fma: tvd is exactly 0 for equal rows.
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false"]
#: Module: where the reason lies that it isn't there.
REASON_FILES = {"_C": "fused_kd/_not_built.txt", "_cuda": "fused_kd/_cuda_not_built.txt"}

# Older ones do not know the license field of pyproject.toml. 0 is a copy without metadata.
IS_OLD = 0 < int(__version__.split(".")[0]) < 77
#: Commands that need no metadata.
COMPILING = {"build_ext", "cuda_objects"}
if IS_OLD and not COMPILING.intersection(sys.argv[1:]):
    raise SystemExit(
        f"building fused_kd needs setuptools>=77; got {__version__}: "
        "pip install --upgrade 'setuptools>=77', or compile in place with "
        "'python setup.py build_ext --inplace', which any version can"
    )


class WithoutMetadata(Distribution):
    """Does not read pyproject.toml, which older versions of setuptools refuse."""

    def parse_config_files(self, filenames=None, ignore_option_errors=False):
        super().parse_config_files([], ignore_option_errors)


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
    return flags


def wanted(variable: str) -> str:
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{variable} must be 0 or 1; got {value!r}")
    return value


def extension(name: str, sources: list[str], libraries: list[str], **extra: list) -> Extension:
    """Raises ImportError where torch or pybind11 can't be imported by the build."""
    import pybind11
    import torch
    from torch.utils import cpp_extension

    folders = [path for path in cpp_extension.library_paths() if os.path.isdir(path)]
    flags = [*compile_flags(), f'-DFUSED_KD_TORCH_VERSION="{torch.__version__}"']
    return Extension(
        f"fused_kd.{name}",
        sources,
        # pybind11's own headers first: torch bundles another copy
        include_dirs=[pybind11.get_include(), *cpp_extension.include_paths()],
        library_dirs=[*folders, *extra.get("folders", [])],
        libraries=["torch_cpu", "c10", *libraries],
        extra_compile_args=[*flags, *extra.get("flags", [])],
        extra_link_args=extra.get("link", []),
        extra_objects=extra.get("objects", []),
        depends=[str(path) for path in Path("csrc").rglob("*.*h")],
    )


def cpu_extension() -> Extension:
    if not flag("FUSED_KD_SANITIZE"):
        return extension("_C", SOURCES, [])
    flags = ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"]
    flags += ["-fno-sanitize-recover=undefined"]
    return extension("_C", SOURCES, [], flags=flags, link=["-fsanitize=address,undefined"])


def cuda_extension() -> Extension:
    """Raises LookupError where there is no CUDA to build for, ImportError without torch."""
    import torch
    from torch.utils import cpp_extension

    if torch.version.cuda is None:
        raise LookupError("torch is not a CUDA build")
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    given = os.environ.get(cuda_objects.VARIABLE)
    home = cpp_extension.CUDA_HOME
    has_nvcc = home is not None and shutil.which("nvcc", path=f"{home}/bin") is not None
    if not given and not has_nvcc:
        raise LookupError("no nvcc was found (CUDA_HOME, or on PATH)")
    wants = torch.version.cuda.split(".")[0]
    has = toolkit_version(f"{home}/bin/nvcc") if has_nvcc else "none"
    is_same = has.split(".")[0] == wants
    if not given and not is_same:
        raise LookupError(f"torch is built for CUDA {wants}, the toolkit is CUDA {has}")
    if given:
        cuda = torch.version.cuda
        found = cuda_objects.find(Path(given), CUDA_KERNELS, NVCC_FLAGS, cuda, listed)
        sources, objects, architectures = [CUDA_BINDING], found.files, found.architectures
    else:
        sources, objects = [CUDA_BINDING, *CUDA_KERNELS], []
        architectures = listed or CUDA_ARCHITECTURES
    folders = toolkit_libraries(home) if is_same else [runtime_folder(wants)]
    runtime = "cudart" if is_same else f":libcudart.so.{wants}"
    return extension(
        "_cuda",
        sources,
        ["c10_cuda", "torch_cuda", runtime],
        folders=folders,
        flags=["-DUSE_CUDA", f'-DFUSED_KD_ARCHITECTURES="{architectures}"'],
        objects=objects,
    )


def toolkit_version(nvcc: str) -> str:
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    found = re.search(r"release (\d+\.\d+)", told.stdout)
    if found is None:
        raise LookupError(f"nvcc does not tell its version: {told.stdout} {told.stderr}")
    return found.group(1)


def toolkit_libraries(home: str) -> list[str]:
    """The folders that nvcc itself links from, wherever it is installed."""
    told = subprocess.run(
        [f"{home}/bin/nvcc", "--dryrun", "none.cu"], capture_output=True, text=True
    )
    line = next((x for x in told.stderr.splitlines() if "LIBRARIES=" in x), "")
    return re.findall(r"-L([^\s\"]+)", line)


def runtime_folder(major: str) -> str:
    """The folder of the CUDA runtime that torch brings along, as a wheel of its own."""
    import torch

    near = Path(torch.__file__).parent
    for pattern in (f"lib/libcudart*.so.{major}", f"../nvidia/*/lib/libcudart.so.{major}"):
        for path in near.glob(pattern):
            return str(path.parent)
    raise LookupError(
        f"no CUDA runtime was found (a toolkit, or libcudart.so.{major} beside torch)"
    )


def jobs() -> int:
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


def nvcc_command(nvcc: str, source: str, target: str) -> list[str]:
    """Compiles a kernel file; it needs neither torch nor Python."""
    command = [nvcc, *NVCC_FLAGS, "-Xcompiler=-fPIC,-fvisibility=hidden"]
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES
    codes = []
    for item in listed.replace(";", " ").split():
        arch = item.removesuffix("+PTX").replace(".", "")
        if not re.fullmatch(r"\d+[af]?", arch):
            raise RuntimeError(f"TORCH_CUDA_ARCH_LIST must be like '8.0;9.0+PTX'; got {item!r}")
        codes.append(f"-gencode=arch=compute_{arch},code=sm_{arch}")
        if item.endswith("+PTX"):
            codes.append(f"-gencode=arch=compute_{arch},code=compute_{arch}")
    if len(codes) > 1:
        codes.append(f"--threads={jobs()}")  # architectures of a file at the same time
    return [*command, *codes, "-c", source, "-o", target]


class CompileObjects(Command):
    """Compiles the kernels alone; a build takes them from FUSED_KD_CUDA_OBJECTS."""

    description = "compile the CUDA kernels into a folder, for FUSED_KD_CUDA_OBJECTS"
    user_options: ClassVar = [("output=", "o", "the folder")]

    def initialize_options(self) -> None:
        self.output = "out/gpu_objects"

    def finalize_options(self) -> None:
        self.folder = Path(self.output)

    def run(self) -> None:
        nvcc = find_nvcc()
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / cuda_objects.STAMP).unlink(missing_ok=True)  # until all are there
        seconds = {}

        def compile_one(source: str) -> None:
            begin = time.monotonic()
            self.spawn(nvcc_command(nvcc, source, str(self.folder / f"{Path(source).stem}.o")))
            seconds[Path(source).name] = round(time.monotonic() - begin, 1)
            print(f"{source}: {seconds[Path(source).name]} s", flush=True)

        with ThreadPoolExecutor(jobs()) as pool:
            list(pool.map(compile_one, CUDA_KERNELS))
        architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES
        version = toolkit_version(nvcc)
        cuda_objects.write_stamp(
            self.folder, CUDA_KERNELS, NVCC_FLAGS, version, architectures, seconds
        )
        print(f"{self.folder}: for {architectures}, by nvcc {version}", flush=True)


def find_nvcc() -> str:
    """The compiler, without asking torch: CUDA_HOME, PATH, the usual folder."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    for folder in (*(f"{home}/bin" for home in homes if home), None, "/usr/local/cuda/bin"):
        found = shutil.which("nvcc", path=folder)
        if found is not None:
            return found
    raise SystemExit("no nvcc was found (CUDA_HOME, or on PATH)")


class BuildExtension(build_ext):
    """Compiles in parallel, adds each kernel file's own flags, and lets the package do without."""

    def build_extension(self, ext: Extension) -> None:
        self._compile_with_own_flags()
        name = ext.name.rpartition(".")[2]
        # an older one must not stand in for one that cannot be built
        Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        try:
            super().build_extension(ext)
        except Exception as error:
            if flag("FUSED_KD_BUILD" if name == "_C" else "FUSED_KD_CUDA"):
                raise
            # the program and its exit status; the whole command line was printed
            told = re.sub(r"Command '\['([^']*)'.*\]'", r"command '\1'", str(error).splitlines()[0])
            write_reason(self, name, f"compiling it failed: {told}")

    def run(self) -> None:
        self.was_inplace = self.inplace  # which the command clears while it runs
        if self.inplace:
            for name, reason in NOT_BUILT.items():
                write_reason(self, name, reason)
        super().run()

    def copy_extensions_to_source(self) -> None:  # an editable install of a module that isn't there
        built = Path(self.build_lib)
        self.extensions = [
            e for e in self.extensions if (built / self.get_ext_filename(e.name)).exists()
        ]
        super().copy_extensions_to_source()

    def _compile_with_own_flags(self) -> None:
        if ".cu" not in self.compiler.src_extensions:
            self.compiler.src_extensions.append(".cu")
        compile_one = self.compiler._compile

        def compile_all(sources, output_dir=None, macros=None, include_dirs=None, debug=0,
                        extra_preargs=None, extra_postargs=None, depends=None):  # fmt: skip
            _, objects, postargs, pp_opts, build = self.compiler._setup_compile(
                output_dir, macros, include_dirs, sources, depends, extra_postargs
            )
            cc_args = self.compiler._get_cc_args(pp_opts, debug, extra_preargs)

            def compile_source(item):
                obj, (source, extension) = item
                if source.endswith(".cu"):
                    from torch.utils.cpp_extension import CUDA_HOME

                    self.spawn(nvcc_command(f"{CUDA_HOME}/bin/nvcc", source, obj))
                    return
                own = [*postargs, *KERNELS.get(source, [])]
                compile_one(obj, source, extension, cc_args, own, pp_opts)

            with ThreadPoolExecutor(jobs()) as pool:
                list(pool.map(compile_source, build.items()))
            return objects

        self.compiler.compile = compile_all


class BuildPython(build_py):
    """Leaves the reason beside the package where there is no compiled module."""

    def run(self) -> None:
        super().run()
        for name, reason in NOT_BUILT.items():
            write_reason(self, name, reason)


def write_reason(command, name: str, reason: str) -> None:
    in_source = getattr(command, "editable_mode", False) or getattr(command, "was_inplace", False)
    root = Path(".") if in_source else Path(command.build_lib)
    target = root / REASON_FILES[name]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(reason + "\n")
    print(f"fused_kd: without {name}, {reason}")


def find_torch() -> None:
    """Let an isolated build import torch from the environment that it builds for.

    pip runs such a build with the environment's own Python, but without its site-packages on
    sys.path. They are appended here, so that the build's own packages come first.
    """
    if importlib.util.find_spec("torch") is not None:
        return
    for folder in site.getsitepackages():
        site.addsitedir(folder)
    if sys.prefix == sys.base_prefix:  # a virtual environment does not see the user's packages
        site.addsitedir(site.getusersitepackages())


def decide() -> tuple[list[Extension], dict[str, str]]:
    """The modules to build, and why not the others."""
    extensions, reasons = [], {}
    for name, variable, make in (
        ("_cuda", "FUSED_KD_CUDA", cuda_extension),
        ("_C", "FUSED_KD_BUILD", cpu_extension),
    ):
        for off in (variable, "FUSED_KD_BUILD"):
            if wanted(off) == "0" and wanted(variable) != "1":
                reasons[name] = f"{off}=0 when it was installed"
                break
        if name in reasons:
            continue
        try:
            extensions.append(make())
        except cuda_objects.Unusable as error:
            raise SystemExit(str(error)) from None
        except (ImportError, LookupError) as error:
            if wanted(variable) == "1":
                raise
            hint = ": install that first" * isinstance(error, ImportError)
            reasons[name] = f"{error} when it was built{hint}"
    return extensions, reasons


find_torch()
if "cuda_objects" in sys.argv[1:]:  # builds no module
    EXTENSIONS, NOT_BUILT = [], {}
else:
    for path in REASON_FILES.values():
        Path(path).unlink(missing_ok=True)
    EXTENSIONS, NOT_BUILT = decide()
setup(
    ext_modules=EXTENSIONS,
    cmdclass={
        "build_ext": BuildExtension,
        "build_py": BuildPython,
        "cuda_objects": CompileObjects,
    },
    distclass=WithoutMetadata if IS_OLD else Distribution,
)
