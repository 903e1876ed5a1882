"""What is measured at the linear level: sizes, inputs, and the contestants with one signature.

A loss takes (student_hidden, student_weight, teacher_hidden, teacher_weight, labels).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_kd import LinearKDLoss
from fused_kd.testing import eager_kd_loss

from .cases import DTYPES

Loss = Callable[..., Tensor]
#: The names of our loss and of its floor: the four bare products on whole matrices.
OURS, PRODUCTS = "LinearKDLoss", "four products"


@dataclass(frozen=True)
class LinearCase:
    """One loss of one size: forward_kl and cross-entropy at 0.5 each, heads without bias."""

    n: int
    v: int
    student_hidden: int
    teacher_hidden: int
    dtype: str  # a key of cases.DTYPES
    temperature: float = 2.0

    @property
    def keywords(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "divergence": "forward_kl"}

    @property
    def flops(self) -> int:
        """Of the four products."""
        return 2 * self.n * self.v * (3 * self.student_hidden + self.teacher_hidden)

    @property
    def gradient_bytes(self) -> int:
        """By hidden states and weight."""
        return (self.n + self.v) * self.student_hidden * DTYPES[self.dtype].itemsize

    @property
    def accumulator_bytes(self) -> int:
        """A float32 weight gradient; where that is the gradient itself, it counts as such."""
        is_gradient = DTYPES[self.dtype] == torch.float32
        return 0 if is_gradient else 4 * self.v * self.student_hidden

    def sizes(self) -> dict[str, Any]:
        """For a line of results."""
        return {"n": self.n, "v": self.v, "student_hidden": self.student_hidden,
                "teacher_hidden": self.teacher_hidden, "dtype": self.dtype,
                "temperature": self.temperature}  # fmt: skip

    def with_(self, **changes: Any) -> LinearCase:
        return replace(self, **changes)


class Heads(NamedTuple):
    """Hidden states and lm_head of both models; the student's two are leaves that require grad."""

    hidden: Tensor  # (N, H_s)
    weight: Tensor  # (V, H_s)
    teacher_hidden: Tensor  # (N, H_t)
    teacher_weight: Tensor  # (V, H_t)
    labels: Tensor  # (N,)

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


def make_heads(case: LinearCase, device: str = "cpu", seed: int = 0) -> Heads:
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


def show_title(name: str, case: LinearCase) -> None:
    """What the tables below it are about."""
    print(f"\n{name}: {case.dtype}, N = {case.n}, V = {case.v}, H_s = {case.student_hidden}, "
          f"H_t = {case.teacher_hidden}, T = {case.temperature:g}", flush=True)  # fmt: skip


# ------------------------------------------------------------------------------- contestants


def ours(case: LinearCase, **settings: Any) -> Loss:
    """LinearKDLoss as a user calls it."""
    return LinearKDLoss(**{**case.keywords, **settings})


def eager(case: LinearCase) -> Loss:
    """The composition of whole logits and the baseline."""
    keywords = case.keywords

    def loss(hidden: Tensor, weight: Tensor, teacher: Tensor, head: Tensor, y: Tensor) -> Tensor:
        return eager_kd_loss(F.linear(hidden, weight), F.linear(teacher, head), y, **keywords)

    return loss


def compiled(case: LinearCase) -> Loss:
    """``torch.compile`` of that, for this size alone."""
    return torch.compile(eager(case), dynamic=False)


class Outcome(NamedTuple):
    """A loss and its gradients."""

    loss: Tensor
    hidden: Tensor
    weight: Tensor


def outcome(loss: Loss, heads: Heads) -> Outcome:
    """Forward and backward."""
    value = loss(*heads)
    return Outcome(value.detach(), *torch.autograd.grad(value, (heads.hidden, heads.weight)))


def step(loss: Loss, heads: Heads) -> Callable[[], object]:
    """Forward and backward as a call to time; its gradients are dropped, not accumulated."""
    return lambda: (outcome(loss, heads), None)[1]


def products(heads: Heads) -> Callable[[], object]:
    """The four products of whole matrices, one after the other, in the dtype of the inputs.

    The student's logits stand in for their gradient: they have its shape.
    """
    hidden, weight, teacher, head = (x.detach() for x in heads[:4])

    def run() -> None:
        logits = torch.mm(hidden, weight.t())
        torch.mm(teacher, head.t())
        torch.mm(logits, weight)
        torch.mm(logits.t(), hidden)

    return run


def distance(got: Tensor, exact: Tensor) -> float:
    """The norm of the difference, relative to that of the exact value."""
    exact = exact.double()
    return float((got.double() - exact).norm() / exact.norm())
