"""The CUDA toolkit: the path of nvcc, its commands, the runtime to link. Needs no torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from kernel_sources import CUDA_ARCHITECTURES, NVCC_FLAGS

ARCHITECTURES = "TORCH_CUDA_ARCH_LIST"


def architectures() -> str:
    """Return the architectures to compile for, as in TORCH_CUDA_ARCH_LIST."""
    return os.environ.get(ARCHITECTURES) or CUDA_ARCHITECTURES


def find_nvcc() -> str:
    """Return the compiler's path: from CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda.

    Raises:
        SystemExit: No nvcc was found.
    """
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    for folder in (*(f"{home}/bin" for home in homes if home), None, "/usr/local/cuda/bin"):
        path = shutil.which("nvcc", path=folder)
        if path is not None:
            return path
    raise SystemExit(
        "no nvcc was found in CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda: install the CUDA "
        "toolkit, or set CUDA_HOME to its folder"
    )


def version(nvcc: str) -> str:
    """Return the toolkit's version, as in "13.0".

    Raises:
        LookupError: The compiler does not print one.
    """
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    match = re.search(r"release (\d+\.\d+)", done.stdout)
    if match is None:
        raise LookupError(f"nvcc --version printed no version: {done.stdout} {done.stderr}")
    return match.group(1)


def compile_command(nvcc: str, source: str, target: str, jobs: int) -> list[str]:
    """Return the command that compiles a kernel file for every architecture.

    Args:
        nvcc: the compiler's path.
        source: the kernel file.
        target: the object.
        jobs: number of architectures that are compiled at the same time.

    Raises:
        RuntimeError: TORCH_CUDA_ARCH_LIST is malformed.
    """
    codes = []
    for item in architectures().replace(";", " ").split():
        arch = item.removesuffix("+PTX").replace(".", "")
        if not re.fullmatch(r"\d+[af]?", arch):
            raise RuntimeError(f"{ARCHITECTURES} must be like '8.0;9.0+PTX'; got {item!r}")
        codes.append(f"-gencode=arch=compute_{arch},code=sm_{arch}")
        if item.endswith("+PTX"):
            codes.append(f"-gencode=arch=compute_{arch},code=compute_{arch}")
    if len(codes) > 1:
        codes.append(f"--threads={jobs}")
    host = "-Xcompiler=-fPIC,-fvisibility=hidden"
    return [nvcc, *NVCC_FLAGS, host, *codes, "-c", source, "-o", target]


def library_folders(nvcc: str) -> list[str]:
    """Return the library folders that nvcc passes to the linker; [] if it prints none."""
    done = subprocess.run([nvcc, "--dryrun", "none.cu"], capture_output=True, text=True)
    line = next((x for x in done.stderr.splitlines() if "LIBRARIES=" in x), "")
    return re.findall(r"-L([^\s\"]+)", line)


def runtime_folder(torch: Path, major: str) -> str:
    """Return the folder of the CUDA runtime that torch's wheel, or one that it requires, contains.

    Args:
        torch: the folder of the installed package.
        major: of the CUDA version, as in "13".

    Raises:
        LookupError: No runtime was found.
    """
    for pattern in (f"lib/libcudart*.so.{major}", f"../nvidia/*/lib/libcudart.so.{major}"):
        for path in torch.glob(pattern):
            return str(path.parent)
    raise LookupError(
        f"no CUDA runtime was found (a toolkit, or libcudart.so.{major} next to torch)"
    )
