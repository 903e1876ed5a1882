"""inplace=True: the gradient over the student's memory, and every way to refuse it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from helpers import DTYPES, TOLERANCE, N, V, as_loss, gradient, grown, make_ignored

from fused_kd import kd_loss
from fused_kd.testing import eager_kd_loss


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 2.0, -0.7])
def test_in_place_gives_the_same_gradient_in_the_students_memory(
    backend: str, dtype: torch.dtype, scale: float
) -> None:
    student, teacher, labels = make_ignored(dtype)
    want = gradient(scale * as_loss(kd_loss(student, teacher, labels, backend=backend)), student)
    logits = student * 1.0
    address = logits.data_ptr()
    loss = scale * as_loss(kd_loss(logits, teacher, labels, inplace=True, backend=backend))
    (got,) = torch.autograd.grad(loss, logits)
    assert got.data_ptr() == address
    # a scale is applied to the rounded gradient of 16 bits here: one more rounding
    torch.testing.assert_close(got, want, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_reaches_the_leaf(backend: str, dtype: torch.dtype) -> None:
    student, teacher, labels = make_ignored(dtype)
    want = gradient(as_loss(kd_loss(student, teacher, labels, backend=backend)), student)
    loss = as_loss(kd_loss(student * 1.0, teacher, labels, inplace=True, backend=backend))
    torch.testing.assert_close(gradient(loss, student), want, **TOLERANCE[dtype])


def test_in_place_bumps_the_version_so_that_saved_values_raise_R_18(backend: str) -> None:
    student, teacher, labels = make_ignored()
    logits = student * 1.0
    probabilities = logits.square()  # saves logits
    version = logits._version
    loss = as_loss(kd_loss(logits, teacher, labels, inplace=True, backend=backend))
    assert logits._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + probabilities.sum()).backward()


def test_a_write_between_forward_and_backward_raises(backend: str) -> None:
    student, teacher, labels = make_ignored()
    logits = student * 1.0
    loss = as_loss(kd_loss(logits, teacher, labels, inplace=True, backend=backend))
    with torch.no_grad():
        logits.zero_()
    with pytest.raises(RuntimeError, match=r"an input of the loss was written to .* inplace=True"):
        loss.backward()


def test_two_slices_of_one_tensor_raise_and_name_inplace(backend: str) -> None:
    student, teacher, labels = make_ignored()
    logits, half = student * 1.0, N // 2
    for part in (slice(0, half), slice(half, N)):  # one slice alone works
        loss = kd_loss(logits[part], teacher[part], labels[part], inplace=True, backend=backend)
        if part.start == 0:
            first = as_loss(loss)
    as_loss(loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"inplace=True.* another slice of the same tensor"):
        first.backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_second_backward_in_place_raises(backend: str, dtype: torch.dtype) -> None:
    student, teacher, labels = make_ignored(dtype)
    logits = student * 1.0
    loss = as_loss(kd_loss(logits, teacher, labels, inplace=True, backend=backend))
    torch.autograd.grad(loss, logits, retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward after inplace=True"):
        torch.autograd.grad(loss, logits)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_in_place_writes_nothing_without_gradients(backend: str, context: Any) -> None:
    student, teacher, labels = make_ignored()
    before = student.detach().clone()
    with context():
        loss = kd_loss(student, teacher, labels, inplace=True, backend=backend)
    assert torch.equal(student, before)
    torch.testing.assert_close(loss, eager_kd_loss(student, teacher, labels).detach())
    plain = student.detach().expand(N, V)
    kd_loss(plain, teacher, labels, inplace=True, backend=backend)
    assert torch.equal(plain, before)


def test_in_place_in_a_view_of_the_students_memory(backend: str) -> None:
    student, teacher, labels = make_ignored()
    want = gradient(as_loss(kd_loss(student, teacher, labels, backend=backend)), student)
    wide = torch.cat([student, torch.zeros(N, 5)], 1)
    loss = as_loss(kd_loss(wide[:, :V], teacher, labels, inplace=True, backend=backend))
    assert torch.equal(wide[:, V:], torch.zeros(N, 5))
    torch.testing.assert_close(gradient(loss, student), want, **TOLERANCE[torch.float32])


# -------------------------------------------------------------------------------------- refused

INPLACE = {
    "a leaf": (torch.randn(2, 3, 5, requires_grad=True), "student logits that a model computed"),
    "expanded": (grown(2, 1, 5).expand(2, 3, 5), "whose entries do not share memory; got shape"),
    "overlapping": (grown(40).as_strided((2, 3, 5), (15, 4, 1)), "do not share memory"),
    "transposed vocabulary": (grown(2, 5, 3).mT, "a last stride of 1 and leading dimensions"),
    "leading dimensions that do not fold": (
        grown(4, 6, 8, 5)[:3, :4, :6],
        "a last stride of 1 and leading dimensions",
    ),
}


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


_FORBIDDEN = "student logits that autograd lets be written to; got a view made by chunk, split"
INPLACE |= {
    "a chunk": (grown(4, 3, 5).chunk(2)[0], _FORBIDDEN),
    "a slice of a split": (grown(4, 3, 5).split(2)[1][:1], _FORBIDDEN),
    "unbound": (grown(4, 3, 5).unbind(1)[2], _FORBIDDEN),
    "a custom Function's view": (_Identity.apply(grown(2, 3, 5)), _FORBIDDEN),  # type: ignore[no-untyped-call]
}


@pytest.mark.parametrize("case", INPLACE)
def test_inplace_writes_nothing_where_it_cannot(case: str, backend: str) -> None:
    student, message = INPLACE[case]
    before, version = student.detach().clone(), student._version
    with pytest.raises(ValueError, match=re.escape(message)):
        kd_loss(
            student,
            torch.randn(student.shape),
            torch.zeros(student.shape[:-1], dtype=torch.int64),
            inplace=True,
            backend=backend,
        )
    assert torch.equal(student, before)
    assert student._version == version


def test_a_bad_label_in_place_writes_nothing(backend: str) -> None:
    student, labels = grown(2, 3, 5), torch.full((2, 3), 7)
    before = student.detach().clone()
    with pytest.raises(ValueError, match="labels must be in"):
        kd_loss(student, torch.randn(2, 3, 5), labels, inplace=True, backend=backend)
    assert torch.equal(student, before)


def test_an_empty_batch_in_place(backend: str) -> None:
    student = grown(0, 5)
    student.retain_grad()
    labels = torch.zeros(0, dtype=torch.int64)
    kd_loss(student, torch.randn(0, 5), labels, inplace=True, backend=backend).backward()  # type: ignore[union-attr]
    assert student.grad is not None


def test_a_view_of_a_parameter_is_refused(backend: str) -> None:
    parameter = torch.randn(4, 50).requires_grad_()
    before = parameter.detach().clone()
    with pytest.raises(ValueError, match="a leaf tensor that requires grad, or a view of one"):
        kd_loss(
            parameter.view(2, 2, 50),
            torch.randn(2, 2, 50),
            torch.zeros(2, 2, dtype=torch.int64),
            inplace=True,
            backend=backend,
        )
    assert torch.equal(parameter, before)


def test_a_teacher_that_partly_shares_the_students_memory_is_refused(backend: str) -> None:
    both = grown(5, 50)
    labels = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="a teacher in its own memory"):
        kd_loss(both[1:], both.detach()[:-1], labels, inplace=True, backend=backend)
    loss = kd_loss(both, both.detach(), torch.zeros(5, dtype=torch.int64), inplace=True)
    assert loss.isfinite()  # type: ignore[union-attr]
