"""Regression cases N-01 to N-10: values of mixed dtypes, huge offsets, underflow, masks of -inf."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from fast import rows_and_gradient, scalar_and_gradient
from regression_helpers import grad, loss_of
from regression_numbers import compare
from regression_registry import case
from torch import Tensor

from fused_kd import Head, kd_loss
from fused_kd.divergences import DIVERGENCES
from fused_kd.testing import Inputs, assert_obeys_error_rule, eager_kd_loss

INF = math.inf
SOFT: dict[str, Any] = {"hard_weight": 0, "soft_weight": 1}
HARD: dict[str, Any] = {"hard_weight": 1, "soft_weight": 0}


@case("N-01", "ms-swift#10156: JSD -1.7e-4, the temperature divides in bfloat16")
def jsd_of_two_dtypes(backend: str) -> None:
    student = 3 * torch.randn(8, 700)
    teacher = student.bfloat16() + (0.05 * torch.randn(8, 700)).bfloat16()
    labels = torch.arange(8)
    options: dict[str, Any] = {"divergence": "jsd", "backend": backend, **SOFT}
    for temperature in (0.7, 1.0, 2.0):
        for pair in ((student, teacher), (teacher, student)):
            inputs = Inputs(*pair, labels)
            assert_obeys_error_rule(inputs, temperature=temperature, **options)
            rows, _ = rows_and_gradient(*inputs, temperature=temperature, **options)
            exact, _ = rows_and_gradient(
                *(x.double() for x in pair), divergence="jsd", temperature=temperature, **SOFT
            )
            assert (rows > 0).all()
            torch.testing.assert_close(rows.double(), exact, rtol=1e-3, atol=0)


@case("N-02", "EasyDeL#267: KL of equal sides is 0.0248 at V = 248320; compiled in N-02 below")
def equal_sides_of_a_large_vocabulary(backend: str) -> None:
    for scale, divergence in itertools.product((20, 70), ("forward_kl", "reverse_kl", "jsd")):
        student = (scale * torch.randn(1, 248_320)).bfloat16()
        rows, gradient = rows_and_gradient(
            student, student.clone(), divergence=divergence, backend=backend, **SOFT
        )
        assert rows.tolist() == [0.0]
        assert torch.count_nonzero(gradient) == 0


@case("N-03", "mlx#4188: an offset common to a row kills the loss, which cancels to 0")
def common_offsets(backend: str) -> None:
    labels, weight = torch.tensor([0]), torch.tensor([[2.0], [-1.0]])
    for offset in (0.0, 1e4, 1e6, 1e8):
        logits = torch.tensor([[2.0, -1.0]]) + offset
        gap = (logits[0, 0] - logits[0, 1]).item()  # 3; beyond 1e8 the dtype keeps none of it
        assert gap == (0.0 if offset == 1e8 else 3.0)
        p = 1 / (1 + math.exp(-gap))
        options: dict[str, Any] = {"hard_weight": 1, "soft_weight": 1, "backend": backend}
        loss, gradient = scalar_and_gradient(logits, logits.clone(), labels, **options)
        torch.testing.assert_close(loss, torch.tensor(-math.log(p)), rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient, torch.tensor([[p - 1, 1 - p]]), rtol=1e-5, atol=0)
        bias = torch.full((2,), offset).requires_grad_()
        hidden = torch.ones(1, 1)
        head = Head(hidden, weight, bias)
        loss = kd_loss(head, head, labels, **options)
        assert isinstance(loss, Tensor)
        torch.testing.assert_close(loss.detach(), torch.tensor(-math.log(p)), rtol=1e-6, atol=0)
        torch.testing.assert_close(grad(loss, bias), gradient[0])


@case("N-04", "Soup#719, #736: finite loss, NaN gradient, p log p differentiated at underflow")
def gaps_beyond_float16(backend: str) -> None:
    for divergence in ("reverse_kl", "jsd"):
        student, teacher = (torch.randn(3, 50).half() for _ in range(2))
        student[1] = torch.linspace(-60, 0, 50).half()
        teacher[1] = student[1].flip(0)
        student[2, 1:] -= 60  # one entry has it all
        compare(student, teacher, torch.tensor([0, 1, 2]), backend, divergence=divergence, **SOFT)
        gradient = rows_and_gradient(
            student, teacher, divergence=divergence, backend=backend, **SOFT
        )[1]
        assert gradient.isfinite().all()


@case("N-05", "llm-foundry#795: cross-entropy loses digits where N·V is large")
def a_mean_of_a_million_rows(backend: str) -> None:
    student, teacher = (torch.randn(2**20, 4) for _ in range(2))
    labels = torch.randint(4, (2**20,))
    loss, gradient = scalar_and_gradient(student, teacher, labels, backend=backend)
    leaf = student.double().requires_grad_()
    want = eager_kd_loss(leaf, teacher.double(), labels)
    torch.testing.assert_close(loss.double(), want.detach(), rtol=1e-6, atol=0)
    by_student = grad(want, leaf)
    assert (gradient.double() - by_student).norm() <= 1e-6 * by_student.norm()


@case("N-07", "pytorch#89558: KL's gradient is NaN where the target is 0 and log p is -700")
def targets_of_zero(backend: str) -> None:
    for low, divergence in itertools.product((-INF, -700.0), DIVERGENCES):
        if low == -INF and divergence in ("reverse_kl", "mse"):
            continue  # infinite by definition
        student, teacher = torch.full((2, 40), -700.0), torch.full((2, 40), low)
        student[:, 3], teacher[0, 3], teacher[1, 7] = 0.5, 0.0, 0.0
        labels = torch.tensor([3, 7])
        compare(student, teacher, labels, backend, divergence=divergence)
        rows, gradient = rows_and_gradient(
            student, teacher, labels, divergence=divergence, backend=backend
        )
        assert rows.isfinite().all()
        assert gradient.isfinite().all()


@case("N-09", "Automodel#3850: -inf before a learned temperature, whose gradient is NaN")
def a_learned_temperature(backend: str) -> None:
    student, teacher = torch.randn(4, 30), torch.randn(4, 30)
    labels, absent = torch.randint(20, (4,)), torch.arange(30) >= 20
    tau = torch.tensor(1.7, requires_grad=True)
    taught = teacher.masked_fill(absent, -INF)

    divided = student / tau
    loss = loss_of(divided.masked_fill(absent, -INF), taught, labels, backend=backend)
    exact = tau.detach().double().requires_grad_()
    want = eager_kd_loss((student.double() / exact)[:, :20], taught.double()[:, :20], labels)
    torch.testing.assert_close(grad(loss, tau), grad(want, exact).float())

    # Divided after it was masked: ours is 0 there, and 0·(-inf) is torch's division's.
    masked = (student.masked_fill(absent, -INF) / tau).detach().requires_grad_()
    by_logits = grad(loss_of(masked, taught, labels, backend=backend), masked)
    assert by_logits.isfinite().all()
    assert torch.count_nonzero(by_logits[:, absent]) == 0


@case("N-10", "pytorch#148884, Megatron: ε/V on every entry, or ε/(V-1) on all but the label")
def smoothing_is_that_of_torch(backend: str) -> None:
    best = torch.tensor([[math.log(0.95), math.log(0.05)]])  # not [0.9, 0.1]
    for shift in (0.0, 0.1, -0.1):
        student = best + torch.tensor([[shift, 0.0]])
        loss, gradient = scalar_and_gradient(
            student, student, torch.tensor([0]), label_smoothing=0.1, backend=backend, **HARD
        )
        want = F.cross_entropy(student, torch.tensor([0]), label_smoothing=0.1)
        torch.testing.assert_close(loss, want)
        slope = gradient[0, 0].item()
        assert abs(slope) < 1e-7 if shift == 0 else slope * shift > 1e-4
