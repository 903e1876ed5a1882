"""Both GPU backends in use: same bits, backward passes, graphs, streams, memory, compilation."""

from __future__ import annotations

import contextlib
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
    as_output,
    both,
    few_here,
    gradient,
    heavy,
    loss_of,
    make_batch,
    no_synchronization,
    obey_on_device,
    peak_bytes,
    same,
    size,
)
from torch import Tensor, nn

from fused_kd import divergences

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("backend", BACKENDS)]
each_divergence = pytest.mark.parametrize("divergence", few_here(divergences.DIVERGENCES))
each_dtype = pytest.mark.parametrize("dtype", few_here([SINGLE, HALF, BRAIN]), ids=str)
two_dtypes = pytest.mark.parametrize("dtype", few_here([SINGLE, BRAIN]), ids=str)
ROWS, V = 9, size(24000, 50)
Keywords = dict[str, Any]


def _number(x: float) -> Tensor:
    return torch.tensor(x, device=DEVICE)


# ------------------------------------------------------------------------------------ the same bits


# one and two passes before the gradient; clusters of 2 and of 8 or 16 blocks
@pytest.mark.parametrize("vocabulary", [size(32000, 40), size(151936, 90)])
@pytest.mark.parametrize("divergence", few_here(["forward_kl", "jsd"]))
def test_200_repetitions(backend: str, divergence: str, vocabulary: int) -> None:
    inputs = make_batch(size(1056, 8), vocabulary)
    keywords: Keywords = {"divergence": divergence, "temperature": 2.0, "backend": backend}
    want = both(*inputs, **keywords)
    for i in range(size(200, 3)):
        assert same(both(*inputs, **keywords), want), f"repetition {i}"


@two_dtypes
@each_divergence
def test_a_row_alone_and_in_a_batch(backend: str, divergence: str, dtype: torch.dtype) -> None:
    n = size(300, 5)
    student, teacher, labels = make_batch(n, size(128256, 90), dtype=dtype)
    keywords: Keywords = {"divergence": divergence, "temperature": 2.0, "backend": backend}
    for reduction in ("sum", "none"):
        loss, grad = both(student, teacher, labels, reduction=reduction, **keywords)
        for row in (1, n // 2, n - 1):
            part = slice(row, row + 1)
            leaf = student.detach()[part].requires_grad_()
            alone = both(leaf, teacher[part], labels[part], reduction=reduction, **keywords)
            assert torch.equal(alone[1], grad[part])
            assert reduction == "sum" or torch.equal(alone[0], loss[part])


# --------------------------------------------------------------------------------- backward passes


@each_dtype
@each_divergence
def test_in_place(backend: str, divergence: str, dtype: torch.dtype) -> None:
    student, teacher, labels = make_batch(ROWS, V, dtype=dtype)
    keywords: Keywords = {"divergence": divergence, "backend": backend}
    want = both(student, teacher, labels, **keywords)
    logits = as_output(student.detach().clone().requires_grad_())
    got = both(logits, teacher, labels, inplace=True, **keywords)
    assert got[1].data_ptr() == logits.data_ptr()
    assert same(got, want)


@pytest.mark.parametrize("inplace", [False, True])
@each_dtype
def test_upstream_gradients(backend: str, dtype: torch.dtype, inplace: bool) -> None:
    student, teacher, labels = make_batch(ROWS, V, dtype=dtype)
    keywords: Keywords = {"temperature": 2.0, "reduction": "sum", "backend": backend}

    def times(factor: float) -> Tensor:
        logits = as_output(student.detach().clone().requires_grad_())
        loss = loss_of(logits, teacher, labels, inplace=inplace, **keywords)
        return gradient(loss, logits, _number(factor))

    plain, got, upstream = times(1.0), times(0.3), torch.ones(ROWS, device=DEVICE)
    obey_on_device(None, plain, (student, teacher, labels), upstream, temperature=2.0)
    for factor in (2.0, -1.0):  # exact, but subnormals of float16 are rounded again
        close = {"rtol": 2**-9, "atol": 2**-23} if dtype == HALF else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(times(factor), factor * plain, **close)
    assert torch.equal(times(0.0), torch.zeros_like(plain))
    if not inplace:  # rounded once
        obey_on_device(None, got, (student, teacher, labels), 0.3 * upstream, temperature=2.0)
    torch.testing.assert_close(got, 0.3 * plain, rtol=2 * torch.finfo(dtype).eps, atol=2**-23)
    infinite = times(math.inf)
    assert torch.equal(infinite[0], torch.zeros_like(infinite[0]))  # ignored
    assert not (infinite.isfinite() & (infinite != 0)).any()


@each_dtype
def test_a_graph_that_is_retained_R_20(backend: str, dtype: torch.dtype) -> None:
    inputs = make_batch(ROWS, V, dtype=dtype)
    keywords: Keywords = {"temperature": 2.0, "reduction": "sum", "backend": backend}
    loss, close = loss_of(*inputs, **keywords), {"rtol": 2 * torch.finfo(dtype).eps, "atol": 2**-23}
    first = gradient(loss, inputs[0], _number(2.0), retain_graph=True)
    kept = first.clone()
    second = gradient(loss, inputs[0], _number(3.0))
    assert torch.equal(first, kept)
    for got, factor in ((first, 2.0), (second, 3.0)):
        fresh = gradient(loss_of(*inputs, **keywords), inputs[0], _number(factor))
        torch.testing.assert_close(got, fresh, **close)  # type: ignore[arg-type]


# a number for each row; one for all of them, without its own memory
@pytest.mark.parametrize("expanded", [False, True])
@each_dtype
def test_rows_with_upstream_gradients_of_their_own_R_23_R_24(
    backend: str, dtype: torch.dtype, expanded: bool
) -> None:
    inputs = make_batch(ROWS, V, dtype=dtype)
    upstream = _number(-0.7).expand(ROWS) if expanded else torch.randn(ROWS, device=DEVICE)
    rows = loss_of(*inputs, reduction="none", temperature=2.0, backend=backend)
    got = gradient(rows, inputs[0], upstream)
    obey_on_device(rows.detach(), got, inputs, upstream, temperature=2.0)


def test_half_precision_with_a_loss_scale(backend: str) -> None:
    # torch.amp's scaler at 65536, float32 weights, float16 logits: against float32 logits
    n, v = size(256, 16), size(32000, 60)
    hidden, head = torch.randn(n, 32, device=DEVICE), nn.Linear(32, v, device=DEVICE)
    _, teacher, labels = make_batch(n, v, dtype=HALF)

    def run(half: bool, backend: str) -> Tensor:
        scaler = torch.amp.GradScaler(DEVICE, init_scale=65536.0, enabled=half)
        optimizer = torch.optim.SGD(head.parameters(), lr=0.0)
        head.zero_grad()
        with torch.autocast(DEVICE, HALF, enabled=half):
            logits = head(hidden)
            assert logits.dtype == (HALF if half else SINGLE)
            loss = loss_of(logits, teacher, labels, temperature=2.0, backend=backend)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        assert head.weight.grad is not None
        return head.weight.grad.clone()

    got, want = run(True, backend), run(False, "reference")
    assert (got - want).norm() <= 5e-3 * want.norm()


# --------------------------------------------------------------------- graphs, streams, devices


def _captured(call: Callable[[], Any]) -> tuple[Any, Callable[[], object]]:
    """Record a call in a CUDA graph; return its results, and a function that computes them again.

    That function overwrites the results. On the CPU it repeats the call and copies.
    """
    if not REAL:
        results = call()
        return results, lambda: [x.copy_(y) for x, y in zip(results, call(), strict=True)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return results, graph.replay


@each_dtype
@pytest.mark.parametrize("divergence", few_here(["forward_kl", "tvd"]))
def test_a_captured_graph_with_other_inputs(
    backend: str, divergence: str, dtype: torch.dtype
) -> None:
    v = size(128256, 50)
    student, teacher, labels = make_batch(6, v, dtype=dtype)
    keywords: Keywords = {"divergence": divergence, "temperature": 2.0, "backend": backend}
    results, replay = _captured(lambda: both(student, teacher, labels, **keywords))
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            for x in (student, teacher):
                x.copy_(2 * torch.randn(6, v, device=DEVICE))
            labels.copy_(torch.randint(v, (6,), device=DEVICE))
            labels[seed] = -100
        replay()
        assert same(results, both(student, teacher, labels, **keywords))


@each_dtype
@each_divergence
def test_another_stream_R_56(backend: str, divergence: str, dtype: torch.dtype) -> None:
    # The stream is busy before the inputs arrive: work on another one reads NaN
    student, teacher, labels = make_batch(ROWS, V, dtype=dtype)
    base: Keywords = {"divergence": divergence, "temperature": 2.0, "backend": backend}
    for reduction in ("none", "mean", "sum"):
        keywords = {**base, "reduction": reduction}
        want = both(student, teacher, labels, **keywords)
        with torch.cuda.stream(torch.cuda.Stream()) if REAL else contextlib.nullcontext():
            s, t = (torch.full_like(x, math.nan) for x in (student.detach(), teacher))
            if REAL:
                torch.cuda.synchronize()
                torch.cuda._sleep(20_000_000)
            s.copy_(student.detach())
            t.copy_(teacher)
            assert same(both(s.requires_grad_(), t, labels, **keywords), want)
            if reduction != "none":
                logits = as_output(s.detach().requires_grad_())
                assert same(both(logits, t, labels, inplace=True, **keywords), want)


@each_dtype
@each_divergence
def test_nothing_waits_for_the_device_R_57(
    backend: str, divergence: str, dtype: torch.dtype
) -> None:
    student, teacher, labels = make_batch(ROWS, V, dtype=dtype)
    weight, upstream = torch.rand(ROWS, device=DEVICE), _number(0.3)
    calls: list[Keywords] = [
        {"reduction": "mean"},
        {"reduction": "sum", "token_weight": weight, "inplace": True},
        {"reduction": "mean", "num_items": torch.tensor(5, device=DEVICE), "label_smoothing": 0.1},
    ]
    for enabled in (False, True):  # the first call compiles, and may wait
        for keywords in calls:
            keywords = {"divergence": divergence, "temperature": 2.0, **keywords}
            with no_synchronization(enabled):
                logits = as_output(student.detach().clone().requires_grad_())
                loss = loss_of(logits, teacher, labels, backend=backend, **keywords)
                for retain in (True, False) if "inplace" not in keywords else (False,):
                    gradient(loss, logits, upstream, retain_graph=retain)


def test_a_device_that_is_not_the_current_one_R_55(backend: str) -> None:
    if REAL and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    student, teacher, labels = make_batch(ROWS, V)
    want = both(student, teacher, labels, backend=backend)
    student, teacher, labels = (
        x.detach().to("cuda:1" if REAL else DEVICE) for x in (student, teacher, labels)
    )
    got = both(student.requires_grad_(), teacher, labels, backend=backend)
    assert got[1].device == student.device
    assert same(tuple(x.to(DEVICE) for x in got), want)


# ------------------------------------------------------------------------------ memory, compilation


# the size at which goals are measured, and a small one
@pytest.mark.parametrize("n", [size(8192, 5), size(256, 3)])
@pytest.mark.parametrize("divergence", few_here(["forward_kl", "jsd"]))
@heavy
def test_peak_memory(backend: str, divergence: str, n: int) -> None:
    # One gradient and less than a mebibyte; in place, the mebibyte alone
    student, teacher, labels = make_batch(n, size(128256, 90))
    keywords: Keywords = {"temperature": 2.0, "divergence": divergence, "backend": backend}
    for inplace in (False, True):

        def step(inplace: bool = inplace) -> None:
            both(as_output(student), teacher, labels, inplace=inplace, **keywords)

        peak = peak_bytes(step) - (0 if inplace else student.nbytes)
        assert peak < MIB, f"{peak} bytes more than promised, inplace={inplace}"


@pytest.mark.parametrize("reduction", few_here(["none", "mean"]))
@two_dtypes
def test_compiled_without_a_break(backend: str, dtype: torch.dtype, reduction: str) -> None:
    torch.compiler.reset()
    keywords: Keywords = {"temperature": 2.0, "reduction": reduction, "backend": backend}

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return loss_of(student * 1, teacher, labels, **keywords)

    compiled = torch.compile(loss, fullgraph=True, backend="inductor" if REAL else "aot_eager")
    for n in (6, 11):
        inputs = make_batch(n, size(32000, 50), dtype=dtype)
        ours, theirs = compiled(*inputs), loss(*inputs)
        torch.testing.assert_close(ours, theirs)
        upstream = torch.rand_like(theirs)
        got, want = (gradient(x, inputs[0], upstream) for x in (ours, theirs))
        torch.testing.assert_close(got, want, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
