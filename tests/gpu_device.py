"""What the tests marked ``gpu`` share: the device, its backends, and the error rule on it.

GPU_CHECK_DEVICE=cpu runs them on the CPU at tiny sizes, its backend standing in for both of the
GPU's, to see that they run; GPU_CHECK_BACKENDS names those of a GPU to test (default: all);
GPU_CHECK_UNTIL is the time after which those left are skipped. Nothing here needs hypothesis.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not installed

from benchmarks.device import backends
from fused_kd import kd_loss
from fused_kd.options import KDOptions
from fused_kd.testing import (
    Inputs,
    Result,
    assert_obeys_error_rule,
    conditioning,
    eager_kd_loss,
    error_rule,
    evaluate,
    make_inputs,
)

DEVICE = os.environ.get("GPU_CHECK_DEVICE", "cuda")
REAL = DEVICE == "cuda"
_UNTIL = float(os.environ.get("GPU_CHECK_UNTIL", "inf"))

_WANTED = os.environ.get("GPU_CHECK_BACKENDS", "").split()
BACKENDS = [
    pytest.param(name, marks=[pytest.mark.skip(reason=f"backend {name}: {why}")] if why else [])
    for name, why in backends(DEVICE).items()
    if not _WANTED or name in _WANTED
]
SINGLE, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
Made = tuple[Tensor, Tensor, Tensor]
_Test = TypeVar("_Test", bound=Callable[..., None])
_Value = TypeVar("_Value")


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """Skips where the time is up, and leaves no memory behind."""
    if time.time() > _UNTIL:
        pytest.skip("left out: the time for the tests is up")
    yield
    if REAL:
        torch.cuda.empty_cache()


def heavy(test: _Test) -> _Test:
    """One at a time, where several tests run at once: it needs gigabytes of the device."""
    if importlib.util.find_spec("xdist") is None:  # no such marker without it
        return test
    return pytest.mark.xdist_group("heavy")(test)


def size(real: int, tiny: int) -> int:
    return real if REAL else tiny


def few_here(values: Iterable[_Value]) -> list[_Value]:
    """All of them on a GPU; the last where it is only to be seen that the tests run."""
    every = list(values)
    return every if REAL else every[-1:]


def made(*shape: int, dtype: torch.dtype = BRAIN, teacher_dtype: torch.dtype | None = None) -> Made:
    """Logits like a language model's and labels, the first of them ignored; on the device."""
    generator = torch.Generator(DEVICE).manual_seed(shape[-1])
    kinds = {"generator": generator, "device": DEVICE}
    student = 3 * torch.randn(shape, **kinds)  # type: ignore[call-overload]
    teacher = student + 2 * torch.randn(shape, **kinds)  # type: ignore[call-overload]
    labels = torch.randint(shape[-1], shape[:-1], **kinds)  # type: ignore[call-overload]
    labels.view(-1)[0] = -100
    return student.to(dtype).requires_grad_(), teacher.to(teacher_dtype or dtype), labels


def loss_of(*inputs: Tensor, **keywords: Any) -> Tensor:
    result = kd_loss(*inputs, **keywords)  # type: ignore[misc]
    assert isinstance(result, Tensor)
    return result


def gradient(loss: Tensor, student: Tensor, *upstream: Tensor, **keywords: Any) -> Tensor:
    return torch.autograd.grad(loss, student, *upstream, **keywords)[0]


def both(student: Tensor, *rest: Tensor, **keywords: Any) -> tuple[Tensor, Tensor]:
    """Loss and gradient."""
    loss = loss_of(student, *rest, **keywords)
    return loss.detach(), gradient(loss, student, torch.ones_like(loss))


def same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> bool:
    """Bit for bit; these have no NaN."""
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


class _Output(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        return upstream[0]


def as_output(logits: Tensor) -> Tensor:
    """The same memory, as what a layer computed: it may be written in place."""
    result: Tensor = _Output.apply(logits)  # type: ignore[no-untyped-call]
    return result


@contextlib.contextmanager
def no_synchronization() -> Iterator[None]:
    """Waiting for the device is an error."""
    if not REAL:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# -------------------------------------------------------------------------------- the error rule


def _on_device(student: Tensor, teacher: Tensor, labels: Tensor, **keywords: Any) -> Any:
    if keywords["backend"] == "reference":
        return kd_loss(student, teacher, labels, **keywords)
    moved = (x.to(DEVICE) for x in (student, teacher, labels))
    return loss_of(*moved, **keywords).cpu()


def obey(
    backend: str,
    regime: str,
    shape: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    **keywords: Any,
) -> None:
    """The error rule as it stands, truth and baseline on the CPU, only our call on the device."""
    inputs = make_inputs(regime, *shape, *dtypes)
    upstream = torch.tensor([1.0, -0.3, 2.0, 1e-3])[: shape[0]]
    if dtypes[0] == HALF:  # a loss scale, or the gradient is below float16's numbers
        upstream = 1024 * upstream
    keywords = {"label_smoothing": 0.1, "beta": 0.3, **keywords}
    with mock.patch.object(error_rule, "kd_loss", _on_device):
        assert_obeys_error_rule(inputs, upstream, backend=backend, **keywords)


def obey_on_device(
    rows: Tensor | None,  # (N,), None: not looked at
    grad: Tensor,  # (N, V)
    inputs: Made,
    upstream: Tensor,  # (N,)
    block: int = 64,
    **keywords: Any,
) -> None:
    """The error rule for many rows: truth and baseline on the device, some rows at a time."""
    student, teacher, labels = (x.detach() for x in inputs)
    options = KDOptions(**keywords)
    for start in range(0, len(labels), block):
        here = slice(start, start + block)
        part, weights = Inputs(student[here], teacher[here], labels[here]), upstream[here]
        double = Inputs(part.student.double(), part.teacher.double(), part.labels)
        truth = evaluate(kd_loss, double, weights, backend="reference", **keywords)
        eager = evaluate(eager_kd_loss, part, weights, **keywords)
        unit = conditioning(part, truth, weights, options)
        assert truth.grad.isfinite().all()
        assert eager.grad.isfinite().all()
        if rows is not None:
            error, allowed = (rows[here].double() - truth.rows).abs(), eager.rows - truth.rows
            assert (error <= 2 * allowed.abs() + 4 * unit.loss).all(), f"loss, rows from {start}"
        _gradients_obey(grad[here], truth, eager, unit, f"gradient, rows from {start}")


def _gradients_obey(got: Tensor, truth: Result, eager: Result, unit: Any, what: str) -> None:
    info = torch.finfo(got.dtype)
    tiny = info.smallest_normal * (info.eps / 2 if got.dtype == HALF else 1.0)
    error, allowed = (
        torch.where(unit.clear, x.double() - truth.grad, 0.0) for x in (got, eager.grad)
    )
    floor = 4 * unit.grad + unit.undetermined + tiny
    worst = allowed.abs().amax(1)
    assert (error.abs().amax(1) <= 2 * worst + floor).all(), what
    norm = torch.maximum(1.25 * allowed.norm(dim=1), 2 * worst)
    floor = floor + unit.undetermined_norm + tiny * math.sqrt(got.shape[1])
    assert (error.norm(dim=1) <= norm + floor).all(), f"{what}, in norm"
