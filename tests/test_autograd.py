"""Which gradient comes when: upstream gradients, second backwards, requires_grad."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, TOLERANCE, N, V, as_loss, gradient, make_ignored
from torch import Tensor

from fused_kd import KDLossParts, kd_loss
from fused_kd.testing import eager_kd_loss

# ----------------------------------------------------------------------------- upstream gradients


@pytest.mark.parametrize("scale", [1.0, 0.0, -3.0, 0.37, 65536.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scalar_upstream_gradient(backend: str, dtype: torch.dtype, scale: float) -> None:
    student, teacher, labels = make_ignored(dtype)
    loss = as_loss(kd_loss(student, teacher, labels, temperature=2.0, backend=backend))
    got = gradient(scale * loss, student)
    want = gradient(scale * eager_kd_loss(student, teacher, labels, temperature=2.0), student)
    assert got.dtype == dtype
    assert loss.dtype == torch.float32
    tolerance = TOLERANCE[dtype]
    atol = tolerance["atol"] * max(1.0, scale)  # rounding before the scale grows with it
    torch.testing.assert_close(got, want, rtol=tolerance["rtol"], atol=atol)


def test_float16_gradients_survive_through_a_loss_scale(backend: str) -> None:
    student = torch.zeros(1, 60000, dtype=torch.float16, requires_grad=True)
    teacher = torch.zeros(1, 60000, dtype=torch.float16)
    teacher[0, 0] = 40.0  # q is 1 there and about 0 elsewhere; p is 1/60000
    loss = as_loss(
        kd_loss(student, teacher, hard_weight=0, soft_weight=1, num_items=1e5, backend=backend)
    )
    exact = 1 / 60000 / 1e5
    assert torch.tensor(exact, dtype=torch.float16) == 0  # what a gradient of the forward would be
    got = gradient(65536.0 * loss, student)
    assert got[0, 1].item() == pytest.approx(65536 * exact, rel=1e-2)


UPSTREAM = {
    "random R-23": lambda: torch.randn(N),
    "zero": lambda: torch.zeros(N),
    "expanded R-24": lambda: torch.tensor(2.0).expand(N),
    "transposed R-24": lambda: torch.randn(N, 3)[:, 1],
}


@pytest.mark.parametrize("kind", UPSTREAM)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_upstream_gradient(backend: str, dtype: torch.dtype, kind: str) -> None:
    student, teacher, labels = make_ignored(dtype)
    upstream = UPSTREAM[kind]()
    before = upstream.clone()
    rows = as_loss(kd_loss(student, teacher, labels, reduction="none", backend=backend))
    got = gradient(rows, student, upstream)
    want = gradient(eager_kd_loss(student, teacher, labels, reduction="none"), student, upstream)
    torch.testing.assert_close(got, want, **TOLERANCE[dtype])
    assert torch.equal(upstream, before)
    assert torch.equal(got[0], torch.zeros_like(got[0]))


@pytest.mark.parametrize("reduce", [Tensor.sum, Tensor.mean, lambda x: x.square().sum()])
def test_rows_reduced_by_the_caller_R_24(backend: str, reduce: Any) -> None:
    student, teacher, labels = make_ignored()
    rows = as_loss(kd_loss(student, teacher, labels, reduction="none", backend=backend))
    want = reduce(eager_kd_loss(student, teacher, labels, reduction="none"))
    torch.testing.assert_close(
        gradient(reduce(rows), student), gradient(want, student), **TOLERANCE[torch.float32]
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_not_finite_upstream_gradient_does_not_reach_ignored_rows(
    backend: str, reduction: str
) -> None:
    student, teacher, labels = make_ignored(torch.float16)  # the gradient is made in the backward
    loss = as_loss(kd_loss(student, teacher, labels, reduction=reduction, backend=backend))
    got = gradient(loss, student, torch.full(loss.shape, torch.inf))
    assert torch.equal(got[0], torch.zeros_like(got[0]))
    assert not got[1:].isfinite().all(1).any()


@pytest.mark.parametrize(
    "weights", [{"hard_weight": 0.0}, {"soft_weight": 0.0}, {"hard_weight": 0.9}]
)
def test_each_term_alone_has_its_gradient_R_26(backend: str, weights: dict[str, float]) -> None:
    student, teacher, labels = make_ignored()
    got = as_loss(kd_loss(student, teacher, labels, backend=backend, **weights))
    want = eager_kd_loss(student, teacher, labels, **weights)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        gradient(got, student), gradient(want, student), **TOLERANCE[torch.float32]
    )


def test_both_weights_zero_is_zero_with_a_graph(backend: str) -> None:
    student, teacher, labels = make_ignored()
    loss = as_loss(kd_loss(student, teacher, labels, hard_weight=0, soft_weight=0, backend=backend))
    assert loss.item() == 0
    assert torch.equal(gradient(loss, student), torch.zeros(N, V))


# ------------------------------------------------------------------------------ second backwards


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_retain_graph_gives_the_same_gradient_again_R_20(
    backend: str, dtype: torch.dtype, reduction: str
) -> None:
    student, teacher, labels = make_ignored(dtype)
    loss = as_loss(kd_loss(student, teacher, labels, reduction=reduction, backend=backend))
    upstream = torch.full(loss.shape, 2.0)
    first = gradient(loss, student, upstream, retain_graph=True)
    kept = first.clone()
    second = gradient(loss, student, upstream, retain_graph=True)
    third = gradient(loss, student, upstream)
    torch.testing.assert_close(second, kept, **TOLERANCE[dtype])
    assert torch.equal(second, third)
    assert torch.equal(first, kept)  # what was handed over is not touched again
    want = gradient(eager_kd_loss(student, teacher, labels, reduction=reduction), student, upstream)
    torch.testing.assert_close(second, want, **TOLERANCE[dtype])


def test_a_second_backward_without_retain_graph_raises(backend: str) -> None:
    student, teacher, labels = make_ignored()
    loss = as_loss(kd_loss(student, teacher, labels, backend=backend))
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("squared", [False, True])
def test_double_backward_raises(backend: str, reduction: str, squared: bool) -> None:
    student, teacher, labels = make_ignored()
    loss = as_loss(kd_loss(student, teacher, labels, reduction=reduction, backend=backend)).sum()
    loss = loss.square() if squared else loss
    first = gradient(loss, student, create_graph=True)
    assert first.requires_grad
    with pytest.raises(RuntimeError, match="kd_loss cannot be differentiated twice"):
        first.square().sum().backward()


def test_a_gradient_penalty_beside_the_loss_raises(backend: str) -> None:
    student, teacher, labels = make_ignored()
    weight = torch.randn(V, V, requires_grad=True)
    loss = as_loss(kd_loss(student @ weight, teacher, labels, backend=backend))
    (first,) = torch.autograd.grad(loss, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        (loss + first.square().sum()).backward()


# ------------------------------------------------------------------- inputs are left as they were


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_and_versions_are_untouched_R_18(
    backend: str, dtype: torch.dtype, reduction: str
) -> None:
    inputs = make_ignored(dtype)
    before = [x.detach().clone() for x in inputs]
    versions = [x._version for x in inputs]
    as_loss(kd_loss(*inputs, reduction=reduction, backend=backend)).sum().backward()
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
    assert [x._version for x in inputs] == versions


def test_a_softmax_beside_the_loss_has_the_right_gradient_R_18(backend: str) -> None:
    student, teacher, labels = make_ignored()

    def total(loss: Any, **keywords: Any) -> Tensor:
        logits = student * 1.0
        return logits.softmax(-1).square().sum() + loss(logits, teacher, labels, **keywords)

    got = gradient(total(kd_loss, backend=backend), student)
    want = gradient(total(eager_kd_loss), student)
    torch.testing.assert_close(got, want, **TOLERANCE[torch.float32])


def test_two_losses_on_the_same_logits_R_19(backend: str) -> None:
    student, teacher, labels = make_ignored()

    def total(loss: Any, **keywords: Any) -> Tensor:
        logits = student * 1.0
        one = loss(logits, teacher, labels, **keywords)
        two = loss(logits, teacher.flip(0), labels, divergence="reverse_kl", **keywords)
        cross_entropy: Tensor = F.cross_entropy(logits, labels)
        return cross_entropy + one + 3 * two

    got = gradient(total(kd_loss, backend=backend), student)
    want = gradient(total(eager_kd_loss), student)
    torch.testing.assert_close(got, want, **TOLERANCE[torch.float32])


def test_activation_checkpointing_R_19(backend: str) -> None:
    student, teacher, labels = make_ignored()

    def block(x: Tensor) -> Tensor:
        return as_loss(kd_loss(x * 1.0, teacher, labels, backend=backend))

    plain = gradient(block(student), student)
    checkpointed = torch.utils.checkpoint.checkpoint(block, student, use_reentrant=False)
    assert torch.equal(gradient(checkpointed, student), plain)


# ------------------------------------------------------------------- who requires grad, and where


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_subset_of_requires_grad_R_29(
    backend: str, reduction: str, context: Any, requires_grad: bool
) -> None:
    student, teacher, labels = make_ignored()
    student = student.detach().requires_grad_(requires_grad)
    with context():
        loss = as_loss(kd_loss(student, teacher, labels, reduction=reduction, backend=backend))
    assert loss.requires_grad == (requires_grad and context is torch.enable_grad)
    want = eager_kd_loss(student, teacher, labels, reduction=reduction)
    torch.testing.assert_close(loss.detach().clone(), want.detach())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_teacher_made_in_inference_mode(backend: str, dtype: torch.dtype, reduction: str) -> None:
    student, teacher, labels = make_ignored(dtype)
    with torch.inference_mode():
        inference_teacher = teacher * 1.0
    loss = as_loss(
        kd_loss(student, inference_teacher, labels, reduction=reduction, backend=backend)
    )
    want = as_loss(kd_loss(student, teacher, labels, reduction=reduction, backend=backend))
    ones = torch.full(loss.shape, 0.3)
    first = gradient(loss, student, ones, retain_graph=True)
    torch.testing.assert_close(first, gradient(want, student, ones), rtol=0, atol=0)
    torch.testing.assert_close(gradient(loss, student, ones), first, **TOLERANCE[dtype])


def test_the_parts_are_detached(backend: str) -> None:
    for reduction in ("mean", "none"):
        parts = kd_loss(*make_ignored(), return_parts=True, reduction=reduction, backend=backend)
        assert isinstance(parts, KDLossParts)
        required = (parts.loss.requires_grad, parts.hard.requires_grad, parts.soft.requires_grad)
        assert required == (True, False, False)


def test_an_unused_loss_passes_no_gradient(backend: str) -> None:
    student, teacher, labels = make_ignored()
    rows = as_loss(kd_loss(student, teacher, labels, backend=backend))
    other = student.sum()
    torch.autograd.backward([other + 0 * other], retain_graph=True)
    assert rows.requires_grad
    (nothing,) = torch.autograd.grad(other, [rows], allow_unused=True)
    assert nothing is None


@pytest.mark.parametrize("enabled", [torch.bfloat16, torch.float16, None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_changes_nothing(
    backend: str, dtype: torch.dtype, enabled: torch.dtype | None
) -> None:
    student, teacher, labels = make_ignored(dtype)
    plain = as_loss(kd_loss(student, teacher, labels, backend=backend))
    want = gradient(plain, student)
    with torch.autocast("cpu", dtype=enabled or torch.bfloat16, enabled=enabled is not None):
        loss = as_loss(kd_loss(student, teacher, labels, backend=backend))
    assert loss.dtype == torch.float32
    assert torch.equal(loss, plain)
    assert torch.equal(gradient(loss, student), want)
