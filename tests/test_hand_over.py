"""The gradient of the forward is handed over once, regardless of how often it is requested."""

from __future__ import annotations

from collections.abc import Callable
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from support.heads import make_heads
from support.logits import V, make_ignored
from torch import Tensor

from fused_kd import Head, kd_loss

Graph = tuple[Tensor, tuple[Tensor, ...]]  # a loss, and what it is differentiated by


def from_logits(dtype: torch.dtype, **keywords: Any) -> Graph:
    student, teacher, labels = make_ignored(dtype)
    return kd_loss(student, teacher, labels, **keywords), (student,)


def from_heads(dtype: torch.dtype, **keywords: Any) -> Graph:
    heads = make_heads(rows=12, dtype=dtype)
    loss = kd_loss(heads.student_side, heads.teacher_side, heads.labels, chunk_rows=5, **keywords)
    return loss, heads.student


def from_logits_and_a_head(dtype: torch.dtype, **keywords: Any) -> Graph:
    student, _, labels = make_ignored(dtype)
    head = Head(torch.randn(len(labels), 4).to(dtype), torch.randn(V, 4).to(dtype))
    return kd_loss(student, head, labels, chunk_rows=2, **keywords), (student,)


LEVELS = pytest.mark.parametrize("make", [from_logits, from_heads, from_logits_and_a_head])


def in_threads(function: Callable[[], Any]) -> list[Any]:
    """Call a function in two threads that start together; return what each returned or raised."""
    barrier, results = Barrier(2), list[Any]()

    def run() -> None:
        barrier.wait()
        try:
            results.append(function())
        except Exception as error:
            results.append(error)

    threads = [Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@LEVELS
def test_two_threads_in_the_backward_of_one_graph(
    backend: str, dtype: torch.dtype, make: Callable[..., Graph]
) -> None:
    upstream = torch.tensor(2.0)  # a scale that rounds nothing
    for _ in range(5):
        loss, inputs = make(dtype, backend=backend)
        results = in_threads(
            lambda loss=loss, inputs=inputs: torch.autograd.grad(
                loss, inputs, upstream, retain_graph=True
            )
        )
        once = torch.autograd.grad(loss, inputs)
        for gradients in results:
            for got, want in zip(gradients, once, strict=True):
                torch.testing.assert_close(got, 2 * want, rtol=1e-2, atol=1e-6)


def test_in_place_one_of_two_threads_raises(backend: str, dtype: torch.dtype) -> None:
    student, teacher, labels = make_ignored(dtype)
    want = torch.autograd.grad(kd_loss(student, teacher, labels, backend=backend), student)
    logits = student * 1.0
    loss = kd_loss(logits, teacher, labels, inplace=True, backend=backend)
    outcomes = in_threads(
        lambda: torch.autograd.grad(loss, logits, torch.tensor(2.0), retain_graph=True)[0].clone()
    )
    (error,) = (x for x in outcomes if isinstance(x, Exception))
    assert "a second backward after inplace=True" in str(error)
    (gradient,) = (x for x in outcomes if isinstance(x, Tensor))
    torch.testing.assert_close(gradient, 2 * want[0], rtol=1e-2, atol=1e-6)


@LEVELS
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_batch_of_upstream_gradients(
    backend: str, dtype: torch.dtype, reduction: str, make: Callable[..., Graph]
) -> None:
    # torch.autograd.functional.jacobian(vectorize=True) does this.
    loss, inputs = make(dtype, backend=backend, reduction=reduction)
    upstream = torch.rand(3, *loss.shape)
    torch.autograd.grad(loss, inputs, upstream[0], retain_graph=True)  # takes the first gradient
    batch = torch.autograd.grad(loss, inputs, upstream, is_grads_batched=True, retain_graph=True)
    for i, vector in enumerate(upstream):
        want = torch.autograd.grad(loss, inputs, vector, retain_graph=True)
        for got, expected in zip(batch, want, strict=True):
            assert torch.equal(got[i], expected)


@LEVELS
@pytest.mark.parametrize("by_vmap", [False, True])
def test_a_batch_leaves_the_first_gradient_alone(
    backend: str, by_vmap: bool, make: Callable[..., Graph]
) -> None:
    loss, inputs = make(torch.float32, backend=backend)

    def backward(upstream: Tensor, **keywords: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, inputs, upstream, retain_graph=True, **keywords)

    upstream = torch.tensor([2.0, 4.0])
    batch = torch.vmap(backward)(upstream) if by_vmap else backward(upstream, is_grads_batched=True)
    for got, want in zip(batch, torch.autograd.grad(loss, inputs), strict=True):
        torch.testing.assert_close(got, torch.stack([2 * want, 4 * want]))


@LEVELS
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_batch_is_not_differentiated_again(
    backend: str, reduction: str, make: Callable[..., Graph]
) -> None:
    loss, inputs = make(torch.float32, backend=backend, reduction=reduction)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(
            loss, inputs, torch.ones(3, *loss.shape), is_grads_batched=True, create_graph=True
        )


def test_a_batch_in_place_is_refused(backend: str) -> None:
    student, teacher, labels = make_ignored()
    logits = student * 1.0
    loss = kd_loss(logits, teacher, labels, inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match=r"a batch of upstream gradients .*: pass inplace=False"):
        torch.autograd.grad(loss, logits, torch.ones(2), is_grads_batched=True)


def test_transforms_of_torch_func_are_refused(backend: str) -> None:
    student, teacher, labels = (x.detach() for x in make_ignored())
    heads = make_heads()

    def on_logits(x: Tensor) -> Tensor:
        return kd_loss(x, teacher, labels, backend=backend)

    def on_hidden(x: Tensor) -> Tensor:
        return kd_loss(Head(x, heads.weight), heads.teacher_side, heads.labels)

    for function, x in ((on_logits, student), (on_hidden, heads.hidden.detach())):
        for transform in (torch.func.grad, torch.func.vmap, torch.func.jacrev):
            with pytest.raises(RuntimeError, match=r"does not run under torch\.func"):
                transform(function)(x)
