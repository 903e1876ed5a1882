"""Both GPU backends: the same bits every time, and every way through the backward."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gpu_device import (
    BACKENDS,
    BRAIN,
    DEVICE,
    HALF,
    SINGLE,
    as_output,
    both,
    few_here,
    gradient,
    in_time,  # noqa: F401  a fixture
    loss_of,
    made,
    obey_on_device,
    same,
    size,
)
from torch import Tensor, nn

from fused_kd import divergences

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("backend", BACKENDS)]
DIVERGENCES = few_here(divergences.DIVERGENCES)
DTYPES = few_here([SINGLE, HALF, BRAIN])
MIB = 2**20


# ------------------------------------------------------------------------------------ the same bits


# one and two visits before the gradient; clusters of 2 and of 8 or 16 blocks
@pytest.mark.parametrize("vocabulary", [size(32000, 40), size(151936, 90)])
@pytest.mark.parametrize("divergence", few_here(["forward_kl", "jsd"]))
def test_200_repetitions(backend: str, divergence: str, vocabulary: int) -> None:
    inputs = made(size(1056, 8), vocabulary)
    keywords: dict[str, Any] = {"divergence": divergence, "temperature": 2.0, "backend": backend}
    want = both(*inputs, **keywords)
    for i in range(size(200, 3)):
        assert same(both(*inputs, **keywords), want), f"repetition {i}"


@pytest.mark.parametrize("dtype", few_here([SINGLE, BRAIN]), ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_row_alone_and_in_a_batch(backend: str, divergence: str, dtype: torch.dtype) -> None:
    n = size(300, 5)
    student, teacher, labels = made(n, size(128256, 90), dtype=dtype)
    keywords: dict[str, Any] = {"divergence": divergence, "temperature": 2.0, "backend": backend}
    for reduction in ("sum", "none"):
        loss, grad = both(student, teacher, labels, reduction=reduction, **keywords)
        for row in (1, n // 2, n - 1):
            one = slice(row, row + 1)
            leaf = student.detach()[one].requires_grad_()
            alone = both(leaf, teacher[one], labels[one], reduction=reduction, **keywords)
            assert torch.equal(alone[1], grad[one])
            assert reduction == "sum" or torch.equal(alone[0], loss[one])


# --------------------------------------------------------------------------------- backward passes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_in_place(backend: str, divergence: str, dtype: torch.dtype) -> None:
    student, teacher, labels = made(9, size(24000, 50), dtype=dtype)
    keywords: dict[str, Any] = {"divergence": divergence, "backend": backend}
    loss, want = both(student, teacher, labels, **keywords)
    logits = as_output(student.detach().clone().requires_grad_())
    got_loss = loss_of(logits, teacher, labels, inplace=True, **keywords)
    got = gradient(got_loss, logits)
    assert got.data_ptr() == logits.data_ptr()
    assert same((got_loss.detach(), got), (loss, want))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_upstream_gradients(backend: str, dtype: torch.dtype, inplace: bool) -> None:
    student, teacher, labels = made(9, size(24000, 50), dtype=dtype)
    keywords: dict[str, Any] = {"temperature": 2.0, "reduction": "sum", "backend": backend}

    def times(factor: float) -> Tensor:
        leaf = student.detach().clone().requires_grad_()
        logits = as_output(leaf)
        loss = loss_of(logits, teacher, labels, inplace=inplace, **keywords)
        return gradient(loss, logits, torch.tensor(factor, device=DEVICE))

    plain = times(1.0)
    upstream = torch.ones(9, device=DEVICE)
    obey_on_device(None, plain, (student, teacher, labels), upstream, temperature=2.0)
    for factor in (2.0, -1.0):
        exact = dtype == HALF  # subnormals are rounded again
        close = {"rtol": 2**-9, "atol": 2**-23} if exact else {"rtol": 0.0, "atol": 0.0}
        torch.testing.assert_close(times(factor), factor * plain, **close)  # type: ignore[arg-type]
    assert torch.equal(times(0.0), torch.zeros_like(plain))
    got = times(0.3)
    if not inplace:  # rounded once
        obey_on_device(None, got, (student, teacher, labels), 0.3 * upstream, temperature=2.0)
    torch.testing.assert_close(got, 0.3 * plain, rtol=2 * torch.finfo(dtype).eps, atol=2**-23)
    infinite = times(math.inf)
    assert torch.equal(infinite[0], torch.zeros_like(infinite[0]))  # ignored
    assert not (infinite.isfinite() & (infinite != 0)).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_graph_that_is_retained_R_20(backend: str, dtype: torch.dtype) -> None:
    inputs = made(9, size(24000, 50), dtype=dtype)
    student = inputs[0]
    keywords: dict[str, Any] = {"temperature": 2.0, "reduction": "sum", "backend": backend}
    loss = loss_of(*inputs, **keywords)
    factors = [torch.tensor(x, device=DEVICE) for x in (2.0, 3.0)]
    first = gradient(loss, student, factors[0], retain_graph=True)
    kept = first.clone()
    second = gradient(loss, student, factors[1])
    assert torch.equal(first, kept)
    for got, factor in ((first, factors[0]), (second, factors[1])):
        fresh = gradient(loss_of(*inputs, **keywords), student, factor)
        close = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 2**-23}
        torch.testing.assert_close(got, fresh, **close)  # type: ignore[arg-type]


# a number for each row; one for all of them, without memory of its own
@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_with_upstream_gradients_of_their_own_R_23_R_24(
    backend: str, dtype: torch.dtype, expanded: bool
) -> None:
    inputs = made(9, size(24000, 50), dtype=dtype)
    one = torch.tensor(-0.7, device=DEVICE)
    upstream = one.expand(9) if expanded else torch.randn(9, device=DEVICE)
    rows = loss_of(*inputs, reduction="none", temperature=2.0, backend=backend)
    got = gradient(rows, inputs[0], upstream)
    obey_on_device(rows.detach(), got, inputs, upstream, temperature=2.0)


def test_half_precision_with_a_loss_scale(backend: str) -> None:
    """torch.amp's scaler at 65536, float32 weights, float16 logits: against float32 logits."""
    n, v = size(256, 16), size(32000, 60)
    hidden = torch.randn(n, 32, device=DEVICE)
    head = nn.Linear(32, v, device=DEVICE)
    _, teacher, labels = made(n, v, dtype=HALF)

    def run(half: bool, **keywords: Any) -> Tensor:
        scaler = torch.amp.GradScaler(DEVICE, init_scale=65536.0, enabled=half)
        optimizer = torch.optim.SGD(head.parameters(), lr=0.0)
        head.zero_grad()
        with torch.autocast(DEVICE, HALF, enabled=half):
            logits = head(hidden)
            assert logits.dtype == (HALF if half else SINGLE)
            loss = loss_of(logits, teacher, labels, temperature=2.0, **keywords)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        assert head.weight.grad is not None
        return head.weight.grad.clone()

    got, want = run(True, backend=backend), run(False, backend="reference")
    assert (got - want).norm() <= 5e-3 * want.norm()
