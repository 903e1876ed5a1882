"""The tensors of a case, and what a method is called with.

Every problem has `call(loss)`, which returns forward and backward of the whole public call, and
`few()`, copies of a few rows as the arguments of a loss.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_kd.testing import DTYPES, make_inputs

from .cases import HEADS, LOGITS, STEP, Case
from .gpu_session import Output
from .measuring import Call, clock
from .methods import Loss

#: Rows on which a method is compared with float64; with heads, because that multiplies whole
#: weights, also the largest number of vocabulary entries.
CHECKED_ROWS, CHECKED_VOCABULARY = 16, 32768
#: The 16-bit products are slow if a few rows of them take more than SLOW times as long as in
#: float32; each is tried TRIES times.
FEW_ROWS, SLOW, TRIES = 8, 4.0, 3
#: Of a training step: at most the tokens of a sequence, about the entries of an attention head.
LENGTH, HEAD = 128, 64


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

    def lower_bound(self) -> LowerBound | None:
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

    def tensors(self, rows: int | None = None) -> tuple[Tensor, ...]:
        """Return the arguments of a loss on the first rows."""
        hidden, teacher, labels = (x[:rows] for x in (self._hidden, self._teacher, self._labels))
        return hidden, self._weight, teacher, self._head, labels

    def call(self, loss: Loss) -> Call:
        hidden, weight, *rest = self.tensors()
        by = hidden.detach().requires_grad_(), weight.detach().requires_grad_()

        def run() -> None:
            torch.autograd.grad(loss(*by, *rest), by)  # dropped, not accumulated

        return run

    def restore(self) -> None:
        """Do nothing: no method writes over hidden states or weights."""

    def few(self) -> tuple[Tensor, ...]:
        hidden, weight, teacher, head, labels = (x.detach() for x in self.tensors(CHECKED_ROWS))
        entries = min(CHECKED_VOCABULARY, self.case.v)
        rows = hidden[:CHECKED_ROWS], teacher[:CHECKED_ROWS], labels[:CHECKED_ROWS] % entries
        return rows[0], weight[:entries], rows[1], head[:entries], rows[2]

    def lower_bound(self) -> LowerBound | None:
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
        hidden, weight, teacher, head = (x.to(dtype or x.dtype) for x in self.tensors(rows)[:4])

        def run() -> None:
            logits = torch.mm(hidden, weight.t())
            torch.mm(teacher, head.t())
            torch.mm(logits, weight)
            torch.mm(logits.t(), hidden)

        return run


class StepProblem(HeadsProblem):
    """Student, frozen teacher, one batch, and AdamW; a loss takes hidden states and weights."""

    def __init__(self, case: Case) -> None:
        self.case = case
        torch.manual_seed(0)
        self._student = _model(case, case.student_hidden, layers=1)
        self._frozen = _model(case, case.teacher_hidden, layers=2).requires_grad_(False).eval()
        length = math.gcd(LENGTH, case.n)
        self._ids = torch.randint(case.v, (case.n // length, length), device=case.device)
        self._optimizer = torch.optim.AdamW(self._student.parameters(), lr=1e-5, fused=True)

    def tensors(self, rows: int | None = None) -> tuple[Tensor, ...]:
        ids = self._ids if rows is None else self._ids[:1]
        (body, head), (teacher, teacher_head) = self._student, self._frozen
        with torch.no_grad():
            hidden = teacher(ids).flatten(0, 1)
        labels = ids.roll(-1, 1).flatten()
        return body(ids).flatten(0, 1), head.weight, hidden, teacher_head.weight, labels

    def lower_bound(self) -> LowerBound | None:
        return None

    def call(self, loss: Loss) -> Call:
        def run() -> None:
            loss(*self.tensors()).backward()
            self._optimizer.step()
            self._optimizer.zero_grad()

        return run


def _model(case: Case, hidden: int, layers: int) -> nn.ModuleList:
    """Return embedding with transformer layers, and a head that the loss applies, or the step."""
    # as many attention heads as divide the hidden size, of HEAD entries or a few more
    heads = next(n for n in range(max(1, hidden // HEAD), 0, -1) if hidden % n == 0)
    options = {"dropout": 0.0, "batch_first": True, "norm_first": True}
    layer = nn.TransformerEncoderLayer(hidden, heads, 4 * hidden, **options)
    encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(hidden), enable_nested_tensor=False)
    body = nn.Sequential(nn.Embedding(case.v, hidden), encoder)
    model = nn.ModuleList([body, nn.Linear(hidden, case.v, bias=False)])
    return model.to(case.device, DTYPES[case.dtype])


Problem = LogitsProblem | HeadsProblem
PROBLEMS = {LOGITS: LogitsProblem, HEADS: HeadsProblem, STEP: StepProblem}


def after_heads(loss: Loss) -> Loss:
    """Return a loss of logits as one of hidden states and weights."""
    return lambda hidden, weight, teacher, head, labels: loss(
        F.linear(hidden, weight), F.linear(teacher, head), labels
    )


def _labels(case: Case, generator: torch.Generator) -> Tensor:
    return torch.randint(case.v, (case.n,), generator=generator, device=case.device)


def _random(
    shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator, std: float = 2.0
) -> Tensor:
    result = torch.empty(shape, dtype=dtype, device=generator.device)
    return result.normal_(std=std, generator=generator)
