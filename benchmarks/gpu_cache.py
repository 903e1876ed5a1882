"""``python -m benchmarks.gpu_cache``: compile the Triton kernels of the GPU check without a GPU.

The kernels that the smoke test and gpu_times launch are stored in gpu_check.CACHE, which is
Triton's cache in the check.

Triton stores the paths of a cache's files: they are relative to the repository, from which this
and the check run, so that the cache can be moved with it.

Triton finds a kernel by a hash of its source, the arguments' kinds, the options and of triton
itself, whose shared library differs by Python version: run this with the triton and the Python of
the machine with the GPU.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fused_kd.divergences import DIVERGENCES
from fused_kd.testing import DTYPES

from . import gpu_smoke, gpu_times
from .gpu_check import CACHE
from .triton_resources import compiling

#: Rows of the operators' logits: kernels depend on whether 16 divides their number.
ROWS = 16


def main() -> None:
    """Fill gpu_check.CACHE for the GPU of --capability."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_cache", description=__doc__)
    parser.add_argument("--capability", default="9.0", help="of the GPU (default: %(default)s)")
    with filling(Path(CACHE), parser.parse_args().capability):
        for dtype, v in gpu_times.SIZES:
            sides = torch.zeros(2, ROWS, v, dtype=DTYPES[dtype])
            for divergence in DIVERGENCES if (dtype, v) == gpu_times.SIZES[0] else DIVERGENCES[:1]:
                for _, call in gpu_times.operators(*sides, "triton", divergence).values():
                    call()
        for case in gpu_smoke.cases("cuda"):
            launch(case)


def launch(case: gpu_smoke.Case) -> None:
    """Make all calls of a case of gpu_smoke on CPU tensors, which `filling` only compiles."""
    for _ in gpu_smoke.compute(*gpu_smoke.make(case, "cpu"), backend="triton", **case.keywords):
        pass


@contextmanager
def filling(folder: Path, capability: str = "9.0") -> Iterator[None]:
    """Make launches on CPU tensors only compile, into `folder`, which stays Triton's cache."""
    os.environ |= {"TRITON_CACHE_DIR": str(folder), "TRITON_STORE_BINARY_ONLY": "1"}
    with compiling(int(capability.replace(".", ""))):
        yield
    for group in folder.glob("*/__grp__*.json"):  # sources: two thirds of the size, never read
        content = json.loads(group.read_text())
        for name in [name for name in content["child_paths"] if name.endswith(".source")]:
            Path(content["child_paths"].pop(name)).unlink()
        group.write_text(json.dumps(content))


if __name__ == "__main__":
    main()
