"""Gradients: upstream ones, second backwards, requires_grad, what is saved and left as it was."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.logits import TOLERANCE, N, V, gradient, identical, make, make_ignored
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_kd import Head, kd_loss
from fused_kd.testing import cpu_peak, eager_kd_loss

# ----------------------------------------------------------------------------- upstream gradients


@pytest.mark.parametrize("scale", [1.0, 0.0, -3.0, 0.37, 65536.0])
def test_scalar_upstream_gradient(backend: str, dtype: torch.dtype, scale: float) -> None:
    student, teacher, labels = make_ignored(dtype)
    loss = kd_loss(student, teacher, labels, temperature=2.0, backend=backend)
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
    loss = kd_loss(student, teacher, hard_weight=0, soft_weight=1, num_items=1e5, backend=backend)
    exact = 1 / 60000 / 1e5
    assert torch.tensor(exact, dtype=torch.float16) == 0  # what a gradient of the forward would be
    got = gradient(65536.0 * loss, student)
    assert got[0, 1].item() == pytest.approx(65536 * exact, rel=1e-2)


UPSTREAM = {
    "random": lambda: torch.randn(N),
    "zero": lambda: torch.zeros(N),
    "expanded": lambda: torch.tensor(2.0).expand(N),
    "transposed": lambda: torch.randn(N, 3)[:, 1],
}


@pytest.mark.parametrize("kind", UPSTREAM)
def test_row_upstream_gradient(backend: str, dtype: torch.dtype, kind: str) -> None:
    student, teacher, labels = make_ignored(dtype)
    upstream = UPSTREAM[kind]()
    before = upstream.clone()
    rows = kd_loss(student, teacher, labels, reduction="none", backend=backend)
    got = gradient(rows, student, upstream)
    want = gradient(eager_kd_loss(student, teacher, labels, reduction="none"), student, upstream)
    torch.testing.assert_close(got, want, **TOLERANCE[dtype])
    assert torch.equal(upstream, before)
    assert torch.equal(got[0], torch.zeros_like(got[0]))


@pytest.mark.parametrize(
    "reduce",
    [
        torch.sum,
        torch.mean,
        lambda x: x.square().sum(),
        lambda x: x.t().reshape(-1)[::2].sum(),
        lambda x: (x.expand(4, 2, 3) * torch.arange(24.0).view(4, 2, 3)).sum(),
    ],
)
def test_rows_reduced_by_the_caller(backend: str, reduce: Any) -> None:
    student, teacher, labels = make(2, 3)
    labels[0, 0] = -100
    rows = kd_loss(student, teacher, labels, reduction="none", backend=backend)
    want = reduce(eager_kd_loss(student, teacher, labels, reduction="none"))
    ours, theirs = gradient(reduce(rows), student), gradient(want, student)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2**-21)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_not_finite_upstream_gradient_does_not_reach_ignored_rows(
    backend: str, reduction: str, dtype: torch.dtype
) -> None:
    student, teacher, labels = make_ignored(dtype)
    loss = kd_loss(student, teacher, labels, reduction=reduction, backend=backend)
    got = gradient(loss, student, torch.full(loss.shape, torch.inf))
    assert not got[0].any()
    assert not got[1:].isfinite().all(1).any()


@pytest.mark.parametrize(
    "weights", [{"hard_weight": 0.0}, {"soft_weight": 0.0}, {"hard_weight": 0.9}]
)
def test_each_term_alone_has_its_gradient(backend: str, weights: dict[str, float]) -> None:
    student, teacher, labels = make_ignored()
    got = kd_loss(student, teacher, labels, backend=backend, **weights)
    want = eager_kd_loss(student, teacher, labels, **weights)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        gradient(got, student), gradient(want, student), **TOLERANCE[torch.float32]
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_both_weights_zero_is_zero_with_a_graph(backend: str, reduction: str) -> None:
    student, teacher, labels = make_ignored()
    weights = {"hard_weight": 0, "soft_weight": 0, "reduction": reduction}
    loss = kd_loss(student, teacher, labels, backend=backend, **weights).sum()
    assert loss.item() == 0
    assert not gradient(loss, student).any()


# ------------------------------------------------------------------------------ second backwards


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_retain_graph_gives_the_same_gradient_again(
    backend: str, dtype: torch.dtype, reduction: str
) -> None:
    student, teacher, labels = make_ignored(dtype)
    loss = kd_loss(student, teacher, labels, reduction=reduction, backend=backend)
    upstream = torch.full(loss.shape, 2.0)
    first = gradient(loss, student, upstream, retain_graph=True)
    kept = first.clone()
    second = gradient(loss, student, upstream, retain_graph=True)
    third = gradient(loss, student, upstream)
    torch.testing.assert_close(second, kept, **TOLERANCE[dtype])
    assert torch.equal(second, third)
    assert torch.equal(first, kept)  # what was handed over is not touched again
    assert torch.equal(upstream, torch.full(loss.shape, 2.0))
    want = gradient(eager_kd_loss(student, teacher, labels, reduction=reduction), student, upstream)
    torch.testing.assert_close(second, want, **TOLERANCE[dtype])


def test_a_second_backward_without_retain_graph_raises(backend: str) -> None:
    student, teacher, labels = make_ignored()
    loss = kd_loss(student, teacher, labels, backend=backend)
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("squared", [False, True])
def test_double_backward_raises(backend: str, reduction: str, squared: bool) -> None:
    student, teacher, labels = make_ignored()
    loss = kd_loss(student, teacher, labels, reduction=reduction, backend=backend).sum()
    loss = loss.square() if squared else loss
    first = gradient(loss, student, create_graph=True)
    assert first.requires_grad
    with pytest.raises(RuntimeError, match="kd_loss cannot be differentiated twice"):
        first.square().sum().backward()


def test_a_gradient_penalty_beside_the_loss_raises(backend: str) -> None:
    student, teacher, labels = make_ignored()
    weight = torch.randn(V, V, requires_grad=True)
    loss = kd_loss(student @ weight, teacher, labels, backend=backend)
    (first,) = torch.autograd.grad(loss, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        (loss + first.square().sum()).backward()


# ------------------------------------------------------------------- inputs are left as they were


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["logits", "in place", "heads"])
def test_inputs_and_versions_are_untouched(
    backend: str, dtype: torch.dtype, kind: str, reduction: str
) -> None:
    # Labels and weights too, which are views of what the caller goes on to use.
    if (inplace := kind == "in place") and reduction != "mean":
        return
    student, teacher, _ = make(2, 4, dtype=dtype)
    memory = torch.randint(V, (2, 9)).int()
    memory[0, :3] = -100
    weights, count = torch.rand(2, 9), torch.tensor(4) if reduction == "mean" else None
    sides: tuple[Any, Any] = (student * 1.0 if inplace else student), teacher
    if kind == "heads":
        sides = tuple(Head(x, torch.randn(5, V).to(dtype)) for x in sides)
    inputs = [memory, weights, teacher, *(() if inplace else (student,))]
    inputs += [] if count is None else [count]
    before, versions = [x.detach().clone() for x in inputs], [x._version for x in inputs]
    labels, weight = memory[:, 1:5] % 5 if kind == "heads" else memory[:, 1:5], weights[:, 2:6]
    keywords = {"reduction": reduction, "inplace": inplace, "backend": backend}
    loss = kd_loss(*sides, labels, token_weight=weight, num_items=count, **keywords)
    loss.sum().backward()
    identical(inputs, before)
    assert [x._version for x in inputs] == versions


# Totals of a loss and other uses of the same logits x.


def _softmax(loss: Any, x: Tensor, teacher: Tensor, labels: Tensor, **keywords: Any) -> Tensor:
    return x.softmax(-1).square().sum() + loss(x, teacher, labels, **keywords)


def _two_losses(loss: Any, x: Tensor, teacher: Tensor, labels: Tensor, **keywords: Any) -> Tensor:
    first = loss(x, teacher, labels, **keywords)
    second = loss(x, teacher.flip(0), labels, divergence="reverse_kl", **keywords)
    return first + 3 * second + F.cross_entropy(x, labels) + x.logsumexp(1).square().mean()


def _checkpoint(loss: Any, x: Tensor, teacher: Tensor, labels: Tensor, **keywords: Any) -> Tensor:
    def block(y: Tensor) -> Tensor:
        return loss(y * 1.0, teacher, labels, **keywords)

    return torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)


@pytest.mark.parametrize("total", [_softmax, _two_losses, _checkpoint])
def test_other_uses_of_the_same_logits(backend: str, total: Any) -> None:
    student, teacher, labels = make_ignored()
    logits = student * 1.0  # float32, which .float() does not copy
    before = logits.detach().clone()
    got = total(kd_loss, logits, teacher, labels, backend=backend)
    want = total(eager_kd_loss, student, teacher, labels)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        gradient(got, student), gradient(want, student), **TOLERANCE[torch.float32]
    )
    assert torch.equal(logits, before)


# ------------------------------------------------------------------- which tensors require grad


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_subset_of_requires_grad(
    backend: str, reduction: str, context: Any, requires_grad: bool
) -> None:
    student, teacher, labels = make_ignored()
    student = student.detach().requires_grad_(requires_grad)
    with context():
        loss = kd_loss(student, teacher, labels, reduction=reduction, backend=backend)
    assert loss.requires_grad == (requires_grad and context is torch.enable_grad)
    want = eager_kd_loss(student, teacher, labels, reduction=reduction)
    torch.testing.assert_close(loss.detach().clone(), want.detach())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_teacher_made_in_inference_mode(backend: str, dtype: torch.dtype, reduction: str) -> None:
    student, teacher, labels = make_ignored(dtype)
    with torch.inference_mode():
        inference_teacher = teacher * 1.0
    loss = kd_loss(student, inference_teacher, labels, reduction=reduction, backend=backend)
    want = kd_loss(student, teacher, labels, reduction=reduction, backend=backend)
    ones = torch.full(loss.shape, 0.3)
    first = gradient(loss, student, ones, retain_graph=True)
    torch.testing.assert_close(first, gradient(want, student, ones), rtol=0, atol=0)
    torch.testing.assert_close(gradient(loss, student, ones), first, **TOLERANCE[dtype])


def test_the_parts_are_detached(backend: str) -> None:
    for reduction in ("mean", "none"):
        parts = kd_loss(*make_ignored(), return_parts=True, reduction=reduction, backend=backend)
        required = (parts.loss.requires_grad, parts.hard.requires_grad, parts.soft.requires_grad)
        assert required == (True, False, False)


def test_an_unused_loss_passes_no_gradient(backend: str) -> None:
    student, teacher, labels = make_ignored()
    rows = kd_loss(student, teacher, labels, backend=backend)
    other = student.sum()
    torch.autograd.backward([other + 0 * other], retain_graph=True)
    assert rows.requires_grad
    (nothing,) = torch.autograd.grad(other, [rows], allow_unused=True)
    assert nothing is None


@pytest.mark.parametrize("enabled", [torch.bfloat16, torch.float16, None])
def test_autocast_changes_nothing(
    backend: str, dtype: torch.dtype, enabled: torch.dtype | None
) -> None:
    student, teacher, labels = make_ignored(dtype)
    plain = kd_loss(student, teacher, labels, backend=backend)
    want = gradient(plain, student)
    with torch.autocast("cpu", dtype=enabled or torch.bfloat16, enabled=enabled is not None):
        loss = kd_loss(student, teacher, labels, backend=backend)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, plain)
    assert torch.equal(gradient(loss, student), want)


# ------------------------------------------------------------------------------- what is saved


def saved_by(call: Callable[[], object]) -> list[Tensor]:
    """Return the tensors that autograd saves during `call`."""
    seen: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call()
    return seen


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_saved_tensor_hooks_see_every_saved_tensor(backend: str, reduction: str) -> None:
    inputs = make_ignored()
    seen = saved_by(lambda: kd_loss(*inputs, reduction=reduction, backend=backend))
    assert {x.data_ptr() for x in inputs} <= {x.data_ptr() for x in seen}


def test_an_unused_teacher_is_not_saved(backend: str) -> None:
    student, teacher, labels = make_ignored()
    for unused in (teacher, None):
        keywords: dict[str, Any] = {"soft_weight": 0.0, "backend": backend}
        seen = saved_by(lambda t=unused, k=keywords: kd_loss(student * 1.0, t, labels, **k))
        assert len([x for x in seen if x.numel() == student.numel()]) == 1


def test_moving_what_is_saved_elsewhere_gives_the_same_gradient(backend: str) -> None:
    student, teacher, labels = make_ignored(torch.float16)
    want = gradient(kd_loss(student, teacher, labels, backend=backend), student)
    with torch.autograd.graph.save_on_cpu():
        loss = kd_loss(student, teacher, labels, backend=backend)
    assert torch.equal(gradient(loss, student), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["mean", "none", "in place"])
def test_nothing_waits_for_the_garbage_collector(
    backend: str, kind: str, dtype: torch.dtype
) -> None:
    student, teacher, labels = make_ignored(dtype)
    options = {"inplace": True} if kind == "in place" else {"reduction": kind}

    def step() -> None:
        for run_backward in (True, False):
            loss = kd_loss(student * 1.0, teacher, labels, backend=backend, **options).sum()
            if run_backward:
                gradient(loss, student, retain_graph=True)

    step()
    gc.collect()
    gc.disable()
    try:
        left = cpu_peak(lambda: [step() for _ in itertools.repeat(None, 5)]).left
    finally:
        gc.enable()
    assert left == 0


@pytest.mark.parametrize("kind", ["mean", "none", "in place"])
def test_nothing_is_read_on_the_host(backend: str, dtype: torch.dtype, kind: str) -> None:
    # A fake tensor has no value to read.
    inplace, scalar = kind == "in place", kind != "none"
    with FakeTensorMode():
        leaf = torch.randn(N, V, dtype=dtype, requires_grad=True)
        loss = kd_loss(
            leaf * 1.0,
            torch.randn(N, V, dtype=dtype),
            torch.zeros(N, dtype=torch.long),
            reduction="mean" if scalar else "none",
            inplace=inplace,
            num_items=torch.tensor(5) if scalar else None,
            token_weight=torch.ones(N),
            backend=backend,
        )
        (2.5 * loss.sum()).backward()
        assert leaf.grad is not None
