"""Random logits and labels, losses with their gradients, and their comparison."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_kd import kd_loss, testing

INF, NAN = math.inf, math.nan
N, V = 6, 23
SOFT: dict[str, Any] = {"hard_weight": 0, "soft_weight": 1}
HARD: dict[str, Any] = {"hard_weight": 1, "soft_weight": 0}

# float32 and bfloat16 compute the gradient in the forward, float16 in the backward
DTYPES = list(testing.DTYPES.values())
# of gradients: the rounding of their dtype, and that of float32 sums in another order
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-7},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-7},
    torch.float16: {"rtol": 2**-10, "atol": 2**-24},
}


def make(*leading: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Return random logits (*leading, V) of student and teacher, and labels (*leading).

    The student is a leaf that requires grad. Without `leading` there are N rows. Torch's global
    generator draws them.
    """
    shape = leading or (N,)
    student = torch.randn(*shape, V).to(dtype).requires_grad_()
    return student, torch.randn(*shape, V).to(dtype), torch.randint(V, shape)


def make_ignored(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Return student, teacher and labels as `make` does; the first of the N rows is ignored."""
    student, teacher, labels = make(dtype=dtype)
    labels[0] = -100
    return student, teacher, labels


def pair(*shape: int, scale: float = 2.0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return random logits of a student and of a teacher; `scale` is their standard deviation."""
    return [(scale * torch.randn(*shape)).to(dtype) for _ in range(2)]


def shifted(x: Tensor, offset: int) -> Tensor:
    """Return a copy that begins `offset` elements after a multiple of 64 bytes, between NaNs."""
    memory = torch.full((x.numel() + 64 * 3,), NAN, dtype=x.dtype)
    start = (-memory.data_ptr() % 64) // x.element_size() + 64 + offset
    view = memory[start : start + x.numel()].view(x.shape)
    return view.copy_(x)


def grown(*shape: int) -> Tensor:
    """Return a tensor that requires grad and is not a leaf."""
    return torch.randn(shape, requires_grad=True) * 1.0


def logits(*rows: list[float], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(rows, dtype=dtype)


def gradient(loss: Tensor, student: Tensor, *upstream: Tensor, **keywords: Any) -> Tensor:
    return torch.autograd.grad(loss, student, *upstream, **keywords)[0]


def rows_and_gradient(
    student: Tensor, teacher: Tensor | None, labels: Tensor | None = None, **keywords: Any
) -> tuple[Tensor, Tensor]:
    """Return every row's loss, and the gradient of their sum with respect to the student."""
    leaf = student.detach().clone().requires_grad_()
    rows = kd_loss(leaf, teacher, labels, reduction="none", **keywords)
    return rows.detach(), gradient(rows, leaf, torch.ones_like(rows))


def scalar_and_gradient(
    student: Tensor, teacher: Tensor, labels: Tensor | None = None, **keywords: Any
) -> tuple[Tensor, Tensor]:
    """Return the reduced loss and its gradient; except for float16 the forward computes both."""
    leaf = student.detach().clone().requires_grad_()
    loss = kd_loss(leaf, teacher, labels, **keywords)
    return loss.detach(), gradient(loss, leaf)


def truth(
    student: Tensor, teacher: Tensor, labels: Tensor | None = None, **keywords: Any
) -> tuple[Tensor, Tensor]:
    """Return `rows_and_gradient` by the float64 reference; `backend` is ignored."""
    keywords["backend"] = "reference"
    return rows_and_gradient(student.double(), teacher.double(), labels, **keywords)


def identical(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    """Assert that the tensors of two sequences have equal values; a NaN equals nothing."""
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def check(got: Tensor, want: Tensor, student: Tensor) -> None:
    """Assert that two losses of `student`, and their gradients, agree to float32 rounding."""
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(got.shape)
    ours, theirs = gradient(got, student, upstream), gradient(want, student, upstream)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def soft(student: Tensor, teacher: Tensor, **keywords: Any) -> Tensor:
    """Return the soft term of every row, by the reference unless `backend` is passed."""
    options = {**SOFT, "reduction": "none", "backend": "reference", **keywords}
    return kd_loss(student, teacher, **options)


def hard(student: Tensor, teacher: Tensor, labels: Tensor, **keywords: Any) -> Tensor:
    """Return the hard term of every row, by the reference unless `backend` is passed."""
    options = {**HARD, "reduction": "none", "backend": "reference", **keywords}
    return kd_loss(student, teacher, labels, **options)


def value_and_gradient(
    term: Callable[..., Tensor], student: Tensor, *others: Tensor, **keywords: Any
) -> tuple[Tensor, Tensor]:
    """Return `term` of the tensors, and its sum's gradient with respect to the student."""
    leaf = student.clone().requires_grad_()
    value = term(leaf, *others, **keywords)
    return value.detach(), gradient(value.sum(), leaf)
