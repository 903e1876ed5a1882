"""inplace=True: the gradient over the student's memory, next to a teacher's logits or Head.

What is refused before anything is written is in test_bad_input.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.logits import TOLERANCE, gradient
from torch import Tensor

from fused_kd import Head, kd_loss
from fused_kd.sides import Side

B, S, V, H = 3, 4, 57, 10
TEACHERS = pytest.mark.parametrize("kind", ["logits", "head"])

#: Logits (B, S, V) of a larger tensor; the last two do not collapse to rows (N, V).
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": lambda x: x[:, 1:, :-3].contiguous(),
    "rows with a gap": lambda x: x.flatten(0, 1)[:12, :V].unflatten(0, (B, S)),
    "a slice of the sequence": lambda x: x[:, :-1, 3:],
    "batch and sequence exchanged": lambda x: x.transpose(0, 1)[:B, :S, :V],
}


def make(
    kind: str, dtype: torch.dtype = torch.float32, view: str = "whole"
) -> tuple[Tensor, Tensor, Side, Tensor]:
    """Return a leaf, logits (B, S, V) computed from it, a teacher, and labels with ignored rows."""
    shape = (S, B, V + 3) if "exchanged" in view else (B, S + 1, V + 3)
    leaf = (2 * torch.randn(shape)).to(dtype).requires_grad_()
    head = Head(torch.randn(B, S, H).to(dtype), torch.randn(V, H).to(dtype), torch.randn(V))
    labels = torch.randint(V, (B, S))
    labels[0, 1] = labels[2, :2] = -100
    teacher = head if kind == "head" else torch.randn(B, S, V).to(dtype)
    return leaf, VIEWS[view](leaf * 1.0), teacher, labels


def run(student: Tensor, teacher: Side, labels: Tensor, **keywords: Any) -> Tensor:
    chunks = {"chunk_rows": 5} if isinstance(teacher, Head) else {}
    return kd_loss(student, teacher, labels, **{"temperature": 2.0, **chunks, **keywords})


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(("scale", "ignored"), [(1.0, True), (-0.3, True), (-0.3, False)])
@TEACHERS
def test_in_place_equals_out_of_place(
    backend: str, kind: str, scale: float, ignored: bool, view: str, dtype: torch.dtype
) -> None:
    leaf, logits, teacher, labels = make(kind, dtype, view)
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
    # over a teacher's logits, a scale is applied to the rounded gradient: one more rounding
    exact = {"rtol": 0, "atol": 0} if kind == "head" or scale == 1 else TOLERANCE[dtype]
    # not by the logits: a view whose memory was written to has another node in the graph
    torch.testing.assert_close(gradient(loss, leaf), by_leaf, **exact)
    torch.testing.assert_close(logits.detach(), want, **exact)
    assert not want[labels == -100].any()


@TEACHERS
def test_only_the_slice_is_written(backend: str, kind: str, dtype: torch.dtype) -> None:
    leaf, _, teacher, labels = make(kind, dtype)
    whole = leaf * 1.0
    part = VIEWS["a slice of the sequence"](whole)
    gradient(run(part, teacher, labels, inplace=True, backend=backend), leaf)
    rest = torch.ones(whole.shape, dtype=torch.bool)
    rest[:, :-1, 3:] = False
    assert torch.equal(whole[rest], leaf[rest])
    assert not torch.equal(whole[~rest], leaf[~rest])


@TEACHERS
def test_the_gradient_has_the_memory_of_the_logits_and_is_given_once(
    backend: str, kind: str, dtype: torch.dtype
) -> None:
    _, logits, teacher, labels = make(kind, dtype)
    loss = run(logits, teacher, labels, inplace=True, backend=backend)
    assert gradient(loss, logits, retain_graph=True).data_ptr() == logits.data_ptr()
    with pytest.raises(RuntimeError, match="a second backward after inplace=True"):
        gradient(loss, logits)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_backward_out_of_place_gives_the_same(
    backend: str, dtype: torch.dtype, reduction: str
) -> None:
    # Next to a Head; test_autograd.py has it for logits.
    _, logits, teacher, labels = make("head", dtype, "a slice of the sequence")
    loss = run(logits, teacher, labels, reduction=reduction, backend=backend)
    upstream = torch.full(loss.shape, 2.0)
    first = gradient(loss, logits, upstream, retain_graph=True)
    kept = first.clone()
    second = gradient(loss, logits, upstream, retain_graph=True)
    assert torch.equal(first, kept)
    assert torch.equal(second, gradient(loss, logits, upstream))
    torch.testing.assert_close(second, first, **TOLERANCE[dtype])


@TEACHERS
def test_values_that_autograd_saved_before_raise(backend: str, kind: str) -> None:
    _, logits, teacher, labels = make(kind)
    squares, version = logits.square(), logits._version
    loss = run(logits, teacher, labels, inplace=True, backend=backend)
    assert logits._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + squares.sum()).backward()


@TEACHERS
def test_a_write_between_forward_and_backward_raises(backend: str, kind: str) -> None:
    _, logits, teacher, labels = make(kind)
    loss = run(logits, teacher, labels, inplace=True, backend=backend)
    with torch.no_grad():
        logits.zero_()
    with pytest.raises(RuntimeError, match=r"an input of the loss was written to .* inplace=True"):
        loss.backward()


def test_two_slices_of_one_tensor_raise_and_name_inplace(backend: str) -> None:
    _, logits, teacher, labels = make("logits")
    first, second = (
        run(logits[part], teacher[part], labels[part], inplace=True, backend=backend)
        for part in (slice(0, 1), slice(1, 3))
    )
    second.backward(retain_graph=True)  # one slice alone works
    with pytest.raises(RuntimeError, match=r"inplace=True.* another slice of the same tensor"):
        first.backward()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@TEACHERS
def test_nothing_is_written_without_gradients(backend: str, kind: str, context: Any) -> None:
    _, logits, teacher, labels = make(kind)
    before, version = logits.detach().clone(), logits._version
    with context():
        loss = run(logits, teacher, labels, inplace=True, backend=backend)
    detached = run(logits.detach(), teacher, labels, inplace=True, backend=backend)
    expanded = logits.detach()[:1].expand(logits.shape)  # entries share memory
    run(expanded, teacher, labels, inplace=True, backend=backend)
    assert torch.equal(logits, before)
    assert logits._version == version
    want = run(logits, teacher, labels, backend=backend)
    assert torch.equal(loss, want)
    assert torch.equal(detached, want)


def test_logits_that_do_not_collapse_are_copied_out_of_place(backend: str) -> None:
    base = torch.randn(2, 2, 6, 3, V, requires_grad=True)
    student = base[:, :1, :2].transpose(2, 3)
    teacher = Head(torch.randn(*student.shape[:-1], H), torch.randn(V, H))
    labels = torch.randint(V, student.shape[:-1])
    want = gradient(run(student.contiguous(), teacher, labels, backend=backend), base)
    assert torch.equal(gradient(run(student, teacher, labels, backend=backend), base), want)
