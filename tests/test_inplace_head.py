"""The gradient over the student's logits next to a teacher's Head, in place and out of place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import DTYPES, TOLERANCE, as_loss, gradient
from torch import Tensor

from fused_kd import Head, kd_loss

B, S, V, H = 3, 4, 57, 10

#: (B, S, V) logits of a model from a larger tensor; the last two do not collapse to rows (N, V).
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": lambda x: x[:, 1:, :-3].contiguous(),
    "rows with a gap": lambda x: x.flatten(0, 1)[:12, :V].unflatten(0, (B, S)),
    "a slice of the sequence": lambda x: x[:, :-1, 3:],
    "batch and sequence exchanged": lambda x: x.transpose(0, 1)[:B, :S, :V],
}


def make(
    dtype: torch.dtype = torch.float32, view: str = "whole"
) -> tuple[Tensor, Tensor, Head, Tensor]:
    """A leaf, the logits that are computed of it, a teacher's head, labels with ignored rows."""
    shape = (S, B, V + 3) if "exchanged" in view else (B, S + 1, V + 3)
    leaf = (2 * torch.randn(shape)).to(dtype).requires_grad_()
    teacher = Head(torch.randn(B, S, H).to(dtype), torch.randn(V, H).to(dtype), torch.randn(V))
    labels = torch.randint(V, (B, S))
    labels[0, 1] = labels[2, :2] = -100
    return leaf, VIEWS[view](leaf * 1.0), teacher, labels


def run(student: Tensor, teacher: Head, labels: Tensor, **keywords: Any) -> Tensor:
    options: dict[str, Any] = {"temperature": 2.0, "chunk_rows": 5, **keywords}
    return as_loss(kd_loss(student, teacher, labels, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(("scale", "ignored"), [(1.0, True), (-0.3, True), (-0.3, False)])
def test_in_place_equals_out_of_place(
    backend: str, scale: float, ignored: bool, view: str, dtype: torch.dtype
) -> None:
    leaf, logits, teacher, labels = make(dtype, view)
    if not ignored:  # the rows of a chunk then follow each other
        labels = labels.clamp(min=0)
    before = logits.detach().clone()
    out_of_place = scale * run(logits, teacher, labels, backend=backend)
    want, by_leaf = torch.autograd.grad(out_of_place, (logits, leaf), retain_graph=True)
    assert torch.equal(logits, before)
    alone = before.contiguous().requires_grad_()
    loss = scale * run(alone, teacher, labels, backend=backend)
    assert torch.equal(loss, out_of_place)
    assert torch.equal(gradient(loss, alone), want)
    loss = scale * run(logits, teacher, labels, inplace=True, backend=backend)
    assert torch.equal(loss, out_of_place)
    # not by the logits: a view whose memory was written to has another node in the graph
    assert torch.equal(gradient(loss, leaf), by_leaf)
    assert torch.equal(logits, want)
    assert not want[labels == -100].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_the_slice_is_written(backend: str, dtype: torch.dtype) -> None:
    leaf, _, teacher, labels = make(dtype)
    whole = leaf * 1.0
    part = VIEWS["a slice of the sequence"](whole)
    gradient(run(part, teacher, labels, inplace=True, backend=backend), leaf)
    rest = torch.ones(whole.shape, dtype=torch.bool)
    rest[:, :-1, 3:] = False
    assert torch.equal(whole[rest], leaf[rest])
    assert not torch.equal(whole[~rest], leaf[~rest])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_has_the_memory_of_the_logits(backend: str, dtype: torch.dtype) -> None:
    _, logits, teacher, labels = make(dtype)
    loss = run(logits, teacher, labels, inplace=True, backend=backend)
    assert gradient(loss, logits).data_ptr() == logits.data_ptr()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_second_backward_out_of_place_gives_the_same(
    backend: str, dtype: torch.dtype, reduction: str
) -> None:
    _, logits, teacher, labels = make(dtype, "a slice of the sequence")
    loss = run(logits, teacher, labels, reduction=reduction, backend=backend)
    upstream = torch.full(loss.shape, 2.0)
    first = gradient(loss, logits, upstream, retain_graph=True)
    kept = first.clone()
    second = gradient(loss, logits, upstream, retain_graph=True)
    third = gradient(loss, logits, upstream)
    assert torch.equal(first, kept)
    assert torch.equal(second, third)
    torch.testing.assert_close(second, first, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_second_backward_in_place_is_refused(backend: str, dtype: torch.dtype) -> None:
    _, logits, teacher, labels = make(dtype)
    loss = run(logits, teacher, labels, inplace=True, backend=backend)
    gradient(loss, logits, retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward after inplace=True"):
        gradient(loss, logits)


def test_values_that_autograd_saved_before_raise(backend: str) -> None:
    _, logits, teacher, labels = make()
    squares, version = logits.square(), logits._version
    loss = run(logits, teacher, labels, inplace=True, backend=backend)
    assert logits._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + squares.sum()).backward()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_nothing_is_written_without_gradients(backend: str, context: Any) -> None:
    _, logits, teacher, labels = make()
    before, version = logits.detach().clone(), logits._version
    with context():
        loss = run(logits, teacher, labels, inplace=True, backend=backend)
    detached = run(logits.detach(), teacher, labels, inplace=True, backend=backend)
    assert torch.equal(logits, before)
    assert logits._version == version
    want = run(logits, teacher, labels, backend=backend)
    assert torch.equal(loss, want)
    assert torch.equal(detached, want)


def test_logits_that_do_not_collapse_are_refused_in_place(backend: str) -> None:
    base = torch.randn(2, 2, 6, 3, V, requires_grad=True) * 1.0
    student = base[:, :1, :2].transpose(2, 3)
    teacher = Head(torch.randn(*student.shape[:-1], H), torch.randn(V, H))
    labels = torch.randint(V, student.shape[:-1])
    before = base.detach().clone()
    with pytest.raises(ValueError, match="leading dimensions that collapse to two strides"):
        run(student, teacher, labels, inplace=True, backend=backend)
    assert torch.equal(base, before)
    want = gradient(run(student.contiguous(), teacher, labels, backend=backend), base)
    assert torch.equal(gradient(run(student, teacher, labels, backend=backend), base), want)
