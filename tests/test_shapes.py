"""Divergences, shapes, strides and dtypes against the eager composition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.logits import DTYPES, N, V, check, make

from fused_kd import kd_loss
from fused_kd.divergences import DIVERGENCES
from fused_kd.rows import logit_rows
from fused_kd.testing import eager_kd_loss


@pytest.mark.parametrize("soft_scale", ["t2", "none"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
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
def test_shapes_R_38(backend: str, leading: tuple[int, ...], reduction: str) -> None:
    student = torch.randn(*leading, V, requires_grad=True)
    teacher, labels = torch.randn(*leading, V), torch.randint(V, leading)
    got = kd_loss(student, teacher, labels, reduction=reduction, backend=backend)
    assert got.shape == (leading if reduction == "none" else ())
    assert got.dtype == torch.float32
    check(got, eager_kd_loss(student, teacher, labels, reduction=reduction), student)


# views of a (4, 6, V+3) base: how each is addressed
VIEWS: dict[str, Any] = {
    "sliced sequence: two strides R-54": lambda x: x[:, :-1, :V],
    "transposed batch and sequence R-54": lambda x: x.transpose(0, 1)[:, :, :V],
    "odd offset and row stride R-53": lambda x: x[1:, 1:, 2 : 2 + V],
    "expanded": lambda x: x[:1, :, :V].expand(4, 6, V),
    "overlapping": lambda x: x.as_strided((4, 6, V), (7, 3, 1)),
    "copied: last stride is not 1": lambda x: x.transpose(1, 2)[:, :V, :].transpose(1, 2),
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
        (base[..., :4, :V], other),  # the student decides where to fold
        (other, base[..., :4, :V]),  # the teacher does
        (other[0], base[0, :, :4, :V]),
        (other[0, 0], base[0, 0, :4, :V]),
        (other[0, 0, 0], base[0, 0, 0, :V]),
    ):
        for given, seen in zip((student, teacher), logit_rows(student, teacher), strict=True):
            assert seen.dim() == 3
            assert seen.data_ptr() == given.data_ptr()


@pytest.mark.parametrize("labels_dtype", [torch.int32, torch.int16, torch.uint8])
def test_other_integer_labels(backend: str, labels_dtype: torch.dtype) -> None:
    student, teacher, labels = make()
    got = kd_loss(student, teacher, labels.to(labels_dtype), backend=backend)
    assert torch.equal(got, kd_loss(student, teacher, labels, backend=backend))


def test_shifted_labels_view_R_52(backend: str) -> None:
    student, teacher, _ = make()
    for offset in range(5):
        labels = torch.randint(V, (N + 5,))[offset : offset + N]
        check(
            kd_loss(student, teacher, labels, backend=backend),
            eager_kd_loss(student, teacher, labels),
            student,
        )


@pytest.mark.parametrize("teacher_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_are_independent_R_48(
    backend: str, dtype: torch.dtype, teacher_dtype: torch.dtype
) -> None:
    student, teacher, labels = make()
    student = student.detach().to(dtype).requires_grad_()
    teacher = teacher.to(teacher_dtype)
    loss = kd_loss(student, teacher, labels, backend=backend)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, eager_kd_loss(student, teacher, labels))
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.dtype == dtype


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
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.dtype == student.dtype
