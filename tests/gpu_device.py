"""What the tests marked ``gpu`` share: the device, its backends, and the error rule on it.

GPU_CHECK_DEVICE=cpu runs the tests on the CPU at tiny sizes, with the cpu backend in place of both
GPU backends, to check that they run; GPU_CHECK_BACKENDS names the GPU backends to test (default:
both).
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar
from unittest import mock

import pytest
import torch
from support.logits import gradient
from torch import Tensor

from benchmarks.problems import Output
from fused_kd import Head, kd_loss
from fused_kd.backends import why_not
from fused_kd.options import KDOptions
from fused_kd.testing import (
    Inputs,
    assert_obeys_error_rule,
    conditioning,
    cpu_peak,
    eager_kd_loss,
    error_rule,
    evaluate,
    make_inputs,
)

DEVICE = os.environ.get("GPU_CHECK_DEVICE", "cuda")
REAL = DEVICE == "cuda"
SINGLE, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
MIB = 2**20
Batch = tuple[Tensor, Tensor, Tensor]
_Value = TypeVar("_Value")


NAMED = os.environ.get("GPU_CHECK_BACKENDS", "").split()
WANTED = (NAMED or ["cuda", "triton"]) if REAL else ["cpu"]
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(why is not None, reason=f"{name}: {why}"))
    for name in WANTED
    for why in [why_not(name, DEVICE)]
]
#: Marks a test that needs gigabytes of the device: pytest-xdist runs one of these at a time.
heavy: Callable[[_Value], _Value] = (
    pytest.mark.xdist_group("heavy") if importlib.util.find_spec("xdist") else lambda test: test
)


def size(real: int, tiny: int) -> int:
    return real if REAL else tiny


def few_here(values: Iterable[_Value]) -> list[_Value]:
    """Return all values on a GPU; elsewhere the last one, to check that the tests run."""
    return list(values)[0 if REAL else -1 :]


def make_batch(*shape: int, dtype: torch.dtype = BRAIN) -> Batch:
    """Return logits of a student, which requires grad, and of a teacher near it, and labels.

    The first label is -100. The vocabulary size is the seed.
    """
    generator = torch.Generator(DEVICE).manual_seed(shape[-1])
    kinds: dict[str, Any] = {"generator": generator, "device": DEVICE}
    student = 3 * torch.randn(shape, **kinds)
    teacher = student + 2 * torch.randn(shape, **kinds)
    labels = torch.randint(shape[-1], shape[:-1], **kinds)
    labels.view(-1)[0] = -100
    return student.to(dtype).requires_grad_(), teacher.to(dtype), labels


def loss_of(*sides: Tensor | Head, **keywords: Any) -> Tensor:
    result = kd_loss(*sides, **keywords)  # type: ignore[arg-type]
    assert isinstance(result, Tensor)
    return result


def both(student: Tensor, *rest: Tensor, **keywords: Any) -> tuple[Tensor, Tensor]:
    """Return the loss, and the gradient of its sum with respect to the student."""
    loss = loss_of(student, *rest, **keywords)
    return loss.detach(), gradient(loss, student, torch.ones_like(loss))


def same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> bool:
    """Return True if all pairs of tensors have equal values; a NaN equals nothing."""
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def as_output(logits: Tensor) -> Tensor:
    """Return the logits, in their memory, as a layer's output, which inplace=True may overwrite."""
    result: Tensor = Output.apply(logits)
    return result


@contextlib.contextmanager
def no_synchronization(enabled: bool) -> Iterator[None]:
    """Raise within the context, if `enabled`, when the host waits for a GPU."""
    mode = torch.cuda.get_sync_debug_mode() if REAL else 0
    if REAL and enabled:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if REAL:
            torch.cuda.set_sync_debug_mode(mode)


def peak_bytes(call: Callable[[], object]) -> int:
    """Call twice; return the peak of the bytes that the second call allocates."""
    call()
    if not REAL:
        return cpu_peak(call).highest
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


# -------------------------------------------------------------------------------- the error rule


def _on_device(student: Tensor, teacher: Tensor, labels: Tensor, **keywords: Any) -> Any:
    if keywords["backend"] == "reference":
        return kd_loss(student, teacher, labels, **keywords)
    return loss_of(*(x.to(DEVICE) for x in (student, teacher, labels)), **keywords).cpu()


def obey(
    backend: str,
    regime: str,
    shape: tuple[int, int],
    dtypes: Iterable[torch.dtype],
    **keywords: Any,
) -> None:
    """Assert the error rule for inputs of a regime, shape (N <= 4, V) and dtypes of both sides.

    Truth and baseline are computed on the CPU, only our loss on the device.
    """
    obey_for(backend, make_inputs(regime, *shape, *dtypes), **keywords)


def obey_for(backend: str, inputs: Inputs, **keywords: Any) -> None:
    """Assert the error rule for inputs of up to 4 rows; the teacher may be a TopK."""
    upstream = torch.tensor([1.0, -0.3, 2.0, 1e-3])[: len(inputs.labels)]
    if inputs.student.dtype == HALF:  # a loss scale, or the gradient is below float16's numbers
        upstream = 1024 * upstream
    keywords = {"label_smoothing": 0.1, "beta": 0.3, **keywords}
    with mock.patch.object(error_rule, "kd_loss", _on_device):
        assert_obeys_error_rule(inputs, upstream, backend=backend, **keywords)


def obey_on_device(
    rows: Tensor | None,  # (N,) losses; None: not compared
    grad: Tensor,  # (N, V)
    inputs: Batch,
    upstream: Tensor,  # (N,)
    **keywords: Any,
) -> None:
    """Assert the error rule for our `rows` and `grad`, 64 rows at a time on the device."""
    student, teacher, labels = (x.detach() for x in inputs)
    info = torch.finfo(grad.dtype)
    tiny = info.smallest_normal * (info.eps / 2 if grad.dtype == HALF else 1.0)
    for start in range(0, len(labels), 64):
        chunk, what = slice(start, start + 64), f"of rows from {start}"
        part, weights = Inputs(student[chunk], teacher[chunk], labels[chunk]), upstream[chunk]
        double = Inputs(part.student.double(), part.teacher.double(), part.labels)
        truth = evaluate(kd_loss, double, weights, backend="reference", **keywords)
        eager = evaluate(eager_kd_loss, part, weights, **keywords)
        unit = conditioning(part, truth, weights, KDOptions(**keywords))
        assert truth.grad.isfinite().all()
        assert eager.grad.isfinite().all()
        if rows is not None:
            error, allowed = (rows[chunk].double() - truth.rows).abs(), eager.rows - truth.rows
            assert (error <= 2 * allowed.abs() + 4 * unit.loss).all(), f"loss {what}"
        error, allowed = (
            torch.where(unit.clear, x.double() - truth.grad, 0.0) for x in (grad[chunk], eager.grad)
        )
        floor, worst = 4 * unit.grad + unit.undetermined + tiny, allowed.abs().amax(1)
        assert (error.abs().amax(1) <= 2 * worst + floor).all(), f"gradient {what}"
        norm = torch.maximum(1.25 * allowed.norm(dim=1), 2 * worst)
        floor = floor + unit.undetermined_norm + tiny * math.sqrt(grad.shape[1])
        assert (error.norm(dim=1) <= norm + floor).all(), f"gradient {what}, in norm"
