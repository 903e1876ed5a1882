"""The CUDA backend on CPU tensors: its own kernels and launchers, run by tests/cuda_on_cpu."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_kd import backends
from fused_kd.classes import Classes
from fused_kd.divergences import CODES
from fused_kd.measures import Sums, Support
from fused_kd.ops import STATS
from fused_kd.options import Formula
from support.native_build import SANITIZE, compile_all, compile_one

FLAGS = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-w"]
FLAGS += ["-DFUSED_KD_CUDA_ON_CPU", "-DFUSED_KD_SMALL_SIZES", "-Itests/cuda_on_cpu"]
SOURCES = ["launch.cu", "rows_f32.cu", "rows_bf16.cu", "rows_f16.cu"]
FILES = [f"csrc/cuda/{name}" for name in SOURCES] + ["tests/cuda_on_cpu/rows_on_cpu.cpp"]
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ROWS, GRADIENT, RESCALE, SCALE = range(4)  # rows_on_cpu.cpp: what `run` launches


INT, INT64, DOUBLE = ctypes.c_int, ctypes.c_int64, ctypes.c_double
POINTER = ctypes.c_void_p


def _fields(*groups: tuple[str, Any]) -> list[tuple[str, Any]]:
    """Return the fields of a ctypes structure; a group is names separated by spaces, and a type."""
    return [(name, kind) for names, kind in groups for name in names.split()]


class _Rows(ctypes.Structure):
    _fields_ = _fields(
        ("data", POINTER), ("dtype", INT), ("inner outer_stride inner_stride", INT64)
    )


class _Problem(ctypes.Structure):
    """The struct Problem of csrc/problem.h."""

    _fields_ = _fields(
        ("N V", INT64),
        ("student teacher grad", _Rows),
        ("K", INT64),
        ("token_ids", POINTER),
        ("has_classes", ctypes.c_bool),
        ("labels w_hard w_soft scale", POINTER),
        ("divergence", INT),
        ("temperature beta soft_factor label_smoothing", DOUBLE),
        ("hard soft stats", POINTER),
    )


class _Device(ctypes.Structure):
    """The struct Device of csrc/cuda/launch.h."""

    _fields_ = _fields(("multiprocessors bytes_of_three bytes_of_two cluster", INT))


def build(folder: Path, sanitize: bool = False) -> Path:
    """Compile the CUDA backend for the CPU into a folder; return the shared library's path.

    Without a compiler it skips the test.
    """
    extra = SANITIZE if sanitize else []
    objects = [folder / f"{Path(name).stem}.o" for name in FILES]
    pairs = zip(FILES, objects, strict=True)
    compile_all([[*FLAGS, *extra, "-x", "c++", "-c", name, "-o", to] for name, to in pairs])
    library = folder / "rows_on_cpu.so"
    compile_one(*extra, "-shared", *objects, "-o", library)
    return library


class EmulatedCUDA:
    """A backend (see fused_kd.backends) for CPU tensors.

    Args:
        library: the path that `build` returned.
        capability: that of the emulated GPU; 90 or more: it has clusters.
    """

    def __init__(self, library: Path, capability: int) -> None:
        self.library = library
        self.capability = capability
        self._library = ctypes.CDLL(str(library))
        self._library.workspace.restype = ctypes.c_int64
        # a few multiprocessors, so that blocks stride over rows if they may
        self._device = _Device(8, 4096, 113 * 1024, 16 if capability >= 90 else 0)

    def why_not(self, device_type: str | None = None) -> str | None:
        return None

    def seed(self, number: int) -> None:
        """Set the seed of the order in which threads and blocks run."""
        self._library.emulator_seed(ctypes.c_uint64(number))

    def forward(self, *rows: Any) -> tuple[Tensor, Tensor, Tensor]:
        return self._losses(rows, None)

    def forward_backward(
        self, *rows: Any, inplace: bool = False, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        *rows, inplace = rows if len(rows) == 7 else (*rows, inplace)
        grad = rows[0] if inplace else out
        if grad is None:
            grad = _garbage(rows[0].shape, rows[0].dtype)
        return *self._losses(tuple(rows), grad), grad

    def backward(self, *rows: Any, inplace: bool = False) -> Tensor:
        *rows, inplace = rows if len(rows) == 8 else (*rows, inplace)
        *rows, stats, formula = rows
        grad = rows[0] if inplace else _garbage(rows[0].shape, rows[0].dtype)
        self._run(GRADIENT, _problem((*rows, formula), grad, stats=stats))
        return grad

    def rescale(self, grad: Tensor, scale: Tensor, *rows: Any) -> None:
        *rows, stats, formula = rows
        scale = scale.float().contiguous()
        self._run(RESCALE, _problem((*rows, formula), grad, stats=stats, scale=scale))

    def multiply(self, grad: Tensor, scale: Tensor) -> None:
        scale = scale.float().contiguous()
        problem = _Problem(N=grad.shape[0] * grad.shape[1], V=grad.shape[2], grad=_view(grad))
        problem.scale = scale.data_ptr()
        self._run(SCALE, problem)

    def measure(
        self, student: Tensor, teacher: Tensor, labels: Tensor, weight: Tensor, temperature: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows = student, teacher, labels, weight, weight, _measured(temperature)
        hard, soft, stats = self.forward(*rows)
        problem = _problem(rows, None, hard=hard, soft=soft, stats=stats)
        return self._measure(problem, (len(Sums._fields),), (2,))

    def measure_support(
        self,
        student: Tensor,
        token_ids: Tensor,
        labels: Tensor,
        weight: Tensor,
        temperature: Tensor,
    ) -> tuple[Tensor, Tensor]:
        classes = Classes(
            logits=student[..., :0], token_ids=token_ids
        )  # the teacher's logits are not read
        rows = student, classes, labels, weight, weight, _measured(temperature)
        return self._measure(_problem(rows, None), (len(Support._fields),), ())

    def _measure(
        self, problem: _Problem, columns: tuple[int, ...], sides: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        sums = _garbage((problem.N, *columns), torch.float32)
        largest = torch.zeros((problem.N, *sides), dtype=torch.int64)
        if problem.N > 0:
            error = self._library.measure(
                ctypes.byref(problem), POINTER(sums.data_ptr()), POINTER(largest.data_ptr())
            )
            assert error == 0, error
        return sums, largest

    def workspace(self, *rows: Any) -> int:
        """Return the bytes of global memory in which blocks exchange records; a cluster needs 0."""
        problem = _problem(rows, rows[0])
        return int(self._library.workspace(ctypes.byref(problem), ctypes.byref(self._device)))

    def _losses(self, rows: tuple[Any, ...], grad: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        count = rows[0].shape[0] * rows[0].shape[1]
        hard, soft, stats = (
            _garbage(s, torch.float32) for s in ((count,), (count,), (count, STATS))
        )
        self._run(ROWS, _problem(rows, grad, stats=stats, hard=hard, soft=soft))
        return hard, soft, stats

    def _run(self, what: int, problem: _Problem) -> None:
        if problem.N == 0:
            return
        error = self._library.run(what, ctypes.byref(problem), ctypes.byref(self._device))
        assert error == 0, error


def _garbage(shape: Any, dtype: torch.dtype) -> Tensor:
    return torch.full(tuple(shape), float("nan"), dtype=dtype)


def _measured(temperature: Tensor) -> Formula:
    return Formula("forward_kl", temperature, 0.5, "t2", 0.0)


def _view(x: Tensor | None) -> _Rows:
    if x is None:
        return _Rows(inner=1)
    return _Rows(x.data_ptr(), DTYPES[x.dtype], max(1, x.shape[1]), x.stride(0), x.stride(1))


def _problem(rows: tuple[Any, ...], grad: Tensor | None, **vectors: Tensor) -> _Problem:
    student, teacher, labels, w_hard, w_soft, formula = rows
    assert isinstance(formula, Formula)
    # as the operators demand (csrc/bindings)
    temperature = formula.temperature
    assert (temperature.shape, temperature.dtype) == ((), torch.float64)
    token_ids = None
    if isinstance(teacher, Classes):
        teacher, token_ids = teacher
    vectors |= {"token_ids": token_ids, "labels": labels, "w_hard": w_hard, "w_soft": w_soft}
    return _Problem(
        N=student.shape[0] * student.shape[1],
        V=student.shape[2],
        student=_view(student),
        teacher=_view(teacher),
        grad=_view(grad),
        K=0 if token_ids is None else token_ids.shape[1],
        has_classes=token_ids is not None,
        divergence=CODES[formula.divergence],
        temperature=temperature.item(),
        beta=formula.beta,
        soft_factor=formula.soft_factor().item(),
        label_smoothing=formula.label_smoothing,
        **{name: x.data_ptr() for name, x in vectors.items() if x is not None},
    )


@contextmanager
def installed(backend: EmulatedCUDA) -> Iterator[None]:
    # Within the context, ``backend="cuda"`` is this backend.
    before = backends._MODULES["cuda"]
    backends._MODULES["cuda"] = backend
    try:
        yield
    finally:
        backends._MODULES["cuda"] = before


def install_from_environment() -> None:
    # FUSED_KD_EMULATED_CUDA=<capability>:<library>, for this whole process.
    capability, _, library = os.environ["FUSED_KD_EMULATED_CUDA"].partition(":")
    backends._MODULES["cuda"] = EmulatedCUDA(Path(library), int(capability))
