"""The specification: gradients by gradcheck, values in closed form, edge rules, properties."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fused_kd import KDLossParts, kd_loss
from fused_kd.backends import reference
from fused_kd.options import DIVERGENCES, KDOptions
from fused_kd.testing import REGIMES, assert_obeys_error_rule, make_inputs

INF, NAN = math.inf, math.nan


def logits(*rows: list[float], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(rows, dtype=dtype)


def soft(student: Tensor, teacher: Tensor, **keywords: object) -> Tensor:
    """The soft term of every row, alone."""
    options = {"hard_weight": 0, "soft_weight": 1, "reduction": "none", "backend": "reference"}
    return kd_loss(student, teacher, **{**options, **keywords})  # type: ignore[arg-type,return-value]


def hard(student: Tensor, teacher: Tensor, labels: Tensor, **keywords: object) -> Tensor:
    """The hard term of every row, alone."""
    options = {"hard_weight": 1, "soft_weight": 0, "reduction": "none", "backend": "reference"}
    return kd_loss(student, teacher, labels, **{**options, **keywords})  # type: ignore[arg-type,return-value]


def value_and_gradient(
    term: Callable[..., Tensor], student: Tensor, *others: Tensor, **keywords: object
) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    value = term(leaf, *others, **keywords)
    value.sum().backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


# ------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("soft_scale", ["t2", "none"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck_of_each_divergence_alone_R_27(
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
def test_gradcheck_of_the_hard_term_alone_R_26(smoothing: float, reduction: str) -> None:
    student = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 6, -100, 3])

    def loss(s: Tensor) -> Tensor:
        return hard(s, s.detach(), labels, label_smoothing=smoothing, reduction=reduction)

    assert torch.autograd.gradcheck(loss, student)


@pytest.mark.parametrize("divergence", DIVERGENCES)
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
        )  # type: ignore[return-value]

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


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_closed_form_value_R_42(divergence: str) -> None:
    got = soft(logits(STUDENT), logits(TEACHER), divergence=divergence, beta=0.3)
    assert got.item() == pytest.approx(CLOSED_FORMS[divergence], rel=1e-14)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_temperature_divides_the_logits_and_t2_multiplies_the_divergence_R_42(
    divergence: str,
) -> None:
    student, teacher = 4 * logits(STUDENT), 4 * logits(TEACHER)
    plain = soft(
        student, teacher, divergence=divergence, beta=0.3, temperature=4.0, soft_scale="none"
    )
    scaled = soft(student, teacher, divergence=divergence, beta=0.3, temperature=4.0)
    assert plain.item() == pytest.approx(CLOSED_FORMS[divergence], rel=1e-14)
    assert scaled.item() == pytest.approx(16 * CLOSED_FORMS[divergence], rel=1e-14)


def test_closed_form_of_the_hard_term() -> None:
    student, label = logits(STUDENT), torch.tensor([0])
    assert hard(student, student, label).item() == pytest.approx(math.log(4.0), rel=1e-14)
    smoothed = 0.8 * math.log(4) + 0.2 * (math.log(4) + math.log(4 / 3)) / 2
    got = hard(student, student, label, label_smoothing=0.2)
    assert got.item() == pytest.approx(smoothed, rel=1e-14)


def test_the_hard_term_ignores_the_temperature() -> None:
    student, label = logits(STUDENT), torch.tensor([0])
    assert torch.equal(
        hard(student, student, label, temperature=5.0), hard(student, student, label)
    )


# ------------------------------------------------------------------------------------ edge rules


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_padding_with_minus_infinity_changes_nothing_R_04(divergence: str) -> None:
    student, teacher = (torch.randn(3, 5, dtype=torch.float64) for _ in range(2))
    pad = torch.full((3, 4), -INF, dtype=torch.float64)
    padded = torch.cat([student, pad], 1), torch.cat([teacher, pad], 1)
    labels = torch.tensor([0, 2, 4])
    keywords = {"divergence": divergence, "label_smoothing": 0.3, "hard_weight": 0.5}

    def both(s: Tensor, t: Tensor, **k: object) -> Tensor:
        return soft(s, t, labels=labels, soft_weight=0.5, **k)

    value, gradient = value_and_gradient(both, student, teacher, **keywords)
    padded_value, padded_gradient = value_and_gradient(both, *padded, **keywords)
    torch.testing.assert_close(padded_value, value, rtol=1e-14, atol=0)
    torch.testing.assert_close(padded_gradient[:, :5], gradient, rtol=1e-14, atol=1e-16)
    assert torch.equal(padded_gradient[:, 5:], torch.zeros(3, 4, dtype=torch.float64))


# divergence, value where only the student / only the teacher has a -inf entry; None: finite
ONE_SIDED = [
    ("forward_kl", INF, None),
    ("reverse_kl", None, INF),
    ("jsd", None, None),
    ("tvd", None, None),
    ("mse", INF, INF),
]


@pytest.mark.parametrize("low", [0.0, 30.0])  # 30: the other side's probability underflows
@pytest.mark.parametrize(("divergence", "student_only", "teacher_only"), ONE_SIDED)
def test_infinity_on_one_side_R_03(
    divergence: str, student_only: float | None, teacher_only: float | None, low: float
) -> None:
    open_row = logits([1.0, 2.0, -low * 40], dtype=torch.float32)
    shut_row = logits([1.0, 2.0, -INF], dtype=torch.float32)
    for student, teacher, expected in (
        (shut_row, open_row, student_only),
        (open_row, shut_row, teacher_only),
    ):
        value, gradient = value_and_gradient(soft, student, teacher, divergence=divergence)
        if expected is None:
            assert value.isfinite().all()
            assert gradient.isfinite().all()
        else:
            assert value.item() == expected


def test_the_gradient_of_an_infinite_forward_kl_is_its_formula() -> None:
    student, teacher = logits([0.0, 0.0, -INF]), logits([0.0, 0.0, 0.0])
    _, gradient = value_and_gradient(soft, student, teacher)
    torch.testing.assert_close(gradient, logits([1 / 6, 1 / 6, -1 / 3]))


@pytest.mark.parametrize(
    ("divergence", "student", "teacher"),
    [
        ("reverse_kl", [0.0, 0.0, 0.0], [0.0, 0.0, -INF]),
        ("mse", [0.0, 0.0, 0.0], [0.0, 0.0, -INF]),
        ("mse", [0.0, 0.0, -INF], [0.0, 0.0, 0.0]),
    ],
)
def test_the_gradient_of_the_other_infinite_terms_is_nan_in_that_row_only(
    divergence: str, student: list[float], teacher: list[float]
) -> None:
    both = logits(student, [1.0, 2.0, 3.0]), logits(teacher, [3.0, 2.0, 1.0])
    value, gradient = value_and_gradient(soft, *both, divergence=divergence)
    assert value[0] == INF
    assert value[1].isfinite()
    assert gradient[0].isnan().all()
    assert gradient[1].isfinite().all()


def test_a_label_at_minus_infinity_is_infinite_with_the_formulas_gradient() -> None:
    student = logits([0.0, 0.0, -INF])
    value, gradient = value_and_gradient(hard, student, student, torch.tensor([2]))
    assert value.item() == INF
    torch.testing.assert_close(gradient, logits([0.5, 0.5, -1.0]))


def test_smoothing_over_an_entry_that_only_the_student_lacks_is_infinite() -> None:
    student, teacher = logits([0.0, 0.0, -INF]), logits([0.0, 0.0, 0.0])
    label = torch.tensor([0])
    assert hard(student, teacher, label).isfinite().all()
    value, gradient = value_and_gradient(hard, student, teacher, label, label_smoothing=0.3)
    assert value.item() == INF
    torch.testing.assert_close(gradient, logits([0.5 - 0.8, 0.5 - 0.1, -0.1]))


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("bad", ["nan", "inf", "no finite logit"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_broken_row_is_nan_and_no_other(divergence: str, bad: str, side: str) -> None:
    both = {"student": torch.randn(3, 4), "teacher": torch.randn(3, 4)}
    if bad == "no finite logit":
        both[side][1] = -INF
    else:
        both[side][1, 2] = float(bad)
    value, gradient = value_and_gradient(
        soft, both["student"], both["teacher"], divergence=divergence
    )
    assert value.isnan().tolist() == [False, True, False]
    assert gradient.isnan().all(1).tolist() == [False, True, False]
    assert gradient.isnan().any(1).tolist() == [False, True, False]


def test_the_hard_term_reads_only_the_student() -> None:
    student, teacher = torch.randn(2, 4), torch.full((2, 4), NAN)
    labels = torch.tensor([1, 2])
    value = hard(student, teacher, labels, label_smoothing=0.1)
    torch.testing.assert_close(
        value,
        torch.nn.functional.cross_entropy(student, labels, label_smoothing=0.1, reduction="none"),
    )
    student[0] = INF
    assert hard(student, teacher, labels).isnan().tolist() == [True, False]


def test_ignored_rows_and_rows_of_weight_zero_leak_nothing_R_07() -> None:
    student, teacher = torch.randn(4, 5), torch.randn(4, 5)
    student[1], teacher[2] = NAN, -INF
    labels = torch.tensor([0, -100, 3, 4])
    weight = torch.tensor([1.0, 1.0, 0.0, 2.0])
    leaf = student.clone().requires_grad_()
    loss = kd_loss(leaf, teacher, labels, token_weight=weight, backend="reference")
    loss.backward()  # type: ignore[union-attr]
    kept = torch.tensor([0, 3])
    alone = kd_loss(student[kept], teacher[kept], labels[kept], token_weight=weight[kept])
    torch.testing.assert_close(loss, alone)
    assert leaf.grad is not None
    assert torch.equal(leaf.grad[1:3], torch.zeros(2, 5))


def test_an_out_of_range_label_is_nan_where_no_check_refused_it_R_34() -> None:
    x = torch.randn(1, 3, 4)
    w = torch.ones(3)
    labels = torch.tensor([4, -1, 2])
    terms = reference.forward_backward(x, x, labels, w, None, KDOptions(hard_weight=1))
    assert terms[0].isnan().tolist() == [True, True, False]
    assert terms[3][0].isnan().all(1).tolist() == [True, True, False]


def test_one_entry_vocabulary_is_zero() -> None:
    student, teacher = torch.randn(3, 1), torch.randn(3, 1)
    labels = torch.zeros(3, dtype=torch.int64)
    for divergence in ("forward_kl", "reverse_kl", "jsd", "tvd"):
        assert soft(student, teacher, divergence=divergence).tolist() == [0, 0, 0]
    assert hard(student, teacher, labels).tolist() == [0, 0, 0]


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
    permuted = value_and_gradient(
        soft, student[:, order], teacher[:, order], divergence=divergence
    )
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
    assert isinstance(parts, KDLossParts)
    torch.testing.assert_close(parts.loss, 0.3 * parts.hard + 0.9 * parts.soft)


# ------------------------------------------------------------------------------- the error rule


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
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
