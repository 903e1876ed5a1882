"""Heads on a GPU: numbers, ignored rows, what waits, memory, compilation."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch
from gpu_device import (
    BACKENDS,
    BRAIN,
    DEVICE,
    HALF,
    REAL,
    SINGLE,
    few_here,
    heavy,
    in_time,  # noqa: F401  a fixture
    no_synchronization,
    size,
)
from gpu_heads import (
    TEMPERATURE,
    Heads,
    HeadsCase,
    Outcome,
    distance,
    eager,
    make_heads,
    ours,
    outcome,
)
from torch import Tensor

from benchmarks.cases import DTYPES
from benchmarks.device import peak_bytes
from fused_kd import Head, KDLoss, kd_loss
from fused_kd.divergences import DIVERGENCES
from fused_kd.testing import eager_kd_loss

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("backend", BACKENDS)]
KINDS = {dtype: name for name, dtype in DTYPES.items()}
SINGLE_EPS = torch.finfo(SINGLE).eps
MIB = 2**20


def _case(dtype: torch.dtype, rows: int = 37) -> HeadsCase:
    return HeadsCase(rows, size(8003, 67), size(256, 8), size(384, 12), KINDS[dtype])


def _with_ignored(heads: Heads) -> Heads:
    """Every third row is ignored, and not a number on either side."""
    labels = heads.labels.clone()
    labels[::3] = -100
    hidden, teacher = heads.hidden.detach().clone(), heads.teacher_hidden.clone()
    hidden[::3], teacher[::3] = math.nan, math.inf
    return heads._replace(hidden=hidden.requires_grad_(), teacher_hidden=teacher, labels=labels)


def _kept(heads: Heads) -> Heads:
    """Only the rows that are not ignored."""
    rows = heads.labels != -100
    hidden = heads.hidden.detach()[rows].requires_grad_()
    return heads._replace(
        hidden=hidden, teacher_hidden=heads.teacher_hidden[rows], labels=heads.labels[rows]
    )


def _no_worse(got: Outcome, exact: Outcome, baseline: Outcome, dtype: torch.dtype) -> None:
    """Than the eager composition in the same dtype, beside float32's rounding."""
    for name, mine, theirs, want in zip(Outcome._fields, got, baseline, exact, strict=True):
        slack = 8 * SINGLE_EPS + (0 if name == "loss" else torch.finfo(dtype).eps / 4)
        error, allowed = distance(mine, want), distance(theirs, want)
        assert error <= 1.1 * allowed + slack, f"{name}: {error:.2e}, eager {allowed:.2e}"


def _scaled(loss: Any, heads: Heads, dtype: torch.dtype) -> Outcome:
    """As training takes it: float16 with a loss scale, or its gradients fall below its numbers."""
    factor = 1024.0 if dtype == HALF else 1.0
    return outcome(lambda *inputs: factor * loss(*inputs), heads)


@pytest.mark.parametrize("dtype", few_here([SINGLE, HALF, BRAIN]), ids=str)
@pytest.mark.parametrize("divergence", few_here(DIVERGENCES))
def test_error_rule(backend: str, divergence: str, dtype: torch.dtype) -> None:
    case = _case(dtype)
    heads = make_heads(case, DEVICE)
    keywords: dict[str, Any] = {"divergence": divergence, "temperature": 2.0}

    def whole(*inputs: Tensor) -> Tensor:
        hidden, weight, teacher, head, labels = inputs
        return eager_kd_loss(hidden @ weight.t(), teacher @ head.t(), labels, **keywords)

    exact = _scaled(whole, heads.to(torch.float64), dtype)
    baseline = _scaled(whole, heads, dtype)
    for height in (37, 8):  # one chunk; several, the last of which is not full
        loss = ours(case, chunk_rows=height, backend=backend, **keywords)
        _no_worse(_scaled(loss, heads, dtype), exact, baseline, dtype)


@pytest.mark.parametrize("dtype", few_here([SINGLE, BRAIN]), ids=str)
def test_rows_do_not_depend_on_the_height_of_a_chunk(backend: str, dtype: torch.dtype) -> None:
    """Up to the products' own choice of kernel by size, which a library does not promise."""
    case = _case(dtype)
    heads = make_heads(case, DEVICE)
    whole, parts = (
        outcome(ours(case, chunk_rows=height, backend=backend), heads) for height in (37, 5)
    )
    assert distance(parts.loss, whole.loss) <= 8 * SINGLE_EPS
    for mine, theirs in zip(parts[1:], whole[1:], strict=True):
        assert distance(mine, theirs) <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("reduction", few_here(["none", "mean"]))
@pytest.mark.parametrize("dtype", few_here([SINGLE, HALF, BRAIN]), ids=str)
def test_ignored_rows_are_not_looked_at(backend: str, dtype: torch.dtype, reduction: str) -> None:
    case = _case(dtype)
    heads = _with_ignored(make_heads(case, DEVICE))
    keywords: dict[str, Any] = {"reduction": reduction, "backend": backend, "temperature": 2.0}

    def summed(*inputs: Tensor, **more: Any) -> Tensor:
        hidden, weight, teacher, head, labels = inputs
        value = kd_loss(Head(hidden, weight), Head(teacher, head), labels, **keywords, **more)
        assert isinstance(value, Tensor)
        return value.sum()

    want = _scaled(summed, _kept(heads), dtype)
    kept = int((heads.labels != -100).sum())
    for more in ({}, {"kept_rows": kept}, {"kept_rows": kept + 1}, {"chunk_rows": 5},
                 {"chunk_rows": 5, "kept_rows": kept}):  # fmt: skip
        got = _scaled(lambda *x, more=more: summed(*x, **more), heads, dtype)
        ignored = heads.labels == -100
        assert not got.hidden[ignored].any()
        eps = torch.finfo(dtype).eps
        assert distance(got.loss, want.loss) <= 16 * SINGLE_EPS
        assert distance(got.hidden[~ignored], want.hidden) <= 2 * eps
        assert distance(got.weight, want.weight) <= 2 * eps


def test_more_rows_than_kept_rows_is_not_a_number(backend: str) -> None:
    heads = make_heads(_case(BRAIN), DEVICE)
    if not REAL:
        pytest.skip("the CPU refuses it by value")
    loss = kd_loss(heads.student, heads.teacher, heads.labels, kept_rows=36, backend=backend)
    assert isinstance(loss, Tensor)
    assert loss.isnan()


def _as_sequences(heads: Heads) -> Heads:
    """Two sequences without their last positions: leading dimensions that do not fold."""
    labels = heads.labels.view(2, -1)[:, :-1].clone()
    hidden, teacher = (
        x.detach().view(2, -1, x.shape[1])[:, :-1] for x in (heads.hidden, heads.teacher_hidden)
    )
    assert not hidden.is_contiguous()
    return heads._replace(hidden=hidden.requires_grad_(), teacher_hidden=teacher, labels=labels)


# float16 makes its gradients in the backward, the others in the forward
@pytest.mark.parametrize("dtype", few_here([SINGLE, HALF, BRAIN]), ids=str)
@pytest.mark.parametrize("layout", few_here(["rows", "sliced sequences"]))
def test_nothing_waits_for_the_device(backend: str, layout: str, dtype: torch.dtype) -> None:
    case = _case(dtype, rows=38)
    heads = _with_ignored(make_heads(case, DEVICE))
    if layout != "rows":
        heads = _as_sequences(heads)
    weight = torch.rand(heads.labels.shape, device=DEVICE)
    upstream = torch.tensor(0.3, device=DEVICE)
    calls: list[dict[str, Any]] = [
        {"chunk_rows": 8},
        {"chunk_rows": 8, "kept_rows": 30, "token_weight": weight, "reduction": "sum"},
        {"num_items": torch.tensor(5, device=DEVICE), "label_smoothing": 0.1},
        {"memory_budget": 64 * MIB},
    ]
    for i, keywords in enumerate((*calls, *calls)):  # what is compiled may wait, once
        with no_synchronization() if i >= len(calls) else contextlib.nullcontext():
            options = {"temperature": 2.0, "backend": backend, **keywords}
            loss = kd_loss(heads.student, heads.teacher, heads.labels, **options)
            assert isinstance(loss, Tensor)
            for _ in range(2):  # handed over; made once more
                torch.autograd.grad(loss, (heads.hidden, heads.weight), upstream, retain_graph=True)


@pytest.mark.parametrize("given", few_here(["logits", "head"]))
@heavy
def test_peak_memory(backend: str, given: str) -> None:
    """Gradients, accumulator, the budget, and a few mebibytes."""
    n, v = size(2048, 9), size(128256, 90)
    case = HeadsCase(n, v, size(512, 8), size(512, 12), "bf16")
    heads = make_heads(case, DEVICE)
    budget = size(256, 64) * MIB
    loss = KDLoss(temperature=TEMPERATURE, memory_budget=budget, backend=backend)
    teacher: Head | Tensor = heads.teacher
    if given == "logits":
        teacher = heads.teacher_hidden @ heads.teacher_weight.t()

    def call() -> None:
        value = loss(heads.student, teacher, heads.labels)
        torch.autograd.grad(value, (heads.hidden, heads.weight))

    call()
    peak = peak_bytes(call, DEVICE) - case.gradient_bytes - case.accumulator_bytes
    assert peak <= budget + 8 * MIB, f"{peak / MIB:.1f} MiB"


@pytest.mark.parametrize("enabled", few_here([SINGLE, BRAIN]), ids=str)
def test_autocast(backend: str, enabled: torch.dtype) -> None:
    """The products in the autocast dtype: close to what the rounded inputs give."""
    case = _case(SINGLE)
    heads = make_heads(case, DEVICE)
    if enabled == SINGLE:
        heads = heads._replace(teacher_weight=heads.teacher_weight.to(BRAIN))
    want = outcome(eager(case), heads.to(BRAIN).to(torch.float64))
    with torch.autocast(DEVICE, dtype=BRAIN):
        got = outcome(ours(case, backend=backend), heads)
    assert got.weight.dtype == got.hidden.dtype == SINGLE
    assert distance(got.loss, want.loss) <= 1e-4
    for mine, theirs in zip(got[1:], want[1:], strict=True):
        assert distance(mine, theirs) <= torch.finfo(BRAIN).eps


@pytest.mark.parametrize("dtype", few_here([SINGLE, BRAIN]), ids=str)
def test_compiled_without_a_break(backend: str, dtype: torch.dtype) -> None:
    torch.compiler.reset()
    case = _case(dtype)
    loss = ours(case, backend=backend, chunk_rows=8)
    compiled = torch.compile(loss, fullgraph=True, backend="inductor" if REAL else "aot_eager")
    heads = make_heads(case, DEVICE)
    for rows in (37, 21):
        got, want = (outcome(f, heads.first(rows)) for f in (compiled, loss))
        torch.testing.assert_close(got.loss, want.loss)
        for mine, theirs in zip(got[1:], want[1:], strict=True):
            assert distance(mine, theirs) <= 2 * torch.finfo(dtype).eps
