"""Compile the Triton kernels for a GPU that is absent, and read the resources that they take.

The package's own code launches them, on CPU tensors that are never read: a replacement of Triton's
driver names the target, and each launch ends after its compilation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fused_kd.backends import triton as backend
from fused_kd.backends.triton import launch, measurements
from fused_kd.backends.triton.configuration import AMD, BLACKWELL, NVIDIA, may_wait
from fused_kd.divergences import DIVERGENCES
from fused_kd.ops import STATS

from .sass import usage

#: Rows of a launch: not a multiple of 16, for which Triton would specialize.
ROWS = 17


@dataclass(frozen=True)
class Variant:
    """A call of an operator on given dtypes and sizes."""

    operator: str = "forward_backward_into"  # or forward, backward_, rescale_, measure
    divergence: str | None = "forward_kl"  # None: the hard term alone
    hard: bool = True  # with the hard term
    smoothing: bool = False  # of labels
    student: torch.dtype = torch.bfloat16
    teacher: torch.dtype = torch.bfloat16
    vocabulary: int = 128256
    aligned: bool = True  # rows begin at multiples of 16 bytes
    k: int | None = None  # the teacher is a TopK of k entries; `teacher` is then ignored

    def call(self) -> None:
        """Call the operator's implementation on uninitialized CPU tensors, within `compiling`."""
        pad = 0 if self.aligned else 1
        student, teacher, gradient = (
            torch.empty(1, ROWS, self.vocabulary + pad, dtype=dtype)[..., pad:]
            for dtype in (self.student, self.teacher, self.student)
        )
        labels, weights = torch.empty(ROWS, dtype=torch.int64), torch.empty(ROWS)
        if self.operator == "measure":
            of_rows = labels, weights, torch.tensor(2.0)
            if self.k is None:
                measurements.measure(student, teacher, *of_rows)
            else:
                token_ids = torch.empty(ROWS, self.k, dtype=torch.int32)
                measurements.measure_support(student, token_ids, *of_rows)
            return
        token_ids = None
        if self.k is not None:
            teacher = torch.empty(1, ROWS, self.k + 1)
            token_ids = torch.empty(ROWS, self.k, dtype=torch.int32)
        hard = (labels, weights) if self.hard else (None, None)
        rows = (student, teacher, token_ids, *hard, weights if self.divergence else None)
        code = DIVERGENCES.index(self.divergence or "forward_kl")
        numbers = (code, torch.tensor(2.0), 0.5, True, 0.1 * self.smoothing)
        stats, scale = torch.empty(ROWS, STATS), torch.empty(())
        arguments: dict[str, tuple[Any, ...]] = {
            "forward": numbers,
            "forward_backward_into": (*numbers, gradient),
            "backward_": (stats, *numbers),
            "rescale_": (stats, *numbers, scale, gradient),
        }
        launch._IMPLEMENTATIONS[self.operator](*rows, *arguments[self.operator])


class Kernel(NamedTuple):
    """A compiled kernel."""

    registers: int
    spills: int  # bytes of local memory; AMD: also vector registers (scalars go to their lanes)
    shared: int  # bytes
    code: dict[str, Any]  # "ttgir", "ptx" or "amdgcn", "cubin"


def compile_variant(variant: Variant, target: int | str, folder: Path) -> list[Kernel]:
    """Return the kernels that a call launches, in order.

    Args:
        variant: The call.
        target: A CUDA compute capability (90) or an AMD architecture ("gfx942").
        folder: For NVIDIA's kernel.cubin, which each kernel overwrites.
    """
    # strides of 64 bits, as in a batch of more than 2^31 entries
    strides = mock.patch.object(
        launch, "_row_strides", lambda x: (2**40, 2**40 + (0 if x is None else x.stride(1)))
    )
    with strides, compiling(target) as kernels:
        variant.call()
    return [_describe(kernel, folder) for kernel in kernels]


@contextmanager
def compiling(target: int | str) -> Iterator[list[Any]]:
    """Make launches on CPU tensors only compile, for a target; yield the list of the kernels."""
    is_amd = isinstance(target, str)
    gpu = GPUTarget("hip", target, 64) if is_amd else GPUTarget("cuda", target, 32)
    stand_in = SimpleNamespace(
        get_current_target=lambda: gpu,
        get_current_device=lambda: f"{target}",  # the key of Triton's compiled kernels
        get_current_stream=lambda device: 0,
    )
    properties: dict[str, Any] = {
        "kind": lambda device: AMD if is_amd else BLACKWELL if target == 100 else NVIDIA,
        "capability": lambda device: 0 if is_amd else target,
    }
    run, kernels = JITFunction.run, []

    def compile_only(self: Any, *arguments: Any, warmup: bool, **keywords: Any) -> None:
        kernels.append(run(self, *arguments, warmup=True, **keywords))

    with (
        mock.patch.object(driver, "_active", stand_in),
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(backend, "why_not", return_value=None),
        mock.patch.multiple(
            launch,
            why_not=lambda device: None,
            can_wait=lambda device, parts: not is_amd and may_wait(),
            multiprocessors=lambda device: 132,
            **properties,
        ),
        mock.patch.multiple(measurements, **properties),
    ):
        yield kernels


def _describe(kernel: Any, folder: Path) -> Kernel:
    shared, code = int(kernel.metadata.shared), kernel.asm
    if "amdgcn" in code:
        registers, *spills = (
            int(re.findall(rf"\.{name}:\s+(\d+)", code["amdgcn"])[0])
            for name in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
        )
        return Kernel(registers, sum(spills), shared, code)
    file = folder / "kernel.cubin"
    file.write_bytes(code["cubin"])
    (resources,) = usage(file).values()
    return Kernel(resources.registers, resources.stack, shared, code)
