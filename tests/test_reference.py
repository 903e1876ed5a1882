"""The specification: gradients by gradcheck, values in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from support.logits import INF, hard, logits, soft
from torch import Tensor

from fused_kd import kd_loss

# ------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("soft_scale", ["t2", "none"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
def test_gradcheck_of_each_divergence_alone(
    divergence: str, temperature: float, soft_scale: str
) -> None:
    student = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 7, dtype=torch.float64)

    def loss(s: Tensor) -> Tensor:
        return soft(
            s,
            teacher,
            divergence=divergence,
            temperature=temperature,
            soft_scale=soft_scale,
            beta=0.3,
        )

    assert torch.autograd.gradcheck(loss, student)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck_of_the_hard_term_alone(smoothing: float, reduction: str) -> None:
    student = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 6, -100, 3])

    def loss(s: Tensor) -> Tensor:
        return hard(s, s.detach(), labels, label_smoothing=smoothing, reduction=reduction)

    assert torch.autograd.gradcheck(loss, student)


def test_gradcheck_of_both_terms_with_absent_entries_and_token_weight(divergence: str) -> None:
    present = torch.tensor([True, False, True, True, False, True])
    values = torch.randn(3, int(present.sum()), dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 6, dtype=torch.float64).masked_fill(~present, -INF)
    weight = torch.tensor([0.5, 2.0, 0.0])

    def loss(x: Tensor) -> Tensor:
        student = torch.full((3, 6), -INF, dtype=torch.float64)
        student = student.index_copy(1, present.nonzero().squeeze(1), x)
        return kd_loss(
            student,
            teacher,
            torch.tensor([0, 3, 5]),
            divergence=divergence,
            temperature=1.5,
            label_smoothing=0.2,
            token_weight=weight,
            backend="reference",
        )

    assert torch.autograd.gradcheck(loss, values)


# --------------------------------------------------------------------------- closed-form values

# two classes, p = (1/4, 3/4) and q = (1/2, 1/2): every divergence by hand
STUDENT, TEACHER = [0.0, math.log(3.0)], [0.0, 0.0]
MIX = (0.7 * 0.25 + 0.3 * 0.5, 0.7 * 0.75 + 0.3 * 0.5)  # β = 0.3 weighs the teacher
CLOSED_FORMS = {
    "forward_kl": 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75),
    "reverse_kl": 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5),
    "jsd": 0.3 * (0.5 * math.log(0.5 / MIX[0]) + 0.5 * math.log(0.5 / MIX[1]))
    + 0.7 * (0.25 * math.log(0.25 / MIX[0]) + 0.75 * math.log(0.75 / MIX[1])),
    "tvd": 0.25,
    "mse": math.log(3.0) ** 2 / 2,
}


@pytest.mark.parametrize("soft_scale", ["t2", "none"])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_closed_forms(backend: str, divergence: str, temperature: float, soft_scale: str) -> None:
    # The temperature divides the logits, and its square multiplies the divergence.
    dtype = torch.float64 if backend == "reference" else torch.float32
    sides = (temperature * logits(row, dtype=dtype) for row in (STUDENT, TEACHER))
    options = {"temperature": temperature, "soft_scale": soft_scale, "backend": backend}
    got = soft(*sides, divergence=divergence, beta=0.3, **options)
    want = CLOSED_FORMS[divergence] * (temperature**2 if soft_scale == "t2" else 1)
    assert got.item() == pytest.approx(want, rel=1e-14 if backend == "reference" else 2e-6)


def test_closed_form_of_the_hard_term() -> None:
    student, label = logits(STUDENT), torch.tensor([0])
    assert hard(student, student, label).item() == pytest.approx(math.log(4.0), rel=1e-14)
    smoothed = 0.8 * math.log(4) + 0.2 * (math.log(4) + math.log(4 / 3)) / 2
    got = hard(student, student, label, label_smoothing=0.2)
    assert got.item() == pytest.approx(smoothed, rel=1e-14)


def test_the_hard_term_ignores_the_temperature() -> None:
    student, label = logits(STUDENT), torch.tensor([0])
    cold, hot = (hard(student, student, label, temperature=t) for t in (1.0, 5.0))
    assert torch.equal(cold, hot)
