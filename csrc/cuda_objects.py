"""Objects of the CUDA kernels compiled beforehand, and the stamp that says what they are.

The kernel files need neither torch nor Python, so they can be compiled on another machine than the
module is linked on. A folder of objects holds <name>.o for each csrc/cuda/<name>.cu, and a stamp:
the compiler, the architectures, and a fingerprint of what each object was compiled from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

STAMP = "objects.json"
VARIABLE = "FUSED_KD_CUDA_OBJECTS"
HINT = "make gpu-objects compiles them"


class Unusable(Exception):
    """A folder of objects does not hold what the sources ask for; the message names the file."""


class Objects(NamedTuple):
    """Objects that were found to be what the sources ask for."""

    files: list[str]
    architectures: str


def fingerprint(source: str, flags: Sequence[str]) -> str:
    """Return a hash of a kernel file, of every header that it can include, and of the flags."""
    path = Path(source)
    headers = [x for folder in (path.parent, path.parent.parent) for x in folder.glob("*.*h")]
    found = hashlib.sha256(repr(list(flags)).encode())
    for each in (path, *sorted(headers)):
        found.update(each.name.encode() + each.read_bytes())
    return found.hexdigest()


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
        seconds: what each file took.
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
    """Return the objects of these sources.

    Args:
        folder: what FUSED_KD_CUDA_OBJECTS names.
        sources: the kernel files.
        flags: of the compiler, without architectures.
        cuda: the version of CUDA that torch is built for; the major number must be the compiler's.
        architectures: as in TORCH_CUDA_ARCH_LIST; "" accepts any.

    Raises:
        Unusable: One is missing, or was compiled from other sources, by another compiler or for
            other architectures; the message names it.
    """
    stamp = _stamp(folder)
    if stamp["nvcc"].split(".")[0] != cuda.split(".")[0]:
        raise Unusable(
            f"{VARIABLE}: {folder} was compiled by nvcc {stamp['nvcc']}; torch is built for "
            f"CUDA {cuda}"
        )
    if architectures and _items(architectures) != _items(stamp["architectures"]):
        raise Unusable(
            f"{VARIABLE}: {folder} was compiled for {stamp['architectures']}; "
            f"TORCH_CUDA_ARCH_LIST is {architectures}"
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
        found: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise Unusable(f"{VARIABLE}: {path} is missing: {HINT}") from None
    return found


def _items(architectures: str) -> list[str]:
    return sorted(architectures.replace(";", " ").split())
