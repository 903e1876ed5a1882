"""The student, teacher and labels that the methods of a case are called with."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_kd import Head, TopK, extension
from fused_kd.sides import Side, Teacher
from fused_kd.testing import DTYPES

from .cases import HEADS, LOGITS, STEP, TOPK, Case
from .measuring import Call
from .methods import BUCKET, DENSE, Loss

#: The most rows on which a method is compared with float64; of heads, whose whole weights are
#: multiplied, also the most vocabulary entries.
CHECKED_ROWS, CHECKED_VOCABULARY = 16, 32768
#: In a training step: the most tokens of a sequence, the fewest entries of an attention head.
LENGTH, HEAD = 128, 64

Arguments = tuple[Side, Teacher, Tensor]  # student, teacher, labels


class LowerBound(NamedTuple):
    """A call that no method of the case can be faster than, to be timed in turns with them."""

    name: str  # a key of BOUNDS in tables.py
    call: Call
    times: float = 1.0  # the bound in seconds of the call
    forward_times: float = 1.0  # the same for a loss that writes no gradient
    why: str = ""  # if the call is not in the case's dtype


class Output(torch.autograd.Function):
    """The identity, without a copy: makes logits a layer's output, which a loss may overwrite."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


def loss_and_gradients(
    loss: Loss, student: Side, teacher: Teacher, labels: Tensor
) -> tuple[Tensor, ...]:
    """Return a loss, then its gradients by the student's tensors; only the loss if it has no graph.

    Logits are passed as an autograd node's output, as a model's are: the loss may overwrite them.
    """
    tensors = student[:2] if isinstance(student, Head) else (student,)
    leaves = [x.detach().requires_grad_() for x in tensors]
    value = loss(Head(*leaves) if len(leaves) > 1 else Output.apply(*leaves), teacher, labels)
    return value.detach(), *(torch.autograd.grad(value, leaves) if value.requires_grad else ())


class Problem:
    """What problems share.

    `arguments(rows=None, tail=BUCKET)` returns a loss's arguments. rows: that many; None: all.
    tail: Method.tail of the loss, ignored but at level TOPK.
    """

    case: Case
    arguments: Callable[..., Arguments]

    def few(self, tail: str = BUCKET) -> Arguments:
        """Return few rows (of heads few entries too) to find errors on; logits are copied."""
        student, teacher, labels = self.arguments(CHECKED_ROWS, tail)
        if isinstance(teacher, TopK):
            return student.clone(), teacher, labels
        if not isinstance(student, Head):
            return student.clone(), teacher.clone(), labels
        rows, entries = slice(CHECKED_ROWS), min(CHECKED_VOCABULARY, self.case.v)
        student, teacher = (
            Head(x.hidden[rows].detach(), x.weight[:entries].detach()) for x in (student, teacher)
        )
        return student, teacher, labels[rows] % entries

    def call(self, loss: Loss, tail: str = BUCKET) -> Call:
        """Return a call of the loss, forward and backward, on all rows."""
        return partial(loss_and_gradients, loss, *self.arguments(None, tail))

    def restore(self) -> None:
        """Restore inputs that a call may have overwritten; heads never are."""

    def lower_bound(self) -> LowerBound | None:
        """Return a call that no method can be faster than; None: a training step has none."""


class LogitsProblem(Problem):
    """Logits of both models in existing buffers."""

    def __init__(self, case: Case) -> None:
        self.case, generator = case, torch.Generator(case.device).manual_seed(0)
        self._original = _random(case, case.n, case.v, generator, 2.0)
        self._teacher = _random(case, case.n, case.v, generator, 2.0)
        self._student, self._labels = self._original.clone(), _labels(case, generator)

    def arguments(self, rows: int | None = None, tail: str = BUCKET) -> Arguments:
        return self._student[:rows], self._teacher[:rows], self._labels[:rows]

    def restore(self) -> None:
        self._student.copy_(self._original)

    def lower_bound(self) -> LowerBound:
        """Return a copy, which moves two matrices, while the loss moves three: 1.5 times."""
        return LowerBound("copy", lambda: self._student.copy_(self._teacher), 1.5, 1.0)


class TopKProblem(LogitsProblem):
    """Logits of both models, and of the teacher's the K largest entries of each row."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self._topk = TopK.from_logits(self._teacher, case.k, case.temperature)

    def arguments(self, rows: int | None = None, tail: str = BUCKET) -> Arguments:
        student, teacher, labels = super().arguments(rows)
        topk = self._topk.rows(slice(rows))._replace(tail=tail)
        return student, teacher if tail == DENSE else topk, labels

    def lower_bound(self) -> LowerBound:
        """Return a copy: the loss reads one matrix and writes one."""
        return LowerBound("one copy", lambda: self._student.copy_(self._teacher), 1.0, 0.5)


class HeadsProblem(Problem):
    """Hidden states and heads of both models, whose logits have standard deviation 2."""

    def __init__(self, case: Case) -> None:
        self.case, generator = case, torch.Generator(case.device).manual_seed(0)
        hidden, weight, teacher, head = (
            _random(case, rows, h, generator, std)
            for h in (case.student_hidden, case.teacher_hidden)
            for rows, std in ((case.n, 1.0), (case.v, 2 / h**0.5))
        )
        self._arguments = Head(hidden, weight), Head(teacher, head), _labels(case, generator)

    def arguments(self, rows: int | None = None, tail: str = BUCKET) -> Arguments:
        student, teacher, labels = self._arguments
        return student.rows(slice(rows)), teacher.rows(slice(rows)), labels[:rows]

    def lower_bound(self) -> LowerBound:
        """Return the four products of whole matrices, one after the other.

        In float32 if the processor would emulate products of 16 bits, which take 14 times as long.
        The student's logits replace their gradient, which has the same shape.
        """
        dtype, why = self.case.dtype, ""
        sets = (extension.cpu.build_info() or {}).get("instruction_sets", {})
        is_native = dtype == "fp32" or (dtype == "bf16" and sets.get("avx512_bf16", False))
        if self.case.device == "cpu" and not is_native:
            why, dtype = f"in float32: the processor has no products in {dtype}", "fp32"
        student, teacher = (x.to(DTYPES[dtype]) for x in self.arguments()[:2])

        def products() -> None:
            logits = torch.mm(student.hidden, student.weight.t())
            torch.mm(teacher.hidden, teacher.weight.t())
            torch.mm(logits, student.weight)
            torch.mm(logits.t(), student.hidden)

        return LowerBound("products", products, why=why)


class StepProblem(Problem):
    """Student, frozen teacher, one batch and AdamW; a loss takes Heads, a call makes an update."""

    def __init__(self, case: Case) -> None:
        self.case = case
        torch.manual_seed(0)
        self._student = _model(case, case.student_hidden, layers=1)
        self._teacher = _model(case, case.teacher_hidden, layers=2).requires_grad_(False).eval()
        length = math.gcd(LENGTH, case.n)
        self._ids = torch.randint(case.v, (case.n // length, length), device=case.device)
        self._optimizer = torch.optim.AdamW(self._student.parameters(), lr=1e-5, fused=True)

    def arguments(self, rows: int | None = None, tail: str = BUCKET) -> Arguments:
        """Return the models' Heads and labels of the batch; with `rows`, of its first sequence."""
        ids = self._ids if rows is None else self._ids[:1]
        models = self._student, self._teacher
        student, teacher = (Head(body(ids).flatten(0, 1), head.weight) for body, head in models)
        return student, teacher, ids.roll(-1, 1).flatten()

    def call(self, loss: Loss, tail: str = BUCKET) -> Call:
        def run() -> None:
            loss(*self.arguments()).backward()
            self._optimizer.step()
            self._optimizer.zero_grad()

        return run


def _model(case: Case, hidden: int, layers: int) -> nn.ModuleList:
    """Return [embedding and transformer layers, lm_head]; `hidden` is the hidden size."""
    heads = math.gcd(hidden, max(1, hidden // HEAD))
    options = {"dropout": 0.0, "batch_first": True, "norm_first": True}
    layer = nn.TransformerEncoderLayer(hidden, heads, 4 * hidden, **options)
    encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(hidden), enable_nested_tensor=False)
    body = nn.Sequential(nn.Embedding(case.v, hidden), encoder)
    model = nn.ModuleList([body, nn.Linear(hidden, case.v, bias=False)])
    return model.to(case.device, DTYPES[case.dtype])


PROBLEMS: Any = {
    LOGITS: LogitsProblem,
    HEADS: HeadsProblem,
    TOPK: TopKProblem,
    STEP: StepProblem,
}


def _labels(case: Case, generator: torch.Generator) -> Tensor:
    return torch.randint(case.v, (case.n,), generator=generator, device=case.device)


def _random(case: Case, rows: int, columns: int, generator: torch.Generator, std: float) -> Tensor:
    result = torch.empty(rows, columns, dtype=DTYPES[case.dtype], device=case.device)
    return result.normal_(std=std, generator=generator)
