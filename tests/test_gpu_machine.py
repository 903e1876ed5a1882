"""Both GPU backends beside torch's machinery: graphs, streams, devices, memory, compilation."""

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
    REAL,
    SINGLE,
    as_output,
    both,
    few_here,
    gradient,
    heavy,
    in_time,  # noqa: F401  a fixture
    loss_of,
    made,
    no_synchronization,
    same,
    size,
)
from torch import Tensor

from benchmarks.device import peak_bytes
from fused_kd import KDLoss, divergences

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("backend", BACKENDS)]
DIVERGENCES = few_here(divergences.DIVERGENCES)
DTYPES = few_here([SINGLE, HALF, BRAIN])
MIB = 2**20


def _captured(call: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """What the call returned under capture, and what fills it anew."""
    if not REAL:
        results = call()

        def again() -> None:
            for old, new in zip(results, call(), strict=True):
                old.copy_(new)

        return results, again
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", few_here(["forward_kl", "tvd"]))
def test_a_captured_graph_with_other_inputs(
    backend: str, divergence: str, dtype: torch.dtype
) -> None:
    v = size(128256, 50)
    student, teacher, labels = made(6, v, dtype=dtype)
    keywords: dict[str, Any] = {"divergence": divergence, "temperature": 2.0, "backend": backend}
    results, replay = _captured(lambda: both(student, teacher, labels, **keywords))
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            for x in (student, teacher):
                x.copy_(2 * torch.randn(6, v, device=DEVICE))
            labels.copy_(torch.randint(v, (6,), device=DEVICE))
            labels[seed] = -100
        replay()
        want = both(student, teacher, labels, **keywords)
        assert same(results, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_another_stream_R_56(backend: str, divergence: str, dtype: torch.dtype) -> None:
    """The stream is kept busy before the inputs arrive: who runs on another one reads NaN."""
    student, teacher, labels = made(6, size(24000, 50), dtype=dtype)
    base: dict[str, Any] = {"divergence": divergence, "temperature": 2.0, "backend": backend}
    calls = [{**base, "reduction": r} for r in ("none", "mean", "sum")]
    want = [both(student, teacher, labels, **keywords) for keywords in calls]
    stream = torch.cuda.Stream() if REAL else None
    with torch.cuda.stream(stream) if REAL else contextlib.nullcontext():
        for keywords, expected in zip(calls, want, strict=True):
            s, t = (torch.full_like(x, math.nan) for x in (student, teacher))
            if REAL:
                torch.cuda.synchronize()
                torch.cuda._sleep(20_000_000)
            s.detach_().copy_(student.detach())
            t.copy_(teacher)
            got = both(s.requires_grad_(), t, labels, **keywords)
            in_place = as_output(s.detach().requires_grad_())
            if keywords["reduction"] != "none":
                loss = loss_of(in_place, t, labels, inplace=True, **keywords)
                assert torch.equal(gradient(loss, in_place), expected[1])
            assert same(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_nothing_waits_for_the_device_R_57(
    backend: str, divergence: str, dtype: torch.dtype
) -> None:
    student, teacher, labels = made(6, size(24000, 50), dtype=dtype)
    weight = torch.rand(6, device=DEVICE)
    upstream = torch.tensor(0.3, device=DEVICE)
    base: dict[str, Any] = {"divergence": divergence, "temperature": 2.0, "backend": backend}
    calls: list[dict[str, Any]] = [
        {"reduction": "mean"},
        {"reduction": "sum", "token_weight": weight, "inplace": True},
        {"reduction": "mean", "num_items": torch.tensor(5, device=DEVICE), "label_smoothing": 0.1},
    ]
    for i, keywords in enumerate((*calls, *calls)):  # what is compiled may wait, once
        with no_synchronization() if i >= len(calls) else contextlib.nullcontext():
            logits = as_output(student.detach().clone().requires_grad_())
            loss = loss_of(logits, teacher, labels, **base, **keywords)
            gradient(loss, logits, upstream, retain_graph=not keywords.get("inplace"))
            if not keywords.get("inplace"):
                gradient(loss, logits, upstream)


def test_a_device_that_is_not_the_current_one_R_55(backend: str) -> None:
    if REAL and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    other = "cuda:1" if REAL else DEVICE
    student, teacher, labels = made(6, size(24000, 50))
    want = both(student, teacher, labels, backend=backend)
    moved = (student.detach().to(other).requires_grad_(), teacher.to(other), labels.to(other))
    got = both(*moved, backend=backend)
    assert got[1].device == moved[0].device
    assert same(tuple(x.to(DEVICE) for x in got), want)


# ------------------------------------------------------------------------------ memory, compilation


# where the goals are measured, and where little is to be done
@pytest.mark.parametrize("n", [size(8192, 5), size(256, 3)])
@pytest.mark.parametrize("divergence", few_here(["forward_kl", "jsd"]))
@heavy
def test_peak_memory(backend: str, divergence: str, n: int) -> None:
    """One gradient and less than a mebibyte; in place, the mebibyte alone."""
    student, teacher, labels = made(n, size(128256, 90))
    matrix = student.numel() * student.itemsize
    for inplace in (False, True):
        loss = KDLoss(temperature=2.0, divergence=divergence, inplace=inplace, backend=backend)

        def step(loss: KDLoss = loss) -> None:
            logits = as_output(student)
            value = loss(logits, teacher, labels)
            assert isinstance(value, Tensor)
            gradient(value, logits)

        step()
        peak = peak_bytes(step, DEVICE) - (0 if inplace else matrix)
        assert peak < MIB, f"{peak} bytes more than promised, inplace={inplace}"


@pytest.mark.parametrize("reduction", few_here(["none", "mean"]))
@pytest.mark.parametrize("dtype", few_here([SINGLE, BRAIN]), ids=str)
def test_compiled_without_a_break(backend: str, dtype: torch.dtype, reduction: str) -> None:
    torch.compiler.reset()

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return loss_of(student * 1, teacher, labels, temperature=2.0, reduction=reduction,
                       backend=backend)  # fmt: skip

    compiled = torch.compile(loss, fullgraph=True, backend="inductor" if REAL else "aot_eager")
    for n in (6, 11):
        inputs = made(n, size(32000, 50), dtype=dtype)
        ours, theirs = compiled(*inputs), loss(*inputs)
        torch.testing.assert_close(ours, theirs)
        upstream = torch.rand_like(theirs)
        got, want = (gradient(x, inputs[0], upstream) for x in (ours, theirs))
        torch.testing.assert_close(got, want, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
