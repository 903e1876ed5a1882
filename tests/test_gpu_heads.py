"""Heads on a GPU: numbers, ignored rows, what waits, memory, compilation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu_device import (
    BACKENDS,
    BRAIN,
    DEVICE,
    HALF,
    MIB,
    REAL,
    SINGLE,
    few_here,
    heavy,
    loss_of,
    no_synchronization,
    peak_bytes,
    size,
)
from support.heads import distance
from torch import Tensor

from fused_kd import Head
from fused_kd.divergences import DIVERGENCES
from fused_kd.testing import eager_kd_loss

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("backend", BACKENDS)]
ALL_DTYPES, TWO_DTYPES = few_here([SINGLE, HALF, BRAIN]), few_here([SINGLE, BRAIN])
EPS = torch.finfo(SINGLE).eps
Sides = tuple[Head, Head, Tensor]


def _heads(
    dtype: torch.dtype, rows: int = 37, v: int = size(8003, 67), h: int = size(256, 8)
) -> Sides:
    """Return a Head of each model, whose logits have standard deviation 2, and labels."""
    draw = torch.Generator(DEVICE).manual_seed(0)
    sides = []
    for hidden in (h, 3 * h // 2):
        tensors = [torch.randn(n, hidden, generator=draw, device=DEVICE) for n in (rows, v)]
        sides.append(Head(tensors[0].to(dtype), (2 / hidden**0.5 * tensors[1]).to(dtype)))
    return *sides, torch.randint(v, (rows,), generator=draw, device=DEVICE)  # type: ignore[return-value]


def _with_ignored(sides: Sides) -> Sides:
    """Ignore every third row, and fill it with NaN or infinity, in place; return `sides`."""
    student, teacher, labels = sides
    labels[::3], student.hidden[::3], teacher.hidden[::3] = -100, math.nan, math.inf
    return sides


def _outcome(loss: Callable[..., Any], sides: Sides, **keywords: Any) -> tuple[Tensor, ...]:
    """Return the summed loss, and its gradients by the student's hidden states and weight.

    For float16 the backward runs with a loss scale, as in training: without it gradients underflow.
    """
    student, teacher, labels = sides
    leaves = [x.detach().requires_grad_() for x in student[:2]]
    value = loss(Head(*leaves), teacher, labels, **{"temperature": 2.0, **keywords}).sum()
    scale = 1024.0 if student.hidden.dtype == HALF else 1.0
    return value.detach(), *(x / scale for x in torch.autograd.grad(scale * value, leaves))


def _close(got: tuple[Tensor, ...], want: tuple[Tensor, ...], loss: float, grad: float) -> None:
    for mine, theirs, limit in zip(got, want, (loss, grad, grad), strict=True):
        assert distance(mine, theirs) <= limit


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("divergence", few_here(DIVERGENCES))
def test_error_rule(backend: str, divergence: str, dtype: torch.dtype) -> None:
    # No worse than the eager composition in the same dtype, next to float32's rounding
    sides = _heads(dtype)
    double = (*(side.to(torch.float64) for side in sides[:2]), sides[2])
    exact, baseline = (_outcome(eager_kd_loss, x, divergence=divergence) for x in (double, sides))
    for rows in (37, 8):  # one chunk; several, the last of which is not full
        keywords = {"chunk_rows": rows, "backend": backend, "divergence": divergence}
        got = _outcome(loss_of, sides, **keywords)
        for i, (mine, theirs, want) in enumerate(zip(got, baseline, exact, strict=True)):
            slack = 8 * EPS + (0 if i == 0 else torch.finfo(dtype).eps / 4)
            assert distance(mine, want) <= 1.1 * distance(theirs, want) + slack


@pytest.mark.parametrize("dtype", TWO_DTYPES, ids=str)
def test_rows_do_not_depend_on_the_height_of_a_chunk(backend: str, dtype: torch.dtype) -> None:
    # Up to the products' own choice of kernel by size, which a library does not promise
    sides = _heads(dtype)
    parts, whole = (_outcome(loss_of, sides, chunk_rows=n, backend=backend) for n in (5, 37))
    _close(parts, whole, 8 * EPS, 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("reduction", few_here(["none", "mean"]))
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_ignored_rows_are_not_looked_at(backend: str, dtype: torch.dtype, reduction: str) -> None:
    student, teacher, labels = sides = _with_ignored(_heads(dtype))
    rows = labels != -100
    kept = int(rows.sum())
    alone = (
        *(side._replace(hidden=side.hidden[rows]) for side in (student, teacher)),
        labels[rows],
    )
    keywords: dict[str, Any] = {"reduction": reduction, "backend": backend}
    want = _outcome(loss_of, alone, **keywords)
    for chunk_rows in (None, 5):
        for kept_rows in (None, kept, kept + 1):
            more = {"chunk_rows": chunk_rows, "kept_rows": kept_rows}
            loss, hidden, weight = _outcome(loss_of, sides, **keywords, **more)
            assert not hidden[~rows].any()
            _close((loss, hidden[rows], weight), want, 16 * EPS, 2 * torch.finfo(dtype).eps)


@pytest.mark.skipif(not REAL, reason="the CPU refuses it by value")
def test_more_rows_than_kept_rows_is_not_a_number(backend: str) -> None:
    assert loss_of(*_heads(BRAIN), kept_rows=36, backend=backend).isnan()


# float16 makes its gradients in the backward, the others in the forward
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("layout", few_here(["rows", "sliced sequences"]))
def test_nothing_waits_for_the_device(backend: str, layout: str, dtype: torch.dtype) -> None:
    student, teacher, labels = _with_ignored(_heads(dtype, rows=38))
    if layout != "rows":  # two sequences without their last positions: they do not fold into rows
        student, teacher = (
            side._replace(hidden=side.hidden.view(2, 19, -1)[:, :-1]) for side in (student, teacher)
        )
        labels = labels.view(2, 19)[:, :-1].clone()
    leaves = [x.requires_grad_() for x in student[:2]]
    weight = torch.rand(labels.shape, device=DEVICE)
    upstream, items = torch.tensor(0.3, device=DEVICE), torch.tensor(5, device=DEVICE)
    calls: list[dict[str, Any]] = [
        {"chunk_rows": 8},
        {"chunk_rows": 8, "kept_rows": 30, "token_weight": weight, "reduction": "sum"},
        {"num_items": items, "label_smoothing": 0.1},
        {"memory_budget": 64 * MIB},
    ]
    base: dict[str, Any] = {"temperature": 2.0, "backend": backend}
    for enabled in (False, True):  # the first call compiles, and may wait
        for keywords in calls:
            with no_synchronization(enabled):
                loss = loss_of(Head(*leaves), teacher, labels, **base, **keywords)
                for _ in range(2):  # handed over; made once more
                    torch.autograd.grad(loss, leaves, upstream, retain_graph=True)


@pytest.mark.parametrize("kind", few_here(["logits", "head"]))
@heavy
def test_peak_memory(backend: str, kind: str) -> None:
    # Gradients, a float32 weight gradient, the budget, and a few mebibytes
    student, teacher, labels = _heads(BRAIN, size(2048, 9), size(128256, 90), size(512, 8))
    logits = teacher.hidden @ teacher.weight.t()
    budget = size(256, 64) * MIB
    sides = (student, teacher if kind == "head" else logits, labels)
    keywords = {"memory_budget": budget, "backend": backend}
    peak = peak_bytes(lambda: _outcome(loss_of, sides, **keywords))  # type: ignore[arg-type]
    gradients = student.hidden.nbytes + student.weight.nbytes
    excess = peak - gradients - 4 * student.weight.numel()
    assert excess <= budget + 8 * MIB, f"{excess / MIB:.1f} MiB"


@pytest.mark.parametrize("teacher_dtype", TWO_DTYPES, ids=str)
def test_autocast(backend: str, teacher_dtype: torch.dtype) -> None:
    # The products are in the autocast dtype: close to what the rounded inputs give
    student, teacher, labels = _heads(SINGLE)
    rounded = [side.to(BRAIN).to(torch.float64) for side in (student, teacher)]
    want = _outcome(eager_kd_loss, (*rounded, labels))  # type: ignore[arg-type]
    teacher = teacher._replace(weight=teacher.weight.to(teacher_dtype))
    with torch.autocast(DEVICE, dtype=BRAIN):
        got = _outcome(loss_of, (student, teacher, labels), backend=backend)
    assert got[1].dtype == got[2].dtype == SINGLE
    _close(got, want, 1e-4, torch.finfo(BRAIN).eps)


@pytest.mark.parametrize("dtype", TWO_DTYPES, ids=str)
def test_compiled_without_a_break(backend: str, dtype: torch.dtype) -> None:
    torch.compiler.reset()
    mode = "inductor" if REAL else "aot_eager"
    compiled = torch.compile(loss_of, fullgraph=True, backend=mode)
    for rows in (37, 21):
        sides = _heads(dtype, rows)
        got, want = (
            _outcome(loss, sides, backend=backend, chunk_rows=8) for loss in (compiled, loss_of)
        )
        _close(got, want, 3e-6, 2 * torch.finfo(dtype).eps)
