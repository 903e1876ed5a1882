"""``python -m benchmarks.gpu_cache``: compiles the Triton kernels of the GPU check without a GPU.

Fills gpu_check.CACHE, Triton's cache in the check, with the kernels that the smoke and the
operators' times launch. The launches are the package's own, on CPU tensors that are never read: a
stand-in for the driver names the target, and each launch ends after its compilation.

Triton keeps the paths of a cache's files: they are relative to the folder of the repository, from
which this and the check run, so that the cache is found in another place.

Triton finds a kernel by a hash of its source, the arguments' kinds, the options and of triton
itself, whose shared library differs by Python version: run this with the triton and the Python of
the machine with the GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from fused_kd.divergences import DIVERGENCES
from fused_kd.testing import DTYPES

from . import gpu_smoke, gpu_times
from .gpu_check import CACHE

#: Rows of the operators' logits: the kernels depend on whether 16 divides their number.
ROWS = 16


def main(arguments: Sequence[str] | None = None) -> int:
    """Fill the folder."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_cache", description=__doc__)
    add = parser.add_argument
    add("--capability", default="9.0", help="of the GPU (default: %(default)s)")
    add("--multiprocessors", type=int, default=132, help="of the GPU (default: %(default)s)")
    options = parser.parse_args(arguments)
    with filling(Path(CACHE), options.capability, options.multiprocessors):
        for dtype, v in gpu_times.SIZES:
            sides = torch.zeros(2, ROWS, v, dtype=DTYPES[dtype])
            for divergence in DIVERGENCES if (dtype, v) == gpu_times.SIZES[0] else DIVERGENCES[:1]:
                for _, call in gpu_times.operators(*sides, "triton", divergence).values():
                    call()
        for case in gpu_smoke.cases("cuda"):
            launch(case)
    return 0


def launch(case: gpu_smoke.Case) -> None:
    """Make the calls of a case of the smoke."""
    for _ in gpu_smoke.compute(*gpu_smoke.make(case, "cpu"), backend="triton", **case.keywords):
        pass


@contextlib.contextmanager
def filling(folder: Path, capability: str = "9.0", multiprocessors: int = 132) -> Iterator[None]:
    """Have launches of the triton backend on CPU tensors compile into a folder, and end.

    They compile what they would on a GPU of this capability.
    """
    os.environ |= {"TRITON_CACHE_DIR": str(folder), "TRITON_STORE_BINARY_ONLY": "1"}
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from fused_kd.backends import triton as backend
    from fused_kd.backends.triton import launch

    run, number = JITFunction.run, int(capability.replace(".", ""))

    def compile_only(self: Any, *arguments: Any, warmup: bool, **keywords: Any) -> Any:
        return run(self, *arguments, warmup=True, **keywords)

    of_the_gpu = {
        "can_wait": lambda _, parts: parts <= multiprocessors,
        "capability": lambda _: number,
        "multiprocessors": lambda _: multiprocessors,
    }
    stand_in = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", number, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    driver.set_active(stand_in)
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(backend, "why_not", return_value=None),
        mock.patch.multiple(launch, why_not=backend.why_not, **of_the_gpu),
    ):
        yield
    for group in folder.glob("*/__grp__*.json"):  # sources: twice as large as all else, never read
        content = json.loads(group.read_text())
        for name in [name for name in content["child_paths"] if name.endswith(".source")]:
            Path(content["child_paths"].pop(name)).unlink()
        group.write_text(json.dumps(content))


if __name__ == "__main__":
    sys.exit(main())
