"""The specification: gradients by gradcheck, values in closed form, edge rules."""

from __future__ import annotations

import math

import pytest
import torch
from support.logits import INF, NAN, hard, logits, soft, value_and_gradient
from torch import Tensor

from fused_kd import kd_loss
from fused_kd.backends import reference
from fused_kd.divergences import DIVERGENCES
from fused_kd.options import Formula, KDOptions, temperature_tensor

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
    options = {"label_smoothing": 0.3, "soft_weight": 2.0**-100, "divergence": "tvd"}  # it is read
    value, gradient = value_and_gradient(hard, student, teacher, label, **options)
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
    loss.backward()
    kept = torch.tensor([0, 3])
    alone = kd_loss(student[kept], teacher[kept], labels[kept], token_weight=weight[kept])
    torch.testing.assert_close(loss, alone)
    assert leaf.grad is not None
    assert torch.equal(leaf.grad[1:3], torch.zeros(2, 5))


def test_an_out_of_range_label_is_nan_where_no_check_refused_it_R_34() -> None:
    x = torch.randn(1, 3, 4)
    w = torch.ones(3)
    labels = torch.tensor([4, -1, 2])
    formula = Formula("forward_kl", temperature_tensor(KDOptions()), 0.5, "t2", 0.0)
    terms = reference.forward_backward(x, x, labels, w, None, formula)
    assert terms[0].isnan().tolist() == [True, True, False]
    assert terms[3][0].isnan().all(1).tolist() == [True, True, False]


def test_one_entry_vocabulary_is_zero() -> None:
    student, teacher = torch.randn(3, 1), torch.randn(3, 1)
    labels = torch.zeros(3, dtype=torch.int64)
    for divergence in ("forward_kl", "reverse_kl", "jsd", "tvd"):
        assert soft(student, teacher, divergence=divergence).tolist() == [0, 0, 0]
    assert hard(student, teacher, labels).tolist() == [0, 0, 0]
