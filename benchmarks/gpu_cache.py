"""``python -m benchmarks.gpu_cache``: compiles the Triton kernels of the GPU check without a GPU.

Fills a folder like Triton's own cache with the binaries that the smoke and the operators' times
launch; benchmarks/triton_cache.py brings it to where it is used. The launches are the package's
own, on CPU tensors that are never read: a stand-in for the driver names the target, and each launch
ends after its compilation.

Triton finds a binary by a hash of the kernel's source, the arguments' kinds, the options and of
triton itself, whose shared library differs by Python version: run this with the triton and the
Python of the machine with the GPU.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from fused_kd.divergences import DIVERGENCES

from . import gpu_smoke
from .cases import Case
from .device import Budget
from .gpu_operators import SIZES, Operators
from .gpu_options import make_parser
from .problems import LogitsProblem
from .triton_cache import count

#: Rows of the operators' problems: Triton's binaries depend on whether 16 divides their number.
ROWS = 16


def main(arguments: Sequence[str] | None = None) -> int:
    """Fill the folder."""
    parser = make_parser("gpu_cache", __doc__, seconds=3600.0)
    add = parser.add_argument
    add("--capability", default="9.0", help="of the GPU (default: %(default)s)")
    add("--multiprocessors", type=int, default=132, help="of the GPU (default: %(default)s)")
    add("--output", type=Path, default=Path("out/gpu_cache"), metavar="DIR",
        help="default: %(default)s")  # fmt: skip
    options = parser.parse_args(arguments)
    begin, budget = time.monotonic(), Budget(options.seconds)
    cases, sizes = gpu_smoke.cases("cuda"), [Case(ROWS, v, dtype) for dtype, v in SIZES]
    with filling(options.output, options.capability, options.multiprocessors):
        for i, case in enumerate([*sizes, *cases]):
            if not budget.allows(0):
                left = len(sizes) + len(cases) - i
                print(f"LEFT OUT {left} of {len(sizes) + len(cases)}, from {case} on", flush=True)
                break
            if isinstance(case, Case):
                _operators(case)
            else:
                gpu_smoke.launch(case, "triton", "cpu")
    found = count(options.output)
    print(f"{options.output}: {found} binaries, {time.monotonic() - begin:.0f} s")
    return 0


def _operators(case: Case) -> None:
    """Launch each operator that is timed once."""
    problem = LogitsProblem(case)
    every = DIVERGENCES if (case.dtype, case.v) == SIZES[0] else DIVERGENCES[:1]
    for divergence in every:
        operators = Operators(problem, "triton", divergence)
        for call in (operators.forward_backward, operators.forward, operators.backward):
            call()
        operators.rescale(0.3)
        operators.scale(1.0)


class _Driver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability: str) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", int(capability.replace(".", "")), 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def filling(folder: Path, capability: str = "9.0", multiprocessors: int = 132) -> Iterator[None]:
    """Have launches of the triton backend on CPU tensors compile into a folder, and end.

    They compile what they would on a GPU of this capability.
    """
    folder.mkdir(parents=True, exist_ok=True)
    os.environ |= {"TRITON_CACHE_DIR": str(folder.resolve()), "TRITON_STORE_BINARY_ONLY": "1"}
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from fused_kd.backends import triton as backend
    from fused_kd.backends.triton import launch

    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> Any:
        return run(self, *arguments, grid=grid, warmup=True, **keywords)

    of_the_gpu = {
        "can_wait": lambda _, parts: parts <= multiprocessors,
        "capability": lambda _: int(capability.replace(".", "")),
        "multiprocessors": lambda _: multiprocessors,
    }
    driver.set_active(_Driver(capability))
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(backend, "why_not", return_value=None),
        mock.patch.multiple(launch, why_not=backend.why_not, **of_the_gpu),
    ):
        yield
    for path in folder.glob("*/*.source"):  # twice as large as all else, and never read
        path.unlink()


if __name__ == "__main__":
    sys.exit(main())
