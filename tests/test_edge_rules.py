"""The edge rules: infinities, NaN rows, absent entries, rows that do not count, huge masks.

Each is stated by hand on a few numbers, then every backend is compared with the float64 reference
with the special entries at the seams of a longer row.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.logits import (
    HARD,
    INF,
    NAN,
    SOFT,
    gradient,
    identical,
    pair,
    rows_and_gradient,
    scalar_and_gradient,
    truth,
)
from torch import Tensor

from fused_kd import Head, kd_loss

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}
V = 4100  # two blocks and a tail
# first and last of a row, of a block, of a tail
SEAMS = [0, 2047, 2048, 4095, 4096, V - 1]


def logits(*row: float) -> Tensor:
    """Return one row of logits, the logarithms of `row`, in which 0 becomes -inf."""
    return torch.tensor([row]).log()


def same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    # Asserts the same infinities and NaNs, and numbers equal to the dtype's rounding.
    for a, b in zip(got, want, strict=True):
        rtol = TOLERANCE[a.dtype]
        smallest = 2**-24 if a.dtype == torch.float16 else 1e-7
        torch.testing.assert_close(a, b.to(a.dtype), rtol=rtol, atol=smallest, equal_nan=True)


# --------------------------------------------------------------------------- infinities by hand

FULL, PART = (1.0, 1.0, 2.0), (1.0, 3.0, 0.0)  # probabilities (¼, ¼, ½) and (¼, ¾, 0)
LN3 = math.log(3)


def jsd_by_hand(p: tuple[float, ...], q: tuple[float, ...], beta: float) -> float:
    total = 0.0
    for a, b in zip(p, q, strict=True):
        m = beta * b + (1 - beta) * a
        total += beta * b * math.log(b / m) if b else 0.0
        total += (1 - beta) * a * math.log(a / m) if a else 0.0
    return total


P_FULL, P_PART = (0.25, 0.25, 0.5), (0.25, 0.75, 0.0)
# values of the divergences if the student lacks an entry, and if the teacher lacks it
STUDENT_LACKS = {
    "forward_kl": INF,
    "reverse_kl": 0.75 * LN3,
    "jsd": jsd_by_hand(P_PART, P_FULL, 0.4),
    "tvd": 0.5,
    "mse": INF,
}
TEACHER_LACKS = {
    "forward_kl": 0.75 * LN3,
    "reverse_kl": INF,
    "jsd": jsd_by_hand(P_FULL, P_PART, 0.4),
    "tvd": 0.5,
    "mse": INF,
}


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_minus_infinity_on_one_side(backend: str, divergence: str, side: str) -> None:
    student, teacher = logits(*FULL), logits(*PART)
    expected = TEACHER_LACKS[divergence]
    if side == "student":
        student, teacher, expected = teacher, student, STUDENT_LACKS[divergence]
    value, gradient = rows_and_gradient(
        student, teacher, divergence=divergence, beta=0.4, backend=backend, **SOFT
    )
    torch.testing.assert_close(value, torch.tensor([expected]), rtol=1e-6, atol=0)
    if divergence == "forward_kl":  # its formula, p - q, finite when the value is not
        sign = 1 if side == "student" else -1
        want = sign * torch.tensor([[0.0, 0.5, -0.5]])
        torch.testing.assert_close(gradient, want, rtol=1e-6, atol=1e-7)
    else:
        assert gradient.isnan().all() if expected == INF else gradient.isfinite().all()


def test_minus_infinity_on_both_sides_is_absent(backend: str, divergence: str) -> None:
    keywords: dict[str, Any] = {
        "divergence": divergence,
        "label_smoothing": 0.3,
        "temperature": 2.0,
        "backend": backend,
    }
    label = torch.tensor([1])
    alone = rows_and_gradient(logits(1, 2, 3), logits(3, 1, 1), label, **keywords)
    padded = rows_and_gradient(logits(1, 2, 0, 3, 0), logits(3, 1, 0, 1, 0), label, **keywords)
    torch.testing.assert_close(padded[0], alone[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(padded[1][:, [0, 1, 3]], alone[1], rtol=1e-6, atol=1e-8)
    assert torch.equal(padded[1][:, [2, 4]], torch.zeros(1, 2))


# (ε, teacher's row, label, H, its gradient) for π = (¼, ¾, 0); the gradient is π - target
HARD_CASES: dict[str, tuple[float, tuple[float, ...], int, float, list[float]]] = {
    "label present": (0.0, FULL, 1, -math.log(0.75), [0.25, -0.25, 0.0]),
    "label at -inf": (0.0, FULL, 2, INF, [0.25, 0.75, -1.0]),
    "label absent": (0.0, PART, 2, INF, [0.25, 0.75, -1.0]),
    "smoothing over the student's -inf": (0.3, FULL, 1, INF, [0.15, -0.05, -0.1]),
    "smoothing leaves the absent out": (
        0.3,
        PART,
        1,
        -0.85 * math.log(0.75) - 0.15 * math.log(0.25),
        [0.1, -0.1, 0.0],
    ),
    "smoothing, label absent": (0.3, PART, 2, INF, [0.1, 0.6, -0.7]),
}


@pytest.mark.parametrize("case", HARD_CASES)
def test_the_hard_terms_infinities(backend: str, case: str) -> None:
    smoothing, teacher, label, value, expected = HARD_CASES[case]
    got = rows_and_gradient(
        logits(*PART),
        logits(*teacher),
        torch.tensor([label]),
        label_smoothing=smoothing,
        backend=backend,
        hard_weight=1.0,
        soft_weight=2.0**-100,  # with 0 the teacher is not read; tvd is finite here
        divergence="tvd",
    )
    torch.testing.assert_close(got[0], torch.tensor([value]), rtol=1e-6, atol=0)
    torch.testing.assert_close(got[1], torch.tensor([expected]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", HARD_CASES)
def test_a_teacher_of_weight_0_decides_nothing(backend: str, case: str) -> None:
    smoothing, teacher, label, *_ = HARD_CASES[case]
    keywords = {"label_smoothing": smoothing, "backend": backend, **HARD}
    student, labels = logits(*PART), torch.tensor([label])
    want = rows_and_gradient(student[:, :2], None, labels.clamp(max=1), **keywords)
    for unused in (None, logits(*teacher), logits(INF, NAN, 1), logits(*PART).double()):
        got = rows_and_gradient(student, unused, labels, **keywords)
        if label < 2:  # the third entry is absent
            torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=0)
            torch.testing.assert_close(got[1], F.pad(want[1], (0, 1)), rtol=1e-6, atol=1e-7)
        else:
            assert got[0] == INF
            assert got[1][0, 2] == -(1 - smoothing)


# -------------------------------------------------------------- infinities at the seams of a row


@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_infinities_at_the_seams_of_blocks(
    fast: str, side: str, divergence: str, dtype: torch.dtype
) -> None:
    student, teacher = pair(len(SEAMS) + 1, V)
    for row, seam in enumerate(SEAMS):
        if side != "teacher":
            student[row, seam] = -INF
        if side != "student":
            teacher[row, seam] = -INF
    student, teacher = student.to(dtype), teacher.to(dtype)
    labels = torch.tensor([*SEAMS[1:], 5, SEAMS[0]])  # none is at its own row's -inf
    for smoothing in (0.0, 0.2):
        keywords = {"divergence": divergence, "label_smoothing": smoothing, "temperature": 2.0}
        got = rows_and_gradient(student, teacher, labels, backend=fast, **keywords)
        same(got, truth(student, teacher, labels, **keywords))


# runs of -inf: a part of a block, a block, two blocks, the second block, two blocks and one entry
@pytest.mark.parametrize("run", [(0, 100), (0, 2048), (0, 4096), (2048, 4096), (0, 4097)])
def test_whole_blocks_without_a_finite_logit(
    fast: str, run: tuple[int, int], divergence: str, dtype: torch.dtype
) -> None:
    student, teacher = pair(3, V)
    hole = slice(*run)
    student[:2, hole] = -INF  # rows: both sides, the student alone, the teacher alone
    teacher[0, hole] = -INF
    teacher[2, hole] = -INF
    student, teacher = student.to(dtype), teacher.to(dtype)
    labels = torch.full((3,), V - 1)
    keywords = {"divergence": divergence, "temperature": 2.0, "label_smoothing": 0.1}
    got = rows_and_gradient(student, teacher, labels, backend=fast, **keywords)
    same(got, truth(student, teacher, labels, **keywords))


def test_one_finite_logit(backend: str, divergence: str) -> None:
    # Before it and after it are segments and blocks without any.
    row = torch.full((1, 100_000), -INF)
    row[0, 50_000] = 1.5
    label = torch.tensor([50_000])
    got = rows_and_gradient(row, row.clone(), label, backend=backend, divergence=divergence)
    identical(got, (torch.zeros(1), torch.zeros(1, 100_000)))


@pytest.mark.parametrize("vocabulary", [2, 3, 7, 9, 17, 31, 63])
def test_vector_lanes_without_a_finite_logit(backend: str, vocabulary: int) -> None:
    student, teacher = pair(2, vocabulary)
    student[:, :-1] = teacher[:, :-1] = -INF
    labels = torch.full((2,), vocabulary - 1)
    for divergence in ("forward_kl", "jsd"):
        got = rows_and_gradient(student, teacher, labels, backend=backend, divergence=divergence)
        same(got, truth(student, teacher, labels, divergence=divergence))


# ------------------------------------------------------------------------------- rows of NaN

# what is put into an entry of a row, or (nothing finite) into all entries
BROKEN = {"NaN": NAN, "+inf": INF, "nothing finite": -INF}


@pytest.mark.parametrize("bad", BROKEN)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_broken_row_is_nan_and_no_other(
    backend: str, divergence: str, side: str, bad: str, dtype: torch.dtype
) -> None:
    clean = pair(6, V, dtype=dtype)
    labels = torch.randint(V, (6,))
    keywords = {"divergence": divergence, "temperature": 2.0, "backend": backend}
    want = rows_and_gradient(*clean, labels, **keywords)
    for entry in SEAMS[::2] if bad != "nothing finite" else [slice(None)]:
        spoiled = [x.clone() for x in clean]
        spoiled[side == "teacher"][1, entry] = BROKEN[bad]
        got = rows_and_gradient(*spoiled, labels, **keywords)
        others = [0, 2, 3, 4, 5]
        assert got[0][1].isnan()
        assert got[1][1].isnan().all()
        assert torch.equal(got[0][others], want[0][others])
        assert torch.equal(got[1][others], want[1][others])


# ------------------------------------------------------------------- rows that do not count


@pytest.mark.parametrize("how", ["ignored", "weight 0"])
@pytest.mark.parametrize("bad", BROKEN)
def test_what_does_not_count_leaks_nothing(
    backend: str, bad: str, how: str, divergence: str, dtype: torch.dtype
) -> None:
    student, teacher = pair(4, 300, dtype=dtype)
    student[0], teacher[0], teacher[2] = BROKEN[bad], BROKEN[bad], BROKEN[bad]
    labels, weight = torch.randint(300, (4,)), torch.ones(4)
    if how == "ignored":
        labels[0] = labels[2] = -100
    else:
        weight[0] = weight[2] = 0
    keywords: dict[str, Any] = {"divergence": divergence, "backend": backend}
    for reduction in ("mean", "sum"):
        got = scalar_and_gradient(
            student, teacher, labels, token_weight=weight, reduction=reduction, **keywords
        )
        kept = scalar_and_gradient(
            student[1::2], teacher[1::2], labels[1::2], reduction=reduction, **keywords
        )
        assert torch.equal(got[1][1::2], kept[1])
        torch.testing.assert_close(got[0], kept[0], rtol=1e-6, atol=0)
        assert torch.equal(got[1][::2], torch.zeros_like(got[1][::2]))
    rows, gradient = rows_and_gradient(student, teacher, labels, token_weight=weight, **keywords)
    assert torch.equal(rows[::2], torch.zeros(2))
    assert torch.equal(gradient[::2], torch.zeros_like(gradient[::2]))


@pytest.mark.parametrize("off", ["hard_weight", "soft_weight"])
def test_a_term_of_weight_0_is_skipped_not_multiplied(backend: str, off: str) -> None:
    student, teacher = logits(*PART), logits(*FULL)  # H and forward_kl are infinite
    keywords: dict[str, Any] = {off: 0, "backend": backend}
    label = torch.tensor([2 if off == "hard_weight" else 1])
    divergence = "tvd" if off == "hard_weight" else "forward_kl"
    rows, gradient = rows_and_gradient(student, teacher, label, divergence=divergence, **keywords)
    assert rows.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("zero", ["ignored", "weights", "num_items"])
def test_no_kept_row_or_a_zero_denominator(
    backend: str, zero: str, reduction: str, divergence: str, dtype: torch.dtype
) -> None:
    if zero == "num_items" and reduction != "mean":
        return
    student = torch.randn(3, 40).to(dtype).requires_grad_()
    teacher, labels = torch.randn(3, 40).to(dtype), torch.tensor([1, 2, 3])
    extra: dict[str, Any] = {}
    if zero == "ignored":
        labels[:] = -100
    elif zero == "weights":
        extra["token_weight"] = torch.zeros(3)
    else:
        extra["num_items"] = torch.tensor(0)
    loss = kd_loss(
        student,
        teacher,
        labels,
        divergence=divergence,
        reduction=reduction,
        backend=backend,
        **extra,
    )
    assert torch.equal(loss, torch.zeros_like(loss))
    assert loss.requires_grad
    assert not gradient(loss.sum(), student).any()


# ---------------------------------------------------------------------------- masks of finfo.min


def lowest_numbers(side: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    student, teacher = pair(2, V, dtype=dtype)
    for row, masked in enumerate((slice(1, None, 3), slice(0, 2048))):
        if side != "teacher":
            student[row, masked] = torch.finfo(dtype).min
        if side != "student":
            teacher[row, masked] = torch.finfo(dtype).min
    return student, teacher


# (divergence, masked side) of losses near the end of float32's range: only their size is checked
HUGE = {
    ("forward_kl", "student"),
    ("reverse_kl", "teacher"),
    ("mse", "student"),
    ("mse", "teacher"),
}


@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_masks_of_the_lowest_number(
    fast: str, side: str, divergence: str, dtype: torch.dtype
) -> None:
    student, teacher = lowest_numbers(side, dtype)
    labels = torch.tensor([3, 2050])
    for temperature in (1.0, 0.5, 3.7):
        keywords = {"divergence": divergence, "temperature": temperature}
        got = rows_and_gradient(student, teacher, labels, backend=fast, **keywords)
        want = truth(student, teacher, labels, **keywords)
        if (divergence, side) in HUGE and dtype != torch.float16:
            assert (got[0] > 0.5 * want[0].clamp(max=1e37)).all()
            if divergence == "forward_kl":
                same(got[1:], want[1:])
        else:
            same(got, want)


# p/m between the smallest normal float32 and 0, when only the teacher's side counts
@pytest.mark.parametrize("depth", [60.0, 70.0, 80.0, 86.0, 90.0, 100.0, 200.0])
def test_jsd_where_the_students_probability_nearly_underflows(depth: float, backend: str) -> None:
    student = torch.zeros(1, 2048 + 40)
    student[0, 5] = -depth
    teacher = torch.full((1, 2048 + 40), -30.0)
    teacher[0, 5] = 10.0
    got, _ = rows_and_gradient(student, teacher, divergence="jsd", backend=backend, **SOFT)
    want, _ = truth(student, teacher, divergence="jsd", **SOFT)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)


# an offset common to a row's logits; beyond 1e8 float32 keeps nothing of their difference
@pytest.mark.parametrize(("offset", "gap"), [(0.0, 3.0), (1e4, 3.0), (1e6, 3.0), (1e8, 0.0)])
def test_common_offsets(backend: str, offset: float, gap: float) -> None:
    logits = torch.tensor([[2.0, -1.0]]) + offset
    head = Head(
        torch.ones(1, 1),
        torch.tensor([[2.0], [-1.0]]),
        torch.full((2,), offset).requires_grad_(),
    )
    p = 1 / (1 + math.exp(-gap))
    want = torch.tensor(-math.log(p)), torch.tensor([[p - 1, 1 - p]])
    label, options = torch.tensor([0]), {"hard_weight": 1, "soft_weight": 1, "backend": backend}
    got = scalar_and_gradient(logits, logits.clone(), label, **options)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    loss = kd_loss(head, head, label, **options)
    torch.testing.assert_close(loss.detach(), want[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient(loss, head.bias), want[1][0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.7])
@pytest.mark.parametrize("bonus", [10.0, 17.3, 25.0, 60.0, 1e4])
def test_confident_losses_are_not_negative(
    backend: str, bonus: float, temperature: float, dtype: torch.dtype
) -> None:
    student, teacher = pair(64, 500, scale=3.0, dtype=dtype)
    labels = torch.arange(64) * 7
    student[torch.arange(64), labels] += bonus
    weights = {"hard_weight": 1, "soft_weight": 1e-30}
    options = {"temperature": temperature, "backend": backend, **weights}
    rows, _ = rows_and_gradient(student, teacher, labels, **options)
    assert (rows >= 0).all()


# a backend may still add its exponentials relative to the first block's maximum
def test_a_confident_label_in_the_second_block(fast: str) -> None:
    student, teacher = pair(16, 2560, scale=3.0)
    labels = 2048 + torch.arange(16) * 7
    student[torch.arange(16), labels] += 30.0  # about 20 above the first block's maximum
    rows, _ = rows_and_gradient(student, teacher, labels, soft_weight=0, backend=fast)
    assert (rows >= 0).all()
