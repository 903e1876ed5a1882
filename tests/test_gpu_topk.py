"""Top-k teachers and kd_metrics on a GPU, with both backends."""

from __future__ import annotations

import pytest
import torch
from gpu_device import BACKENDS, BRAIN, DEVICE, HALF, SINGLE, few_here, obey_for, size
from support.topk import PAIRS, with_topk

from fused_kd import TopK, kd_loss, kd_metrics
from fused_kd.testing import make_inputs

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("backend", BACKENDS)]
# one block a row, several, rows that begin anywhere: few kernels for Triton to compile
CASES = few_here(
    [
        ((4, 4096), SINGLE, 1.0),
        ((4, size(128256, 96)), BRAIN, 2.0),
        ((3, size(50257, 71)), HALF, 3.7),
    ]
)
Case = tuple[tuple[int, int], torch.dtype, float]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("tail", "divergence"), few_here(PAIRS))
def test_losses(tail: str, divergence: str, case: Case, backend: str) -> None:
    shape, dtype, temperature = case
    inputs = with_topk(make_inputs("language_model", *shape, dtype), 16, tail, temperature)
    obey_for(backend, inputs, divergence=divergence, temperature=temperature)


@pytest.mark.parametrize("dtype", few_here([SINGLE, BRAIN]), ids=str)
def test_in_place_and_few_or_many_tokens(dtype: torch.dtype, backend: str) -> None:
    student, dense, labels = (x.to(DEVICE) for x in make_inputs("randn", 6, size(32000, 70), dtype))
    for k in (0, 1, size(2000, 60)):
        teacher = TopK.from_logits(dense.float(), k)
        grads = []
        for inplace in (False, True):
            leaf = student.clone().requires_grad_()
            kd_loss(leaf * 1, teacher, labels, inplace=inplace, backend=backend).backward()
            grads.append(leaf.grad)
        assert torch.equal(*grads)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("k", [None, 16])
def test_metrics(k: int | None, case: Case, backend: str) -> None:
    shape, dtype, temperature = case
    inputs = make_inputs("language_model", *shape, dtype)
    double = inputs._replace(student=inputs.student.double(), teacher=inputs.teacher.double())
    if k is not None:
        inputs = with_topk(inputs, k, temperature=temperature)
        double = double._replace(teacher=inputs.teacher)
    want = kd_metrics(*double, temperature=temperature)
    got = kd_metrics(*(x.to(DEVICE) for x in inputs), temperature=temperature, backend=backend)
    for name, mine, exact in zip(got._fields, got, want, strict=True):
        torch.testing.assert_close(
            mine.cpu().double(),
            exact.double(),
            rtol=5e-5,
            atol=5e-6,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )
