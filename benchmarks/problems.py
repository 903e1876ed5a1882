"""The tensors of a case, and what a method is called with.

Every problem has `call(loss)`, which returns forward and backward of the whole public call, and
`few()`, copies of a few rows as the arguments of a loss.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_kd.testing import DTYPES, make_inputs

from .cases import HEADS, LOGITS, Case
from .gpu_session import Output
from .measuring import Call, clock
from .methods import Loss

#: Rows on which a method is compared with float64; with heads, because that multiplies whole
#: weights, also the largest number of vocabulary entries.
CHECKED_ROWS, CHECKED_VOCABULARY = 16, 32768
#: The 16-bit products are slow if a few rows of them take more than SLOW times as long as in
#: float32; each is tried TRIES times.
FEW_ROWS, SLOW, TRIES = 8, 4.0, 3


class LowerBound(NamedTuple):
    """A call that no method of the case can be faster than, to be timed in turns with them."""

    name: str  # copy or products
    call: Call
    times: float = 1.0  # of the call's seconds: what the case takes at least
    why: str = ""  # it is not in the case's dtype


class LogitsProblem:
    """Logits of both models in existing buffers.

    The student's are the output of an autograd node, as a model's are, and their gradient is
    dropped, as by a model's last layer after it used it.
    """

    #: The positions of the tensors of `few` by which the gradients are taken.
    leaves: tuple[int, ...] = (0,)

    def __init__(self, case: Case) -> None:
        self.case, shape, kind = case, (case.n, case.v), DTYPES[case.dtype]
        if case.regime == "randn":
            generator = torch.Generator(case.device).manual_seed(0)
            original, teacher = (_random(shape, kind, generator) for _ in range(2))
            labels = _labels(case, generator)
        else:
            inputs = make_inputs(case.regime, *shape, kind)
            original, teacher, labels = (x.to(case.device) for x in inputs)
        self._original, self._rest = original, (teacher, labels)
        self._student = original.clone()

    def call(self, loss: Loss) -> Call:
        leaf = self._student.detach().requires_grad_()

        def run() -> None:
            value = loss(logits := Output.apply(leaf), *self._rest)
            if value.requires_grad:
                torch.autograd.grad(value, logits)

        return run

    def restore(self) -> None:
        """Undo what a call may have written over its inputs."""
        self._student.copy_(self._original)

    def few(self) -> tuple[Tensor, ...]:
        return tuple(x[:CHECKED_ROWS].clone() for x in (self._original, *self._rest))

    def lower_bound(self) -> LowerBound:
        """Return a copy, which moves two of the three matrices."""
        return LowerBound("copy", lambda: self._student.copy_(self._rest[0]), 1.5)


class HeadsProblem:
    """Hidden states and heads of both models; logits of standard deviation 2."""

    leaves = (0, 1)

    def __init__(self, case: Case) -> None:
        self.case, generator = case, torch.Generator(case.device).manual_seed(0)
        self._hidden, self._weight, self._teacher, self._head = (
            _random((rows, h), DTYPES[case.dtype], generator, std)
            for h in (case.student_hidden, case.teacher_hidden)
            for rows, std in ((case.n, 1.0), (case.v, 2 / h**0.5))
        )
        self._labels = _labels(case, generator)

    def call(self, loss: Loss) -> Call:
        by = self._hidden.detach().requires_grad_(), self._weight.detach().requires_grad_()
        rest = self._teacher, self._head, self._labels

        def run() -> None:
            torch.autograd.grad(loss(*by, *rest), by)  # dropped, not accumulated

        return run

    def restore(self) -> None:
        """Do nothing: no method writes over hidden states or weights."""

    def few(self) -> tuple[Tensor, ...]:
        rows, entries = slice(CHECKED_ROWS), slice(CHECKED_VOCABULARY)
        labels = self._labels[rows] % min(CHECKED_VOCABULARY, self.case.v)
        student = self._hidden[rows], self._weight[entries]
        return *student, self._teacher[rows], self._head[entries], labels

    def lower_bound(self) -> LowerBound:
        """Return the products, in float32 if the processor emulates those of 16 bits."""
        if self.case.dtype != "fp32" and self.case.device == "cpu":
            narrow, fp32 = (
                min(clock(self._products(FEW_ROWS, dtype), "cpu") for _ in range(TRIES))
                for dtype in (None, torch.float32)
            )
            if narrow > SLOW * fp32:
                why = (
                    f"in float32; in {self.case.dtype} they take {narrow / fp32:.0f} times as long"
                )
                return LowerBound("products", self._products(None, torch.float32), why=why)
        return LowerBound("products", self._products())

    def _products(self, rows: int | None = None, dtype: torch.dtype | None = None) -> Call:
        """Return the four products of whole matrices, one after the other.

        The student's logits stand in for their gradient: they have its shape.
        """
        tensors = self._hidden[:rows], self._weight, self._teacher[:rows], self._head
        hidden, weight, teacher, head = (x.to(dtype or x.dtype) for x in tensors)

        def run() -> None:
            logits = torch.mm(hidden, weight.t())
            torch.mm(teacher, head.t())
            torch.mm(logits, weight)
            torch.mm(logits.t(), hidden)

        return run


Problem = LogitsProblem | HeadsProblem
PROBLEMS = {LOGITS: LogitsProblem, HEADS: HeadsProblem}


def _labels(case: Case, generator: torch.Generator) -> Tensor:
    return torch.randint(case.v, (case.n,), generator=generator, device=case.device)


def _random(
    shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator, std: float = 2.0
) -> Tensor:
    result = torch.empty(shape, dtype=dtype, device=generator.device)
    return result.normal_(std=std, generator=generator)
