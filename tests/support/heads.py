"""Heads of both models, their losses by us, in float64 and by torch, and products as on a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_kd import Head, kd_loss
from fused_kd.engines import driver, products, selection
from fused_kd.testing import eager_kd_loss

H_S, H_T = 24, 40


class Heads(NamedTuple):
    """Hidden states and heads of both models; the student's three are leaves that require grad."""

    hidden: Tensor  # (N, H_S)
    weight: Tensor  # (V, H_S)
    bias: Tensor  # (V,)
    teacher_hidden: Tensor  # (N, H_T)
    teacher_weight: Tensor  # (V, H_T)
    labels: Tensor  # (N,)

    @property
    def student(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.bias

    @property
    def teacher(self) -> tuple[Tensor, Tensor]:
        return self.teacher_hidden, self.teacher_weight

    @property
    def student_side(self) -> Head:
        return Head(*self.student)

    @property
    def teacher_side(self) -> Head:
        return Head(*self.teacher)


class Outcome(NamedTuple):
    """A loss, and its gradients with respect to the student's hidden states, weight and bias."""

    loss: Tensor
    hidden: Tensor
    weight: Tensor
    bias: Tensor


def make_heads(
    rows: int = 37, vocabulary: int = 131, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Heads:
    """Return random heads, whose logits are a few units, and labels that ignore no row."""
    draw = torch.Generator().manual_seed(seed)

    def leaf(*shape: int, scale: float = 1.0, grad: bool = True) -> Tensor:
        return (scale * torch.randn(*shape, generator=draw)).to(dtype).requires_grad_(grad)

    return Heads(
        leaf(rows, H_S),
        leaf(vocabulary, H_S, scale=0.4),
        leaf(vocabulary),
        leaf(rows, H_T, grad=False),
        leaf(vocabulary, H_T, scale=0.4, grad=False),
        torch.randint(vocabulary, (rows,), generator=draw),
    )


def ours(heads: Heads, upstream: Tensor | None = None, **keywords: Any) -> Outcome:
    """Return kd_loss of both heads, and its gradients for an upstream gradient (None: ones)."""
    loss = kd_loss(heads.student_side, heads.teacher_side, heads.labels, **keywords)
    return _differentiate(loss, heads.student, upstream)


def truth(heads: Heads, upstream: Tensor | None = None, **keywords: Any) -> Outcome:
    """Return the results of `ours` by the float64 reference on whole logits."""
    student = [x.detach().double().requires_grad_() for x in heads.student]
    teacher = F.linear(*(x.double() for x in heads.teacher))
    loss = kd_loss(F.linear(*student), teacher, heads.labels, backend="reference", **keywords)
    return _differentiate(loss, tuple(student), upstream)


def eager(heads: Heads, upstream: Tensor | None = None, **keywords: Any) -> Outcome:
    """Return the results of `ours` by eager_kd_loss on whole logits, in the inputs' dtype."""
    logits = F.linear(*heads.student), F.linear(*heads.teacher)
    loss = eager_kd_loss(*logits, heads.labels, **keywords)
    return _differentiate(loss, heads.student, upstream)


def _differentiate(loss: Tensor, inputs: tuple[Tensor, ...], upstream: Tensor | None) -> Outcome:
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    return Outcome(loss.detach(), *torch.autograd.grad(loss, inputs, upstream))


def distance(got: Tensor, exact: Tensor) -> float:
    """Return the norm of the difference divided by the norm of the exact value."""
    return ((got.double() - exact.double()).norm() / exact.double().norm()).item()


def near(got: Iterable[Tensor], want: Iterable[Tensor], bound: float) -> None:
    """Assert that the distance of each tensor from the one in `want` is at most `bound`."""
    for mine, exact in zip(got, want, strict=True):
        assert distance(mine, exact) <= bound


def multiply_as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Use CudaProducts and mask ignored rows, as on a GPU, but multiply in float64 on the CPU.

    Dtypes that cuBLAS does not multiply fail an assertion.

    Returns:
        A list to which each product is appended: both operands' shapes, their dtype, the result's
        dtype, and whether the product is added to what the result holds.
    """
    calls: list[tuple[Any, ...]] = []

    def mm(out: Tensor, a: Tensor, b: Tensor, add: bool, scale: float) -> None:
        assert a.dtype == b.dtype
        assert out.dtype == a.dtype or (
            out.dtype == torch.float32 and a.dtype in (torch.bfloat16, torch.float16)
        )
        calls.append((tuple(a.shape), tuple(b.shape), a.dtype, out.dtype, add))
        exact = scale * (a.double() @ b.double())
        out.copy_(out + exact if add else exact)

    monkeypatch.setattr(products, "_mm", mm)
    monkeypatch.setattr(driver, "products_for", lambda *arguments: products.CudaProducts())
    monkeypatch.setattr(selection, "_host_can_read", lambda x: False)
    return calls
