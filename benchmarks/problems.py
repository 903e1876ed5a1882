"""The tensors of a case, and what a method is called with.

Every problem has `call(loss, rows)`, which returns forward and backward of the whole public call on
the first rows (None: all), and `few()`, copies of a few rows as the arguments of a loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_kd import Head, kd_loss
from fused_kd.testing import make_inputs

from .cases import DTYPES, LOGITS, Case
from .methods.base import Loss

#: Rows on which a method is compared with float64; with heads, because that multiplies whole
#: weights, also the largest number of vocabulary entries.
CHECKED_ROWS, CHECKED_VOCABULARY = 16, 32768


class Outcome(NamedTuple):
    """A loss and its gradients; none if the loss is not attached to a graph."""

    loss: Tensor
    gradients: tuple[Tensor, ...]


class Problem:
    """What is common to all levels."""

    #: The positions of the tensors of `few` by which the gradients are taken.
    leaves: tuple[int, ...] = (0, 1)

    def __init__(self, case: Case) -> None:
        self.case = case

    def restore(self) -> None:
        """Undo what a call may have written over its inputs."""

    def outcome(self, loss: Loss) -> Outcome:
        """Return a method's loss and gradients on a few rows."""
        return _outcome(loss, self.few(), self.leaves)

    def exact(self, keywords: dict[str, Any]) -> Outcome:
        """Return the float64 reference's with these keywords, on the same rows."""
        double = tuple(x.double() if x.is_floating_point() else x for x in self.few())

        def loss(*tensors: Tensor) -> Tensor:
            *sides, labels = tensors
            if self.case.level != LOGITS:
                sides = [Head(*sides[:2]), Head(*sides[2:])]
            return kd_loss(*sides, labels, backend="reference", **keywords)

        return _outcome(loss, double, self.leaves)


def _outcome(loss: Loss, tensors: tuple[Tensor, ...], leaves: tuple[int, ...]) -> Outcome:
    by = [tensors[i].detach().clone().requires_grad_() for i in leaves]
    arguments = list(tensors)
    for i, leaf in zip(leaves, by, strict=True):
        arguments[i] = leaf * 1  # no leaf: it may be written over
    value = loss(*arguments)
    if not value.requires_grad:
        return Outcome(value, ())
    return Outcome(value.detach(), torch.autograd.grad(value, by))


class LogitsProblem(Problem):
    """Logits of both models in existing buffers.

    The student's are the output of an autograd node, as a model's are, which drops the gradient
    that it receives, as a model's last layer does after it used it.
    """

    leaves = (0,)

    def __init__(self, case: Case, seed: int = 0) -> None:
        super().__init__(case)
        shape, kind, device = (case.n, case.v), DTYPES[case.dtype], case.device
        generator = torch.Generator(device).manual_seed(seed)
        if case.regime == "randn":
            self._original, self._teacher = (_random(shape, kind, generator) for _ in range(2))
            self._labels = torch.randint(case.v, (case.n,), generator=generator, device=device)
        else:
            inputs = make_inputs(case.regime, case.n, case.v, kind, seed=seed)
            self._original, self._teacher, self._labels = (x.to(device) for x in inputs)
        self._student = self._original.clone()
        self._weight = torch.ones((), device=device, requires_grad=True)

    def call(self, loss: Loss, rows: int | None = None) -> Callable[[], None]:
        buffers = self._student, self._teacher, self._labels
        student, teacher, labels = (x[:rows] for x in buffers)

        def run() -> None:
            value = loss(_LastLayer.apply(self._weight, student), teacher, labels)
            if value.requires_grad:
                value.backward()

        return run

    def restore(self) -> None:
        self._student.copy_(self._original)

    def few(self) -> tuple[Tensor, ...]:
        original = self._original, self._teacher, self._labels
        return tuple(x[:CHECKED_ROWS].clone() for x in original)

    def lower_bound(self) -> Callable[[], object]:
        """Return a call that reads one (N, V) matrix and writes one."""
        return lambda: self._student.copy_(self._teacher)


class HeadsProblem(Problem):
    """Hidden states and heads of both models; logits of standard deviation 2."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        super().__init__(case)
        generator = torch.Generator(case.device).manual_seed(seed)
        kind, h_s, h_t = DTYPES[case.dtype], case.student_hidden, case.teacher_hidden
        self.hidden = _random((case.n, h_s), kind, generator, 1.0)
        self.weight = _random((case.v, h_s), kind, generator, 2 / h_s**0.5).requires_grad_()
        self.teacher = _random((case.n, h_t), kind, generator, 1.0)
        self.head = _random((case.v, h_t), kind, generator, 2 / h_t**0.5)
        self.labels = torch.randint(case.v, (case.n,), generator=generator, device=case.device)

    def call(self, loss: Loss, rows: int | None = None) -> Callable[[], None]:
        hidden = self.hidden[:rows].detach().requires_grad_()
        teacher, labels = self.teacher[:rows], self.labels[:rows]

        def run() -> None:
            value = loss(hidden, self.weight, teacher, self.head, labels)
            torch.autograd.grad(value, (hidden, self.weight))  # dropped, not accumulated

        return run

    def few(self) -> tuple[Tensor, ...]:
        rows, entries = slice(CHECKED_ROWS), slice(CHECKED_VOCABULARY)
        labels = self.labels[rows] % min(CHECKED_VOCABULARY, self.case.v)
        weights = self.weight.detach()[entries], self.head[entries]
        return self.hidden[rows], weights[0], self.teacher[rows], weights[1], labels

    def lower_bound(
        self, rows: int | None = None, dtype: torch.dtype | None = None
    ) -> Callable[[], object]:
        """Return the four products of whole matrices, one after the other.

        The student's logits stand in for their gradient: they have its shape.
        """
        tensors = (self.hidden[:rows], self.weight, self.teacher[:rows], self.head)
        hidden, weight, teacher, head = (x.detach().to(dtype or x.dtype) for x in tensors)

        def run() -> None:
            logits = torch.mm(hidden, weight.t())
            torch.mm(teacher, head.t())
            torch.mm(logits, weight)
            torch.mm(logits.t(), hidden)

        return run


def _random(
    shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator, scale: float = 2.0
) -> Tensor:
    """Return normal numbers, made in pieces so that no large float32 copy is."""
    result = torch.empty(shape, dtype=dtype, device=generator.device)
    for piece in torch.split(result.view(-1), 2**22 if result.is_cpu else 2**28):
        piece.copy_(scale * torch.randn(len(piece), generator=generator, device=result.device))
    return result


class _LastLayer(torch.autograd.Function):
    """Outputs existing logits, and takes their gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, logits: Tensor) -> Tensor:
        return logits.detach()  # no view: what a layer computed is none

    @staticmethod
    def backward(ctx: Any, *gradient: Any) -> Any:
        assert gradient[0] is not None
        return None, None
