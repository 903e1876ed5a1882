"""The backends that are tested against the reference, and values and gradients of one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_kd import kd_loss
from fused_kd.backends import why_not
from fused_kd.options import BACKENDS, Formula, KDOptions, temperature_tensor


def _parameter(name: str) -> Any:
    reason = why_not(name, "cpu")
    marks = [pytest.mark.skip(reason=f"backend {name}: {reason}")] if reason else []
    return pytest.param(name, marks=marks)


#: For CPU tensors: one that cannot run is skipped with its reason; a GPU's backend joins in where
#: it runs on them (an interpreter).
FAST = [
    _parameter(name)
    for name in BACKENDS
    if name == "cpu" or (name != "reference" and why_not(name, "cpu") is None)
]
HERE = ["reference", *FAST]
needs_cpu = pytest.mark.skipif(
    why_not("cpu", "cpu") is not None, reason=f"backend cpu: {why_not('cpu', 'cpu')}"
)


def formula_of(**keywords: Any) -> Formula:
    """Return what a row kernel computes for keywords of kd_loss."""
    options = KDOptions(**keywords)
    temperature = temperature_tensor(options)
    return Formula(
        options.divergence, temperature, options.beta, options.soft_scale, options.label_smoothing
    )


@contextmanager
def threads(number: int) -> Iterator[None]:
    """So many threads in torch, and the former number afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def one_thread() -> AbstractContextManager[None]:
    """Small tensors are fastest so, above all beside other work."""
    return threads(1)


def rows_and_gradient(
    student: Tensor, teacher: Tensor | None, labels: Tensor | None = None, **keywords: Any
) -> tuple[Tensor, Tensor]:
    """Every row's loss and the gradient of their plain sum."""
    leaf = student.detach().clone().requires_grad_()
    rows = kd_loss(leaf, teacher, labels, reduction="none", **keywords)
    assert isinstance(rows, Tensor)
    (gradient,) = torch.autograd.grad(rows, leaf, torch.ones_like(rows))
    return rows.detach(), gradient


def scalar_and_gradient(
    student: Tensor, teacher: Tensor, labels: Tensor | None = None, **keywords: Any
) -> tuple[Tensor, Tensor]:
    """The reduced loss and its gradient, made in the forward (not for float16)."""
    leaf = student.detach().clone().requires_grad_()
    loss = kd_loss(leaf, teacher, labels, **keywords)
    assert isinstance(loss, Tensor)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def truth(
    student: Tensor, teacher: Tensor, labels: Tensor | None = None, **keywords: Any
) -> tuple[Tensor, Tensor]:
    """`rows_and_gradient` of the float64 reference."""
    keywords["backend"] = "reference"
    return rows_and_gradient(student.double(), teacher.double(), labels, **keywords)
