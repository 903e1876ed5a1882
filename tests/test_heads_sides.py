"""Every pair of sides, and the scale of a Head: the loss of the logits that the sides stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from head_helpers import Heads, distance, make_heads, multiply_as_on_cuda
from helpers import DTYPES, as_loss
from torch import Tensor

from fused_kd import Head, kd_loss
from fused_kd.divergences import DIVERGENCES

INPLACE = [False, True]


def make(dtype: torch.dtype, rows: int = 37) -> tuple[Heads, Tensor]:
    """Heads of which every third row is ignored, and the student's logits, a leaf."""
    heads = make_heads(rows=rows, dtype=dtype)
    heads.labels[::3] = -100
    return heads, F.linear(*heads.student).detach().requires_grad_()


def of_logits(
    leaf: Tensor, heads: Heads, upstream: Tensor, inplace: bool = False, **keywords: Any
) -> tuple[Tensor, Tensor]:
    """The loss of the student's logits next to the teacher's Head, and its gradient."""
    student = leaf * 1 if inplace else leaf
    loss = kd_loss(student, heads.teacher_side, heads.labels, inplace=inplace, **keywords)
    loss = as_loss(loss)
    return loss.detach(), torch.autograd.grad(loss, leaf, upstream.to(loss.dtype))[0]


def exact(leaf: Tensor, heads: Heads, upstream: Tensor, **keywords: Any) -> tuple[Tensor, Tensor]:
    """The same by the float64 reference on whole logits."""
    student = leaf.detach().double().requires_grad_()
    teacher = F.linear(*(x.double() for x in heads.teacher))
    loss = as_loss(kd_loss(student, teacher, heads.labels, backend="reference", **keywords))
    return loss.detach(), torch.autograd.grad(loss, student, upstream.double())[0]


def same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    eps = torch.finfo(got[1].dtype).eps
    assert distance(got[0], want[0]) <= 1e-6
    assert distance(got[1], want[1]) <= 2e-6 + (0.0 if eps < 1e-6 else eps)


@pytest.mark.parametrize("inplace", INPLACE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_student_logits_next_to_a_teachers_head(
    dtype: torch.dtype, inplace: bool, backend: str
) -> None:
    heads, leaf = make(dtype)
    upstream = torch.tensor(3.0)
    for divergence in DIVERGENCES:
        keywords: dict[str, Any] = {"divergence": divergence, "temperature": 2.0}
        want = exact(leaf, heads, upstream, **keywords)
        for height in (5, 100):
            options = {**keywords, "chunk_rows": height, "backend": backend}
            got = of_logits(leaf, heads, upstream, inplace, **options)
            assert got[1].dtype == dtype
            same(got, want)
            assert not got[1][::3].any()


def test_student_logits_row_by_row(backend: str) -> None:
    heads, leaf = make(torch.float32)
    upstream = torch.rand(37) + 0.5
    keywords = {"reduction": "none", "label_smoothing": 0.1}
    got = of_logits(leaf, heads, upstream, chunk_rows=9, backend=backend, **keywords)
    same(got, exact(leaf, heads, upstream, **keywords))


@pytest.mark.parametrize("inplace", INPLACE)
def test_student_logits_of_any_layout(inplace: bool) -> None:
    """Two strides are used as stored, in place too; other layouts are copied chunk by chunk."""
    heads, leaf = make(torch.float32, rows=36)
    one = torch.tensor(1.0)
    want = of_logits(leaf, heads, one, chunk_rows=7)
    teacher = Head(heads.teacher_hidden.view(4, 9, -1), heads.teacher_weight)
    labels = heads.labels.view(4, 9)
    padded = F.pad(leaf.view(4, 9, -1), (0, 3, 0, 2), value=torch.nan)[:, :9, :-3]
    transposed = leaf.view(4, 9, -1).transpose(0, 1).contiguous().transpose(0, 1)
    layouts = [padded, transposed]
    if not inplace:
        layouts.append(torch.stack([leaf, leaf], -1)[..., 0].view(4, 9, -1))
    for student in layouts:
        loss = as_loss(kd_loss(student, teacher, labels, chunk_rows=7, inplace=inplace))
        assert torch.equal(loss.detach(), want[0])
        assert torch.equal(torch.autograd.grad(loss, leaf)[0], want[1])


def test_student_logits_in_place_are_overwritten_once() -> None:
    heads, leaf = make(torch.float32)
    student = leaf * 1
    pointer = student.data_ptr()
    loss = as_loss(kd_loss(student, heads.teacher_side, heads.labels, inplace=True, chunk_rows=5))
    (gradient,) = torch.autograd.grad(loss, student, retain_graph=True)
    assert gradient.data_ptr() == pointer
    with pytest.raises(RuntimeError, match="a second backward after inplace=True"):
        torch.autograd.grad(loss, student)
    other = make(torch.float32)[1]
    again = as_loss(kd_loss(other, heads.teacher_side, heads.labels, chunk_rows=5))
    first, second = (torch.autograd.grad(again, other, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("kept_rows", [None, 24, 30])
@pytest.mark.parametrize("inplace", INPLACE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_student_logits(
    dtype: torch.dtype, inplace: bool, kept_rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ignored rows, which are not numbers, are masked, or left out as far as kept_rows says."""
    multiply_as_on_cuda(monkeypatch)
    heads, leaf = make(dtype)
    upstream = torch.tensor(3.0)
    want = exact(leaf, heads, upstream)
    with torch.no_grad():
        leaf[::3] = torch.nan
        heads.teacher_hidden[::3] = torch.inf
    options = {"chunk_rows": 10, "kept_rows": kept_rows}
    got = of_logits(leaf, heads, upstream, inplace, **options)
    same(got, want)
    assert not got[1][::3].any()


@pytest.mark.parametrize("given", ["both", "student", "teacher"])
@pytest.mark.parametrize("scale", [1.7, -0.3])
def test_the_scale_of_a_head(scale: float, given: str, backend: str) -> None:
    """Bias included; it reaches the gradients of hidden states, weight and bias."""
    heads = make_heads()
    of_student, of_teacher = (scale if given in ("both", name) else 1.0
                              for name in ("student", "teacher"))  # fmt: skip
    bias = torch.randn(131)
    student = heads.student_side._replace(scale=of_student)
    teacher = Head(*heads.teacher, bias, of_teacher)
    wide = [x.detach().double().requires_grad_() for x in heads.student]
    logits = of_teacher * F.linear(*(x.double() for x in (*heads.teacher, bias)))
    keywords: dict[str, Any] = {"temperature": 2.0, "label_smoothing": 0.1}
    want = kd_loss(
        of_student * F.linear(*wide), logits, heads.labels, backend="reference", **keywords
    )
    want = as_loss(want)
    exact = torch.autograd.grad(want, wide)
    for height in (10, 100):
        options = {**keywords, "chunk_rows": height, "backend": backend}
        loss = as_loss(kd_loss(student, teacher, heads.labels, **options))
        torch.testing.assert_close(loss.double(), want, rtol=2e-6, atol=0)
        for mine, theirs in zip(torch.autograd.grad(loss, heads.student), exact, strict=True):
            torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("scale", [0.0, 1e-30, -1e30, torch.inf, torch.nan])
def test_a_scale_that_would_take_rows_out_is_refused(scale: float) -> None:
    heads = make_heads(rows=3)
    for name, student, teacher in (("student", scale, 1.0), ("teacher", 1.0, scale)):
        sides = Head(*heads.student, scale=student), Head(*heads.teacher, scale=teacher)
        with pytest.raises(ValueError, match=rf"{name}\.scale must be finite and not 0"):
            kd_loss(*sides, heads.labels)


def test_the_scale_of_a_head_as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = make_heads(dtype=torch.bfloat16)
    sides = Head(*heads.student, scale=0.25), Head(*heads.teacher, scale=0.25)
    logits = [0.25 * F.linear(*(x.double() for x in side[:3] if x is not None)) for side in sides]
    want = as_loss(kd_loss(*logits, heads.labels, backend="reference"))  # type: ignore[misc]
    exact = torch.autograd.grad(want, heads.student)
    multiply_as_on_cuda(monkeypatch)
    loss = as_loss(kd_loss(*sides, heads.labels, chunk_rows=10))
    assert distance(loss.detach(), want.detach()) < 1e-6
    for mine, theirs in zip(torch.autograd.grad(loss, heads.student), exact, strict=True):
        assert distance(mine, theirs) < 2e-2


def test_rows_and_to_of_a_head() -> None:
    heads = make_heads()
    head = Head(*heads.student, scale=0.5)
    moved = head.to(torch.bfloat16)
    assert {x.dtype for x in moved[:3] if isinstance(x, Tensor)} == {torch.bfloat16}
    assert (moved.scale, moved.softcap) == (0.5, None)
    assert Head(heads.hidden, heads.weight).to(torch.bfloat16).bias is None
    part = head.rows(slice(2, 9))
    assert part.hidden.shape == (7, 24)
    assert part.weight is heads.weight
    keywords: dict[str, Any] = {"reduction": "none"}
    whole = as_loss(kd_loss(head, heads.teacher_side, heads.labels, **keywords))
    some = kd_loss(part, heads.teacher_side.rows(slice(2, 9)), heads.labels[2:9], **keywords)
    assert torch.equal(as_loss(some), whole[2:9])
