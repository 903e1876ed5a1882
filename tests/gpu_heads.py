"""Hidden states and heads for the tests of heads on a GPU, and what to do with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import DTYPES
from fused_kd import Head, KDLoss
from fused_kd.testing import eager_kd_loss

Loss = Callable[..., Tensor]
TEMPERATURE = 2.0


class HeadsCase(NamedTuple):
    """Sizes of both models."""

    n: int
    v: int
    student_hidden: int
    teacher_hidden: int
    dtype: str  # a key of cases.DTYPES

    @property
    def gradient_bytes(self) -> int:
        """By hidden states and weight."""
        return (self.n + self.v) * self.student_hidden * DTYPES[self.dtype].itemsize

    @property
    def accumulator_bytes(self) -> int:
        """A float32 weight gradient; where that is the gradient itself, it counts as such."""
        is_gradient = DTYPES[self.dtype] == torch.float32
        return 0 if is_gradient else 4 * self.v * self.student_hidden


class Heads(NamedTuple):
    """Hidden states and lm_head of both models; the student's two are leaves that require grad."""

    hidden: Tensor  # (N, H_s)
    weight: Tensor  # (V, H_s)
    teacher_hidden: Tensor  # (N, H_t)
    teacher_weight: Tensor  # (V, H_t)
    labels: Tensor  # (N,)

    @property
    def student(self) -> Head:
        return Head(self.hidden, self.weight)

    @property
    def teacher(self) -> Head:
        return Head(self.teacher_hidden, self.teacher_weight)

    def first(self, rows: int) -> Heads:
        """The first rows, of the same weights."""
        hidden = self.hidden.detach()[:rows].requires_grad_()
        return self._replace(hidden=hidden, teacher_hidden=self.teacher_hidden[:rows],
                             labels=self.labels[:rows])  # fmt: skip

    def to(self, dtype: torch.dtype) -> Heads:
        """The same values in another dtype."""
        hidden, weight, teacher, head = (x.detach().to(dtype) for x in self[:4])
        leaves = hidden.requires_grad_(), weight.requires_grad_()
        return Heads(*leaves, teacher, head, self.labels)


def make_heads(case: HeadsCase, device: str = "cpu", seed: int = 0) -> Heads:
    """Logits of standard deviation 2 from normal hidden states and weights."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = DTYPES[case.dtype]

    def draw(rows: int, hidden: int, scale: float) -> Tensor:
        result = torch.empty(rows, hidden, dtype=dtype, device=device)
        for piece in torch.split(result, 2**16):  # no float32 copy of the whole
            made = torch.randn(piece.shape, generator=generator, device=device)
            piece.copy_(scale * made)
        return result

    h_s, h_t = case.student_hidden, case.teacher_hidden
    return Heads(
        draw(case.n, h_s, 1.0).requires_grad_(),
        draw(case.v, h_s, 2 / h_s**0.5).requires_grad_(),
        draw(case.n, h_t, 1.0),
        draw(case.v, h_t, 2 / h_t**0.5),
        torch.randint(case.v, (case.n,), generator=generator, device=device),
    )


def ours(case: HeadsCase, **settings: Any) -> Loss:
    """KDLoss as a user calls it."""
    of = KDLoss(**{"temperature": TEMPERATURE, **settings})

    def loss(hidden: Tensor, weight: Tensor, teacher: Tensor, head: Tensor, y: Tensor) -> Tensor:
        result = of(Head(hidden, weight), Head(teacher, head), y)
        assert isinstance(result, Tensor)
        return result

    return loss


def eager(case: HeadsCase) -> Loss:
    """The composition of whole logits and the baseline."""

    def loss(hidden: Tensor, weight: Tensor, teacher: Tensor, head: Tensor, y: Tensor) -> Tensor:
        return eager_kd_loss(
            F.linear(hidden, weight), F.linear(teacher, head), y, temperature=TEMPERATURE
        )

    return loss


class Outcome(NamedTuple):
    """A loss and its gradients."""

    loss: Tensor
    hidden: Tensor
    weight: Tensor


def outcome(loss: Loss, heads: Heads) -> Outcome:
    """Forward and backward."""
    value = loss(*heads)
    return Outcome(value.detach(), *torch.autograd.grad(value, (heads.hidden, heads.weight)))


def distance(got: Tensor, exact: Tensor) -> float:
    """The norm of the difference, relative to that of the exact value."""
    exact = exact.double()
    return float((got.double() - exact).norm() / exact.norm())
