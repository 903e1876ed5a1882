"""CUDA kernels compiled beforehand: a folder of objects, and the stamp that identifies them.

The kernel files need neither torch nor Python, so they can be compiled on another machine than the
module is linked on. A folder of objects holds <name>.o for each csrc/cuda/<name>.cu, and a stamp:
the compiler, the architectures, and a fingerprint of what each object was compiled from.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import cuda_toolkit
from kernel_sources import CUDA_KERNELS, NVCC_FLAGS, ROOT

STAMP = "objects.json"
VARIABLE = "FUSED_KD_CUDA_OBJECTS"
HINT = "make gpu-objects compiles them"


class Unusable(Exception):
    """The error for a folder that lacks an object of the present sources; its message names it."""


class Objects(NamedTuple):
    """Objects that match the present sources."""

    files: list[str]  # paths
    architectures: str  # that they were compiled for, as in TORCH_CUDA_ARCH_LIST


def compile_all(folder: Path, spawn: Callable[[list[str]], object], jobs: int) -> None:
    """Compile every kernel file into a folder, then write the stamp.

    Args:
        folder: created if it does not exist.
        spawn: runs a command, and raises if it fails.
        jobs: number of files, and of architectures of a file, that are compiled at the same time.

    Raises:
        SystemExit: No nvcc was found.
        RuntimeError: TORCH_CUDA_ARCH_LIST is malformed.
    """
    nvcc = cuda_toolkit.find_nvcc()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STAMP).unlink(missing_ok=True)  # until all are there
    seconds = {}

    def compile_one(source: str) -> None:
        begin = time.monotonic()
        target = folder / f"{Path(source).stem}.o"
        spawn(cuda_toolkit.compile_command(nvcc, str(ROOT / source), str(target), jobs))
        seconds[Path(source).name] = round(time.monotonic() - begin, 1)
        print(f"{source}: {seconds[Path(source).name]} s", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(compile_one, CUDA_KERNELS))
    version, architectures = cuda_toolkit.version(nvcc), cuda_toolkit.architectures()
    sources = [str(ROOT / source) for source in CUDA_KERNELS]
    write_stamp(folder, sources, NVCC_FLAGS, version, architectures, seconds)
    print(f"{folder}: for {architectures}, by nvcc {version}", flush=True)


def fingerprint(source: str, flags: Sequence[str]) -> str:
    """Return a hash of a kernel file, of every header that it can include, and of the flags."""
    path = Path(source)
    headers = [x for folder in (path.parent, path.parent.parent) for x in folder.glob("*.*h")]
    digest = hashlib.sha256(repr(list(flags)).encode())
    for each in (path, *sorted(headers)):
        digest.update(each.name.encode() + each.read_bytes())
    return digest.hexdigest()


def write_stamp(
    folder: Path,
    sources: Sequence[str],
    flags: Sequence[str],
    nvcc: str,
    architectures: str,
    seconds: dict[str, float],
) -> None:
    """Write the stamp of a folder whose objects were just compiled.

    Args:
        folder: holds the objects.
        sources: the kernel files.
        flags: of the compiler, without architectures.
        nvcc: the compiler's version, as in "13.0".
        architectures: as in TORCH_CUDA_ARCH_LIST.
        seconds: compile time of each file.
    """
    content = {
        "nvcc": nvcc,
        "architectures": architectures,
        "sources": {Path(source).name: fingerprint(source, flags) for source in sources},
        "seconds": seconds,
    }
    (folder / STAMP).write_text(json.dumps(content, indent=1) + "\n")


def find(
    folder: Path, sources: Sequence[str], flags: Sequence[str], cuda: str, architectures: str
) -> Objects:
    """Return the paths of these sources' objects, and their architectures.

    Args:
        folder: the value of FUSED_KD_CUDA_OBJECTS.
        sources: the kernel files.
        flags: of the compiler, without architectures.
        cuda: the version of CUDA that torch is built for; the major number must be the compiler's.
        architectures: as in TORCH_CUDA_ARCH_LIST; "" accepts any.

    Raises:
        Unusable: An object is missing, or was compiled from other sources, by another compiler or
            for other architectures; the message names it.
    """
    stamp = _stamp(folder)
    if stamp["nvcc"].split(".")[0] != cuda.split(".")[0]:
        raise Unusable(
            f"{VARIABLE}: {folder} was compiled by nvcc {stamp['nvcc']}; torch is built for "
            f"CUDA {cuda}: compile it again by an nvcc of that version"
        )
    if architectures and _items(architectures) != _items(stamp["architectures"]):
        raise Unusable(
            f"{VARIABLE}: {folder} was compiled for {stamp['architectures']}; "
            f"TORCH_CUDA_ARCH_LIST is {architectures}: compile it again, or unset the variable"
        )
    files = []
    for source in sources:
        file = folder / f"{Path(source).stem}.o"
        if not file.exists():
            raise Unusable(f"{VARIABLE}: {file} is missing: {HINT}")
        if stamp["sources"].get(Path(source).name) != fingerprint(source, flags):
            raise Unusable(
                f"{VARIABLE}: {file} is stale: {source}, a header or the flags have changed "
                f"since: {HINT}"
            )
        files.append(str(file))
    return Objects(files, stamp["architectures"])


def _stamp(folder: Path) -> dict[str, Any]:
    path = folder / STAMP
    try:
        stamp: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise Unusable(f"{VARIABLE}: {path} is missing: {HINT}") from None
    return stamp


def _items(architectures: str) -> list[str]:
    return sorted(architectures.replace(";", " ").split())
