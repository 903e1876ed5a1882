"""Divergences, shapes, strides and dtypes against the eager composition."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from support.logits import (
    DTYPES,
    N,
    V,
    check,
    gradient,
    identical,
    make,
    pair,
    rows_and_gradient,
    scalar_and_gradient,
)
from torch import Tensor

from fused_kd import Head, kd_loss
from fused_kd.rows import logit_rows
from fused_kd.testing import eager_kd_loss


@pytest.mark.parametrize("soft_scale", ["t2", "none"])
def test_every_divergence_against_the_eager_composition(
    backend: str, divergence: str, soft_scale: str
) -> None:
    student, teacher, labels = make()
    keywords: dict[str, Any] = {
        "divergence": divergence,
        "soft_scale": soft_scale,
        "temperature": 1.7,
        "beta": 0.2,
        "label_smoothing": 0.1,
        "reduction": "none",
    }
    got = kd_loss(student, teacher, labels, backend=backend, **keywords)
    check(got, eager_kd_loss(student, teacher, labels, **keywords), student)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("leading", [(), (1,), (6,), (2, 3), (2, 1, 3), (2, 3, 1, 2)])
def test_shapes(backend: str, leading: tuple[int, ...], reduction: str) -> None:
    student = torch.randn(*leading, V, requires_grad=True)
    teacher, labels = torch.randn(*leading, V), torch.randint(V, leading)
    got = kd_loss(student, teacher, labels, reduction=reduction, backend=backend)
    assert got.shape == (leading if reduction == "none" else ())
    assert got.dtype == torch.float32
    check(got, eager_kd_loss(student, teacher, labels, reduction=reduction), student)


# views of a (4, 6, V+3) base: how each is addressed
VIEWS: dict[str, Any] = {
    "sliced sequence: two strides": lambda x: x[:, :-1, :V],
    "transposed batch and sequence": lambda x: x.transpose(0, 1)[:, :, :V],
    "odd offset and row stride": lambda x: x[1:, 1:, 2 : 2 + V],
    "expanded": lambda x: x[:1, :, :V].expand(4, 6, V),
    "overlapping": lambda x: x.as_strided((4, 6, V), (7, 3, 1)),
    "copied: last stride is not 1": lambda x: x.mT.contiguous().mT[..., :V],
    "four dimensions that fold": lambda x: x.view(2, 2, 6, V + 3)[..., :V],
    "four dimensions, one split": lambda x: x.view(2, 2, 6, V + 3)[:, :, :4, :V],
    "copied: does not fold": lambda x: x.view(2, 2, 3, 2, V + 3)[:, :1, :2, :, :V],
}


@pytest.mark.parametrize("teacher_view", VIEWS)
@pytest.mark.parametrize("student_view", VIEWS)
def test_strides(backend: str, student_view: str, teacher_view: str) -> None:
    base = torch.randn(4, 6, V + 3, requires_grad=True)
    student = VIEWS[student_view](base)
    teacher = VIEWS[teacher_view](torch.randn(4, 6, V + 3))
    if student.shape != teacher.shape:
        teacher = torch.randn(student.shape)
    labels = torch.randint(V, student.shape[:-1])
    got = kd_loss(student, teacher, labels, temperature=2.0, backend=backend)
    check(got, eager_kd_loss(student, teacher, labels, temperature=2.0), base)


def test_views_are_not_copied_where_two_strides_reach() -> None:
    base = torch.randn(2, 2, 6, V + 3)
    other = torch.randn(2, 2, 4, V)
    for student, teacher in (
        (base[..., :4, :V], other),  # by the student's strides the rows fold
        (other, base[..., :4, :V]),  # by the teacher's
        (other[0], base[0, :, :4, :V]),
        (other[0, 0], base[0, 0, :4, :V]),
        (other[0, 0, 0], base[0, 0, 0, :V]),
    ):
        for side, rows in zip((student, teacher), logit_rows(student, teacher), strict=True):
            assert rows.dim() == 3
            assert rows.data_ptr() == side.data_ptr()


@pytest.mark.parametrize("labels_dtype", [torch.int32, torch.int16, torch.uint8])
def test_other_integer_labels(backend: str, labels_dtype: torch.dtype) -> None:
    student, teacher, labels = make()
    got = kd_loss(student, teacher, labels.to(labels_dtype), backend=backend)
    assert torch.equal(got, kd_loss(student, teacher, labels, backend=backend))


def test_labels_of_any_stride(backend: str) -> None:
    student, teacher, _ = make()
    labels = torch.randint(V, (2 * N,))
    for view in (*(labels[offset:][:N] for offset in range(5)), labels[1::2]):
        got = kd_loss(student, teacher, view, backend=backend)
        check(got, eager_kd_loss(student, teacher, view), student)


@pytest.mark.parametrize("teacher_dtype", DTYPES)
def test_dtypes_are_independent(
    backend: str, dtype: torch.dtype, teacher_dtype: torch.dtype
) -> None:
    student, teacher, labels = make()
    student = student.detach().to(dtype).requires_grad_()
    teacher = teacher.to(teacher_dtype)
    loss = kd_loss(student, teacher, labels, backend=backend)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, eager_kd_loss(student, teacher, labels))
    assert gradient(loss, student).dtype == dtype


@pytest.mark.parametrize("double", ["student", "teacher", "both"])
def test_float64_runs_on_the_reference(double: str) -> None:
    student, teacher, labels = make()
    if double != "teacher":
        student = student.detach().double().requires_grad_()
    if double != "student":
        teacher = teacher.double()
    loss = kd_loss(student, teacher, labels, label_smoothing=0.1)
    assert loss.dtype == torch.float64
    want = eager_kd_loss(student, teacher, labels, label_smoothing=0.1)
    torch.testing.assert_close(loss, want, rtol=1e-14, atol=0)
    assert gradient(loss, student).dtype == student.dtype


# ------------------------------------------------------------------------------- without rows

#: (..., 4) without rows: one rank of DDP can have such a batch.
NO_ROWS: dict[str, Callable[[], Tensor]] = {
    "plain": lambda: torch.randn(0, 4),
    "transposed": lambda: torch.randn(4, 0).t(),
    "three dimensions": lambda: torch.randn(2, 0, 4),
    "three dimensions, last stride 7": lambda: torch.randn(0, 4, 7).transpose(1, 2),
    "three dimensions, permuted": lambda: torch.randn(4, 0, 7).permute(1, 2, 0),
    "four dimensions": lambda: torch.randn(2, 3, 0, 4).transpose(0, 1),
    "four dimensions, last stride 7": lambda: torch.randn(2, 0, 4, 7).transpose(2, 3),
    "a slice": lambda: torch.randn(3, 5, 9)[:, 2:2, 1:5],
    "every second entry": lambda: torch.randn(0, 8)[:, ::2],
    "expanded": lambda: torch.randn(1, 1, 4).expand(3, 0, 4),
}


@pytest.mark.parametrize("layout", NO_ROWS)
@pytest.mark.parametrize("kind", ["mean", "sum", "none", "in place"])
def test_no_rows_in_any_layout(backend: str, kind: str, layout: str, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"inplace": True} if kind == "in place" else {"reduction": kind}
    leaf = NO_ROWS[layout]().to(dtype).requires_grad_()
    leading = leaf.shape[:-1]
    weight = torch.randn(4, 4, dtype=dtype, requires_grad=True)
    labels = torch.zeros(leading, dtype=torch.int64)
    head = Head(NO_ROWS[layout](), torch.randn(4, 4))
    transposed = torch.randn(4, *leading).movedim(0, -1)
    student_sides = [leaf * 1.0] if kind == "in place" else [leaf * 1.0, Head(leaf, weight)]
    for student, teacher in product(student_sides, (NO_ROWS[layout](), transposed, head)):
        weights = {"token_weight": labels.float(), "backend": backend}
        loss = kd_loss(student, teacher, labels, **weights, **options)
        assert loss.shape == (leading if kind == "none" else ())
        assert loss.sum() == 0
        loss.sum().backward(retain_graph=True)
        assert leaf.grad is not None
        assert leaf.grad.shape == leaf.shape
    assert weight.grad is None or not weight.grad.any()


# ------------------------------------------------------------------------------ huge memory


class Place(torch.autograd.Function):
    """Copy a small leaf into a view of huge memory; return the view, which is then no leaf."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, view: Tensor) -> Tensor:
        return view.detach().copy_(leaf)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream.clone(), None


@pytest.mark.parametrize("inplace", [False, True])
def test_rows_at_an_offset_of_2_to_the_31(backend: str, inplace: bool) -> None:
    # 4 GiB of address space; only two rows are touched.
    buffers = [torch.empty(2**31 + 4096, dtype=torch.bfloat16) for _ in range(2)]
    views = [x.as_strided((2, 2100), (2**31, 1)) for x in buffers]
    student, teacher = pair(2, 2100, dtype=torch.bfloat16)
    views[1].copy_(teacher)
    labels = torch.tensor([5, 2099])
    leaf = student.clone().requires_grad_()
    placed = Place.apply(leaf, views[0])
    loss = kd_loss(placed, views[1], labels, inplace=inplace, backend=backend)
    want = scalar_and_gradient(student, teacher, labels, backend=backend)
    identical((loss.detach(), gradient(loss, leaf)), want)


def test_huge_views_of_stride_0(backend: str) -> None:
    student, teacher = pair(1, 300)
    labels = torch.tensor([7]).expand(500)
    want = scalar_and_gradient(student, teacher, labels[:1], backend=backend)
    expanded = [x.expand(500, 300) for x in (student, teacher)]
    got = rows_and_gradient(*expanded, labels, backend=backend)
    assert torch.equal(got[0], want[0].expand(500))
    constant = torch.zeros(1).expand(70_000)  # stride 0 over the vocabulary
    rows, by_student = rows_and_gradient(constant, constant, torch.tensor(3), backend=backend)
    torch.testing.assert_close(rows, torch.tensor(0.5 * math.log(70_000)))
    assert by_student.shape == (70_000,)
