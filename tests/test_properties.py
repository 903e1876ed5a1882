"""Properties of the specification, and its float32 form under the error rule."""

from __future__ import annotations

import math

import pytest
import torch
from support.logits import DTYPES, soft, value_and_gradient

from fused_kd import kd_loss
from fused_kd.divergences import DIVERGENCES
from fused_kd.testing import REGIMES, assert_obeys_error_rule, make_inputs

# ------------------------------------------------------------------------------------ properties


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_logits_give_exactly_nothing_R_41(divergence: str) -> None:
    x = 5 * torch.randn(4, 33)
    value, gradient = value_and_gradient(soft, x, x.clone(), divergence=divergence, temperature=3.0)
    assert torch.equal(value, torch.zeros(4))
    assert torch.equal(gradient, torch.zeros(4, 33))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("regime", ["flat", "randn", "opposed", "nearly_equal", "range_400"])
def test_a_divergence_is_not_negative(divergence: str, regime: str) -> None:
    inputs = make_inputs(regime, 5, 40, torch.float64)
    assert (soft(*inputs[:2], divergence=divergence) >= -1e-15).all()


def test_bounds_and_symmetries() -> None:
    a, b = make_inputs("opposed", 5, 40, torch.float64)[:2]
    assert (soft(a, b, divergence="jsd") <= math.log(2) + 1e-15).all()
    assert (soft(a, b, divergence="tvd") <= 1 + 1e-15).all()
    forward = soft(a, b, divergence="forward_kl")
    torch.testing.assert_close(forward, soft(b, a, divergence="reverse_kl"), rtol=1e-14, atol=0)
    swapped = soft(b, a, divergence="jsd", beta=0.7)
    torch.testing.assert_close(swapped, soft(a, b, divergence="jsd", beta=0.3), rtol=1e-14, atol=0)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "tvd"])
def test_shifting_a_row_changes_nothing(divergence: str) -> None:
    student = torch.randint(-5, 6, (4, 20)).float()  # integers: the shift is exact in float32
    teacher = torch.randint(-5, 6, (4, 20)).float()
    plain = value_and_gradient(soft, student, teacher, divergence=divergence)
    shifted = value_and_gradient(soft, student + 1000, teacher - 3000, divergence=divergence)
    assert torch.equal(plain[0], shifted[0])
    assert torch.equal(plain[1], shifted[1])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_permuting_the_vocabulary_permutes_the_gradient(divergence: str) -> None:
    student, teacher = (torch.randn(3, 50, dtype=torch.float64) for _ in range(2))
    order = torch.randperm(50)
    value, gradient = value_and_gradient(soft, student, teacher, divergence=divergence)
    permuted = value_and_gradient(soft, student[:, order], teacher[:, order], divergence=divergence)
    torch.testing.assert_close(permuted[0], value, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(permuted[1], gradient[:, order], rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_large_temperature_limit_is_half_the_variance_of_the_difference(divergence: str) -> None:
    student, teacher = (torch.randn(3, 50, dtype=torch.float64) for _ in range(2))
    difference = student - teacher
    centred = difference - difference.mean(1, keepdim=True)
    limit = centred.square().sum(1) / (2 * 50)
    got = soft(student, teacher, divergence=divergence, temperature=1e4)
    torch.testing.assert_close(got, limit, rtol=1e-3, atol=0)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_temperature_is_a_scaling_bit_exact_for_powers_of_two(divergence: str) -> None:
    student, teacher = torch.randn(3, 20), torch.randn(3, 20)
    direct = soft(student, teacher, divergence=divergence, temperature=4.0)
    scaled = 16 * soft(student / 4, teacher / 4, divergence=divergence)
    assert torch.equal(direct, scaled)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_gradient_of_a_softmax_divergence_sums_to_zero(divergence: str) -> None:
    student, teacher = (torch.randn(3, 20, dtype=torch.float64) for _ in range(2))
    _, gradient = value_and_gradient(soft, student, teacher, divergence=divergence)
    if divergence != "mse":
        torch.testing.assert_close(
            gradient.sum(1), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-15
        )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_parts_compose_the_loss(reduction: str) -> None:
    student, teacher = (torch.randn(3, 20, dtype=torch.float64) for _ in range(2))
    parts = kd_loss(
        student,
        teacher,
        torch.tensor([1, -100, 3]),
        hard_weight=0.3,
        soft_weight=0.9,
        reduction=reduction,
        return_parts=True,
    )
    torch.testing.assert_close(parts.loss, 0.3 * parts.hard + 0.9 * parts.soft)


# ------------------------------------------------------------------------------- the error rule


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("regime", REGIMES)
def test_the_reference_in_float32_obeys_the_error_rule(
    regime: str, divergence: str, dtype: torch.dtype
) -> None:
    inputs = make_inputs(regime, 3, 101, dtype)
    assert_obeys_error_rule(
        inputs,
        torch.tensor([1.0, -0.3, 2.0]),
        backend="reference",
        divergence=divergence,
        temperature=2.0,
        label_smoothing=0.1,
        beta=0.3,
    )
