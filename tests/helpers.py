"""What several test files share: inputs, single terms, comparisons."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_kd import KDLossParts, kd_loss, testing

INF, NAN = math.inf, math.nan
N, V = 6, 23

# float32 and bfloat16: gradient in the forward; float16: in the backward
DTYPES = list(testing.DTYPES.values())
# rounding of the gradient's dtype, and of float32 sums that differ in order
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-7},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-7},
    torch.float16: {"rtol": 2**-10, "atol": 2**-24},
}


def make(*leading: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher and labels of some rows; the student is a leaf that requires grad."""
    shape = leading or (N,)
    student = torch.randn(*shape, V).to(dtype).requires_grad_()
    return student, torch.randn(*shape, V).to(dtype), torch.randint(V, shape)


def make_ignored(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """The same; the first row is ignored."""
    student, teacher, labels = make(dtype=dtype)
    labels[0] = -100
    return student, teacher, labels


def grown(*shape: int) -> Tensor:
    """A tensor that requires grad and is not a leaf."""
    return torch.randn(*shape, requires_grad=True) * 1.0


def as_loss(result: Tensor | KDLossParts) -> Tensor:
    """The loss of a call without return_parts."""
    assert isinstance(result, Tensor)
    return result


def gradient(loss: Tensor, student: Tensor, *upstream: Tensor, **keywords: Any) -> Tensor:
    return torch.autograd.grad(loss, student, *upstream, **keywords)[0]


def check(got: Any, want: Tensor, student: Tensor) -> None:
    """Loss and gradient agree to float32 rounding."""
    assert isinstance(got, Tensor)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(got.shape)
    ours, theirs = gradient(got, student, upstream), gradient(want, student, upstream)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def logits(*rows: list[float], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(rows, dtype=dtype)


def soft(student: Tensor, teacher: Tensor, **keywords: object) -> Tensor:
    """The soft term of every row, alone."""
    options = {"hard_weight": 0, "soft_weight": 1, "reduction": "none", "backend": "reference"}
    return kd_loss(student, teacher, **{**options, **keywords})  # type: ignore[arg-type,return-value]


def hard(student: Tensor, teacher: Tensor, labels: Tensor, **keywords: object) -> Tensor:
    """The hard term of every row, alone."""
    options = {"hard_weight": 1, "soft_weight": 0, "reduction": "none", "backend": "reference"}
    return kd_loss(student, teacher, labels, **{**options, **keywords})  # type: ignore[arg-type,return-value]


def value_and_gradient(
    term: Callable[..., Tensor], student: Tensor, *others: Tensor, **keywords: object
) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    value = term(leaf, *others, **keywords)
    value.sum().backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad
