"""Build the optional compiled modules: fused_kd._C (CPU) and fused_kd._cuda (CUDA devices).

Everything declarative is in pyproject.toml; files and flags are in csrc/kernel_sources.py. The
modules are separate, so that the CPU's does not depend on what a CUDA toolkit makes of the other.
Importing this file builds nothing. It can be run from any directory: paths that the caller names
are relative to that directory (FUSED_KD_CUDA_OBJECTS, --output of cuda_objects); options of
setuptools itself are relative to this file.

Environment: FUSED_KD_BUILD=0 skips both, =1 makes the absence of the CPU's an error; FUSED_KD_CUDA
is the same for the CUDA module, which is otherwise built if torch is a CUDA build and there is an
nvcc (no device is needed); both, FUSED_KD_BUILD=0 and FUSED_KD_CUDA=1, build the CUDA module alone.
TORCH_CUDA_ARCH_LIST names its architectures; FUSED_KD_CUDA_OBJECTS names a folder of its kernels
compiled beforehand, by `python setup.py cuda_objects --output FOLDER`, which needs nvcc but no
torch. MAX_JOBS caps parallel compilation; DEBUG=1 builds with assertions and symbols;
FUSED_KD_SANITIZE=1 builds the CPU's with the address and undefined-behaviour sanitizers.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import site
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Distribution, Extension, __version__, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc"))  # pip puts nothing on the path

import cuda_objects
import cuda_toolkit
import kernel_sources

ROOT = kernel_sources.ROOT
CALLER = Path.cwd()  # `main` changes the current directory
#: Module: the file that says why it is missing.
REASON_FILES = {
    "_C": ROOT / "fused_kd/_not_built.txt",
    "_cuda": ROOT / "fused_kd/_cuda_not_built.txt",
}
# Older ones do not know the license field of pyproject.toml. 0 is a copy without metadata.
IS_OLD = 0 < int(__version__.split(".")[0]) < 77
#: Commands that need no metadata.
COMPILING = {"build_ext", "cuda_objects"}


def main() -> None:
    """Run the command on the command line, in the folder of this file.

    Raises:
        SystemExit: setuptools is too old for the command.
    """
    if IS_OLD and not COMPILING.intersection(sys.argv[1:]):
        raise SystemExit(
            f"building fused_kd needs setuptools>=77; got {__version__}: "
            "pip install --upgrade 'setuptools>=77', or compile in place with "
            "'python setup.py build_ext --inplace', which works with any version"
        )
    os.chdir(ROOT)  # setuptools reads pyproject.toml and sources from the current directory
    extensions, not_built = [], {}
    if "cuda_objects" not in sys.argv[1:]:  # which builds no module
        find_torch()
        extensions, not_built = decide()
    setup(
        ext_modules=extensions,
        not_built=not_built,
        distclass=Package,
        cmdclass={
            "build_ext": BuildExtension,
            "build_py": BuildPython,
            "cuda_objects": CompileObjects,
        },
    )


class Package(Distribution):
    """A distribution that also holds why modules are not built."""

    not_built: ClassVar[dict[str, str]] = {}  # "_C", "_cuda": the reason

    def parse_config_files(self, filenames=None, ignore_option_errors=False):
        """Skip pyproject.toml if this version of setuptools refuses it."""
        super().parse_config_files([] if IS_OLD else filenames, ignore_option_errors)


# ---------------------------------------------------------------------------- what is built


def find_torch() -> None:
    """Append the site-packages of the environment that an isolated build is for, which has torch.

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
    """Return the modules to build, and for each of the others the reason why not.

    Raises:
        SystemExit: A variable has an unknown value, or FUSED_KD_CUDA_OBJECTS cannot be used.
        ImportError: A module is demanded, and torch or pybind11 cannot be imported.
        LookupError: The CUDA module is demanded, and there is no CUDA to build for.
    """
    for path in REASON_FILES.values():
        path.unlink(missing_ok=True)
    extensions, reasons = [], {}
    for name, variable, make in (
        ("_cuda", "FUSED_KD_CUDA", cuda_extension),
        ("_C", "FUSED_KD_BUILD", cpu_extension),
    ):
        is_demanded = wanted(variable) == "1"
        off = next((x for x in (variable, "FUSED_KD_BUILD") if wanted(x) == "0"), None)
        if off and not is_demanded:
            reasons[name] = f"{off}=0 when it was built"
            continue
        try:
            extensions.append(make())
        except cuda_objects.Unusable as error:
            raise SystemExit(str(error)) from None
        except (ImportError, LookupError) as error:
            if is_demanded:
                raise
            is_absent = isinstance(error, ModuleNotFoundError)  # not: broken
            hint = f": pip install {error.name}" if is_absent else ""
            reasons[name] = f"{error} when it was built{hint}"
    return extensions, reasons


def wanted(variable: str) -> str:
    """Return "0", "1" or "": a module is refused, demanded, or built if that is possible.

    Raises:
        SystemExit: The environment variable has another value.
    """
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{variable} must be 0 or 1; got {value!r}: unset it for the default")
    return value


def cpu_extension() -> Extension:
    """Return fused_kd._C. Raises ImportError if torch or pybind11 cannot be imported."""
    if not flag("FUSED_KD_SANITIZE"):
        return extension("_C", kernel_sources.CPU_SOURCES, [])
    flags = ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"]
    flags += ["-fno-sanitize-recover=undefined"]
    link = ["-fsanitize=address,undefined"]
    return extension("_C", kernel_sources.CPU_SOURCES, [], flags=flags, link=link)


def cuda_extension() -> Extension:
    """Return fused_kd._cuda.

    Raises:
        LookupError: There is no CUDA to build for.
        ImportError: torch or pybind11 cannot be imported.
        cuda_objects.Unusable: FUSED_KD_CUDA_OBJECTS names a folder that does not fit.
    """
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    cuda = torch.version.cuda
    if cuda is None:
        raise LookupError("torch is not a CUDA build")
    given = os.environ.get(cuda_objects.VARIABLE)
    nvcc = None if CUDA_HOME is None else shutil.which("nvcc", path=f"{CUDA_HOME}/bin")
    if not given and nvcc is None:
        raise LookupError("no nvcc was found (in CUDA_HOME, or on PATH)")
    wants = cuda.split(".")[0]
    has = "none" if nvcc is None else cuda_toolkit.version(nvcc)
    is_same = has.split(".")[0] == wants
    if not given and not is_same:
        raise LookupError(f"torch is built for CUDA {wants}, the toolkit is CUDA {has}")
    sources, objects = kernel_sources.CUDA_KERNELS, []
    architectures = cuda_toolkit.architectures()
    if given:
        kernels = [str(ROOT / source) for source in sources]
        listed = os.environ.get(cuda_toolkit.ARCHITECTURES, "")
        found = cuda_objects.find(CALLER / given, kernels, kernel_sources.NVCC_FLAGS, cuda, listed)
        sources, objects, architectures = [], found.files, found.architectures
    if is_same:
        folders, runtime = cuda_toolkit.library_folders(nvcc), "cudart"
    else:
        near = Path(torch.__file__).parent
        folders, runtime = [cuda_toolkit.runtime_folder(near, wants)], f":libcudart.so.{wants}"
    return extension(
        "_cuda",
        [kernel_sources.CUDA_BINDING, *sources],
        ["c10_cuda", "torch_cuda", runtime],
        folders=folders,
        flags=["-DUSE_CUDA", f'-DFUSED_KD_ARCHITECTURES="{architectures}"'],
        objects=objects,
    )


def extension(name: str, sources: list[str], libraries: list[str], **extra: list) -> Extension:
    """Return a module of the package, linked with torch.

    Args:
        name: in the package.
        sources: relative to this file, as setuptools demands.
        libraries: in addition to torch's for the CPU.
        extra: folders (of libraries), flags, link (flags), objects.

    Raises:
        ImportError: torch or pybind11 cannot be imported.
    """
    import pybind11
    import torch
    from torch.utils import cpp_extension

    folders = [path for path in cpp_extension.library_paths() if os.path.isdir(path)]
    flags = [*kernel_sources.HOST_FLAGS, kernel_sources.TORCH_TARGET]
    flags += ["-O0", "-g"] if flag("DEBUG") else []
    flags += [f'-DFUSED_KD_TORCH_VERSION="{torch.__version__}"']
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
        depends=[str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*h")],
    )


def flag(name: str) -> bool:
    return os.environ.get(name, "0") == "1"


def jobs() -> int:
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


# -------------------------------------------------------------------------------- commands


class BuildExtension(build_ext):
    """A build_ext that compiles in parallel, with each kernel file's own flags.

    A module that is not demanded and fails to compile is left out, with the reason in its file.
    """

    def run(self) -> None:
        self.was_inplace = self.inplace  # which the command clears while it runs
        if self.inplace:
            write_reasons(self, self.distribution.not_built)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        self._compile_in_parallel()
        name = ext.name.rpartition(".")[2]
        # an older one must not stand in for one that cannot be built
        Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        try:
            super().build_extension(ext)
        except Exception as error:
            if flag("FUSED_KD_BUILD" if name == "_C" else "FUSED_KD_CUDA"):
                raise
            write_reasons(self, {name: why_it_failed(error)})

    def copy_extensions_to_source(self) -> None:
        """Skip a module that could not be built: an editable install works without it."""
        built = Path(self.build_lib)
        self.extensions = [
            e for e in self.extensions if (built / self.get_ext_filename(e.name)).exists()
        ]
        super().copy_extensions_to_source()

    def _compile_in_parallel(self) -> None:
        """Replace the compiler's loop over files by one over threads that knows .cu files."""
        if ".cu" not in self.compiler.src_extensions:
            self.compiler.src_extensions.append(".cu")

        def compile_all(sources, output_dir=None, macros=None, include_dirs=None, debug=0,
                        extra_preargs=None, extra_postargs=None, depends=None):  # fmt: skip
            _, objects, postargs, pp_opts, build = self.compiler._setup_compile(
                output_dir, macros, include_dirs, sources, depends, extra_postargs
            )
            cc_args = self.compiler._get_cc_args(pp_opts, debug, extra_preargs)

            def compile_one(item):
                obj, (source, suffix) = item
                if source.endswith(".cu"):
                    self._compile_kernels(source, obj)
                    return
                own = [*postargs, *kernel_sources.KERNEL_FLAGS.get(source, [])]
                self.compiler._compile(obj, source, suffix, cc_args, own, pp_opts)

            with ThreadPoolExecutor(jobs()) as pool:
                list(pool.map(compile_one, build.items()))
            return objects

        self.compiler.compile = compile_all

    def _compile_kernels(self, source: str, target: str) -> None:
        from torch.utils.cpp_extension import CUDA_HOME

        nvcc = f"{CUDA_HOME}/bin/nvcc"
        self.spawn(cuda_toolkit.compile_command(nvcc, source, target, jobs()))


def why_it_failed(error: Exception) -> str:
    """Return the reason as one line, with a failed command shortened to its program."""
    line = str(error).partition("\n")[0]
    program = re.search("'(.+?)'", line)
    if program and "No such file or directory" in line:
        return f"no C++ compiler was found when it was built ({program[1]}): e.g. apt install g++"
    return "compiling it failed: " + re.sub(r"Command '\['(.*?)'.*\]'", r"command '\1'", line)


class BuildPython(build_py):
    """A build_py that also writes why a compiled module is missing (:func:`write_reasons`)."""

    def run(self) -> None:
        super().run()
        write_reasons(self, self.distribution.not_built)


class CompileObjects(Command):
    """The command cuda_objects: compiles the CUDA kernels alone, for FUSED_KD_CUDA_OBJECTS."""

    description = "compile the CUDA kernels into a folder, for FUSED_KD_CUDA_OBJECTS"
    user_options: ClassVar = [("output=", "o", "the folder")]

    def initialize_options(self) -> None:
        self.output = str(ROOT / "out/gpu_objects")

    def finalize_options(self) -> None:
        self.folder = CALLER / self.output

    def run(self) -> None:
        cuda_objects.compile_all(self.folder, self.spawn, jobs())


def write_reasons(command: Command, reasons: dict[str, str]) -> None:
    """Print why modules are missing, and write it to their files in the package.

    That is the source folder for a build in place or an editable install, else the build folder.
    """
    in_source = getattr(command, "editable_mode", False) or getattr(command, "was_inplace", False)
    for name, reason in reasons.items():
        target = REASON_FILES[name]
        if not in_source:
            target = Path(command.build_lib) / target.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(reason + "\n")
        print(f"fused_kd: without {name}, {reason}")


if __name__ == "__main__":
    main()
