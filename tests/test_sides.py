"""All four pairs of sides against the float64 truth, and what a Head is: scale, rows, dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.heads import distance, make_heads
from torch import Tensor

from fused_kd import Head, kd_loss
from fused_kd.sides import Side
from fused_kd.testing import eager_kd_loss

ROWS, V = 13, 131
PAIRS = ("logits, logits", "head, head", "head, logits", "logits, head")
Sides = tuple[Side, Side, Tensor]


def make(pair: str, dtype: torch.dtype = torch.float32) -> Sides:
    """Return sides and labels; the student's tensors require grad, some labels are -100."""
    heads = make_heads(ROWS, V, dtype)
    heads.labels[::4] = -100
    student: Side = heads.student_side
    teacher: Side = heads.teacher_side
    if pair.startswith("logits"):
        student = F.linear(*heads.student).detach().requires_grad_()
    if pair.endswith("logits"):
        teacher = F.linear(*heads.teacher)
    return student, teacher, heads.labels


def leaves(side: Side) -> list[Tensor]:
    tensors = side[:3] if isinstance(side, Head) else [side]
    return [x for x in tensors if isinstance(x, Tensor) and x.requires_grad]


def logits_of(side: Side) -> Tensor:
    """Return a side's logits in float64."""
    if isinstance(side, Head):
        states, weight, bias, scale, _ = side.to(torch.float64)
        return scale * F.linear(states, weight, bias)
    return side.double()


def chunked(student: Side, teacher: Side) -> dict[str, int]:
    has_head = isinstance(student, Head) or isinstance(teacher, Head)
    return {"chunk_rows": 4} if has_head else {}


def differentiated(loss: Any, student: Side, upstream: Tensor) -> list[Tensor]:
    """Return the loss, and its gradients by the student's tensors for an upstream gradient."""
    loss = loss
    return [loss.detach(), *torch.autograd.grad(loss, leaves(student), upstream.to(loss.dtype))]


def no_worse(got: list[Tensor], exact: list[Tensor], baseline: list[Tensor]) -> None:
    """Assert that errors are at most eager's, plus float32 arithmetic and one rounding.

    That rounding is the second one of a 16-bit gradient times an upstream gradient.
    """
    for mine, want, theirs in zip(got, exact, baseline, strict=True):
        slack = 8 * torch.finfo(torch.float32).eps
        if mine.dtype != torch.float32:
            slack += torch.finfo(mine.dtype).eps / 2
        error, allowed = distance(mine, want), distance(theirs, want)
        assert error <= 1.1 * allowed + slack, f"{error:.2e} > {allowed:.2e} + {slack:.0e}"


@pytest.mark.parametrize("pair", PAIRS)
def test_error_rule(pair: str, divergence: str, dtype: torch.dtype, backend: str) -> None:
    student, teacher, labels = make(pair, dtype)
    rows = torch.rand(ROWS) + 0.5
    for reduction, upstream in (
        ("mean", torch.tensor(3.0)),
        ("sum", torch.tensor(0.25)),
        ("none", rows),
    ):
        keywords: dict[str, Any] = {
            "divergence": divergence,
            "temperature": 2.0,
            "label_smoothing": 0.1,
            "reduction": reduction,
        }
        loss = kd_loss(
            student, teacher, labels, backend=backend, **chunked(student, teacher), **keywords
        )
        truth = kd_loss(logits_of(student), logits_of(teacher), labels, **keywords)
        eager = eager_kd_loss(student, teacher, labels, **keywords)
        no_worse(*(differentiated(x, student, upstream) for x in (loss, truth, eager)))


# ---------------------------------------------------------------------------------------- scale


@pytest.mark.parametrize("pair", PAIRS[1:])
@pytest.mark.parametrize(("of_student", "of_teacher"), [(0.25, 1.0), (1.0, 3.0), (-1.5, -0.5)])
def test_scale_multiplies_the_logits(
    pair: str, of_student: float, of_teacher: float, backend: str
) -> None:
    student, teacher, labels = make(pair)
    if isinstance(student, Head):
        student = student._replace(scale=of_student)
    if isinstance(teacher, Head):
        teacher = teacher._replace(scale=of_teacher, bias=torch.randn(V))
    for reduction in ("mean", "none"):
        keywords: dict[str, Any] = {"temperature": 2.0, "reduction": reduction}
        loss = kd_loss(student, teacher, labels, chunk_rows=4, backend=backend, **keywords)
        want = kd_loss(logits_of(student), logits_of(teacher), labels, **keywords)
        upstream = torch.rand(want.shape)
        for got, exact in zip(
            *(differentiated(x, student, upstream) for x in (loss, want)), strict=True
        ):
            assert distance(got, exact) < 1e-5


# ------------------------------------------------------------------------------- what a Head is


def test_to_moves_and_casts_the_tensors_and_keeps_the_rest() -> None:
    head = Head(torch.randn(2, 3), torch.randn(5, 3), torch.randn(5), scale=0.5)
    cast = head.to(torch.bfloat16)
    assert isinstance(cast, Head)
    assert [x.dtype for x in cast[:3] if isinstance(x, Tensor)] == [torch.bfloat16] * 3
    assert (cast.scale, cast.softcap) == (0.5, None)
    meta = head._replace(bias=None).to("meta", non_blocking=True)
    assert (meta.hidden.device.type, meta.weight.device.type, meta.bias) == ("meta", "meta", None)


@pytest.mark.parametrize("index", [slice(1, 3), torch.tensor([2, 0]), (slice(None), slice(1, 4))])
def test_rows_takes_the_rows_of_the_hidden_states(index: Any) -> None:
    head = Head(torch.randn(3, 4, 6), torch.randn(V, 6), torch.randn(V), scale=0.5)
    labels, teacher = torch.randint(V, (3, 4)), torch.randn(3, 4, V)
    part = head.rows(index)
    assert part[1:] == head[1:]
    got = kd_loss(part, teacher[index], labels[index], reduction="none")
    want = kd_loss(head, teacher, labels, reduction="none")
    torch.testing.assert_close(got, want[index])


def test_one_row_of_hidden_states_is_one_row() -> None:
    student, teacher, labels = make("head, logits")
    assert isinstance(student, Head)
    alone = kd_loss(student.rows(1), teacher[1], labels[1], reduction="none")
    rows = kd_loss(student, teacher, labels, reduction="none")
    assert alone.shape == ()
    torch.testing.assert_close(alone, rows[1])
