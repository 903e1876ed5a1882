"""Properties that hold bit for bit or to rounding, on shapes and values that hypothesis chooses."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from support.backends import threads
from support.logits import DTYPES, SOFT, identical, rows_and_gradient, scalar_and_gradient
from torch import Tensor

from fused_kd import kd_loss
from fused_kd.divergences import DIVERGENCES

few = settings(max_examples=12, derandomize=True, deadline=None, database=None)
many = settings(
    max_examples=600,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)

dtypes = st.sampled_from(DTYPES)
divergences = st.sampled_from(DIVERGENCES)
temperatures = st.sampled_from([1.0, 2.0, 4.0, 0.7, 3.7, 20.0])
# a vector, its tails, blocks of 2048 and theirs, a second segment of 32768
vocabularies = st.one_of(
    st.integers(1, 70), st.sampled_from([2047, 2048, 2049, 4095, 4113, 32768, 32801])
)
# a logit's scale: flat, ordinary, peaked, far beyond every exponential
scales = st.sampled_from([1e-3, 1.0, 3.0, 30.0, 1e4])
seeds = st.integers(0, 2**20)


def normal(
    seed: int, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator)).to(dtype)


# ------------------------------------------------------------------------ the bits of a row


def alone_or_in_company(
    backend: str, dtype: torch.dtype, divergence: str, vocabulary: int, scale: float, seed: int
) -> None:
    """Assert that a row's bits depend on no other row, nor on the number of threads."""
    rows = 5 if vocabulary < 5000 else 3
    student, teacher = (
        normal(seed + i, rows, vocabulary, scale=scale, dtype=dtype) for i in (0, 1)
    )
    labels = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(seed))
    keywords: dict[str, Any] = {"divergence": divergence, "temperature": 2.0, "backend": backend}
    whole = rows_and_gradient(student, teacher, labels, label_smoothing=0.1, **keywords)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    for part in (order, torch.tensor([rows - 1]), torch.arange(1, rows)):
        piece = rows_and_gradient(
            student[part], teacher[part], labels[part], label_smoothing=0.1, **keywords
        )
        identical(piece, (whole[0][part], whole[1][part]))
    for number in (1, 2, 3, 8):
        with threads(number):
            again = rows_and_gradient(student, teacher, labels, label_smoothing=0.1, **keywords)
            single = scalar_and_gradient(student[:1], teacher[:1], labels[:1], **keywords)
        identical(again, whole)
        if number == 1:
            first = single
        identical(single, first)


DRAWN = given(
    dtype=dtypes, divergence=divergences, vocabulary=vocabularies, scale=scales, seed=seeds
)


@few
@DRAWN
def test_a_rows_bits_depend_on_nothing_but_the_row(fast: str, **drawn: Any) -> None:
    alone_or_in_company(fast, **drawn)


@pytest.mark.slow
@many
@DRAWN
def test_a_rows_bits_depend_on_nothing_but_the_row_at_length(fast: str, **drawn: Any) -> None:
    alone_or_in_company(fast, **drawn)


@few
@given(dtypes, st.integers(0, 9), st.integers(0, 9), st.integers(0, 5), vocabularies, seeds)
def test_where_a_row_lies_changes_no_bit(
    fast: str, dtype: torch.dtype, lead: int, gap: int, shift: int, vocabulary: int, seed: int
) -> None:
    rows = 3
    flat = [torch.full((lead + rows * (vocabulary + gap),), math.nan, dtype=dtype) for _ in (0, 1)]
    student, teacher = (x.as_strided((rows, vocabulary), (vocabulary + gap, 1), lead) for x in flat)
    student.copy_(normal(seed, rows, vocabulary))  # NaN stays around and between the rows
    teacher.copy_(normal(seed + 1, rows, vocabulary))
    labels = torch.arange(shift + rows)[shift:] % vocabulary
    leaf = flat[0].clone().requires_grad_()
    view = leaf.as_strided((rows, vocabulary), (vocabulary + gap, 1), lead)
    loss = kd_loss(view, teacher, labels, backend=fast)
    (gradient,) = torch.autograd.grad(loss, leaf)
    got = gradient.as_strided((rows, vocabulary), (vocabulary + gap, 1), lead)
    want = scalar_and_gradient(student, teacher.contiguous(), labels.clone(), backend=fast)
    identical((loss.detach(), got), want)


# -------------------------------------------------------------------------- the mathematics


@few
@given(divergences, vocabularies, scales, temperatures, dtypes, seeds)
def test_equal_logits_give_exactly_nothing(
    backend: str,
    divergence: str,
    vocabulary: int,
    scale: float,
    temperature: float,
    dtype: torch.dtype,
    seed: int,
) -> None:
    x = normal(seed, 2, vocabulary, scale=scale, dtype=dtype)
    got = rows_and_gradient(
        x, x.clone(), divergence=divergence, temperature=temperature, backend=backend, **SOFT
    )
    identical(got, (torch.zeros(2), torch.zeros_like(x)))


@few
@given(divergences, vocabularies, scales, temperatures, seeds)
def test_bounds_and_sums(
    backend: str, divergence: str, vocabulary: int, scale: float, temperature: float, seed: int
) -> None:
    student, teacher = (normal(seed + i, 3, vocabulary, scale=scale) for i in (0, 1))
    value, gradient = rows_and_gradient(
        student,
        teacher,
        divergence=divergence,
        temperature=temperature,
        soft_scale="none",
        backend=backend,
        **SOFT,
    )
    reach = 1 + (student.amax(1) - student.amin(1)).maximum(teacher.amax(1) - teacher.amin(1))
    unit = 4 * torch.finfo(torch.float32).eps * (1 + reach / temperature)
    assert (value >= -unit).all()
    if divergence in ("jsd", "tvd"):
        assert (value <= (math.log(2) if divergence == "jsd" else 1) + unit).all()
    if divergence != "mse":
        size = gradient.double().abs().sum(1) + 1
        assert (gradient.double().sum(1).abs() <= unit * size).all()


@few
@given(divergences, st.integers(2, 3000), st.integers(-3000, 3000), seeds)
def test_a_shift_of_a_rows_logits_changes_nothing(
    backend: str, divergence: str, vocabulary: int, shift: int, seed: int
) -> None:
    # Integers: the shift itself is exact in float32. Not a bit, if the maximum is subtracted;
    # what one rounding does, if it is folded into a multiply-add.
    assume(divergence != "mse")
    student, teacher = (normal(seed + i, 2, vocabulary, scale=3.0).round() for i in (0, 1))
    labels = torch.tensor([0, vocabulary - 1])
    keywords: dict[str, Any] = {"divergence": divergence, "temperature": 2.0, "backend": backend}
    want = rows_and_gradient(student, teacher, labels, **keywords)
    got = rows_and_gradient(student + shift, teacher - 2 * shift, labels, **keywords)
    if backend == "cpu":
        identical(got, want)
        return
    reach = 1 + torch.maximum(*(x.amax(1) - x.amin(1) for x in (student, teacher)))
    unit = torch.finfo(torch.float32).eps * (1 + reach)
    assert ((got[0] - want[0]).abs() <= 4 * unit * (1 + want[0].abs())).all()
    assert ((got[1] - want[1]).norm(dim=1) <= 4 * unit * want[1].norm(dim=1)).all()


@few
@given(divergences, vocabularies, temperatures, seeds)
def test_permuting_the_vocabulary(
    backend: str, divergence: str, vocabulary: int, temperature: float, seed: int
) -> None:
    student, teacher = (normal(seed + i, 2, vocabulary, scale=2.0) for i in (0, 1))
    labels = torch.tensor([0, vocabulary - 1])
    order = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(seed))
    keywords: dict[str, Any] = {
        "divergence": divergence,
        "temperature": temperature,
        "soft_scale": "none",
        "label_smoothing": 0.1,
        "backend": backend,
    }
    value, gradient = rows_and_gradient(student, teacher, labels, **keywords)
    moved = rows_and_gradient(
        student[:, order], teacher[:, order], order.argsort()[labels], **keywords
    )
    torch.testing.assert_close(moved[0], value, rtol=4e-6, atol=4e-6)
    torch.testing.assert_close(moved[1], gradient[:, order], rtol=4e-6, atol=1e-6)


@few
@given(divergences, st.integers(1, 2100), st.integers(1, 2100), dtypes, seeds)
def test_padding_with_absent_entries_and_ignored_rows(
    fast: str, divergence: str, vocabulary: int, padding: int, dtype: torch.dtype, seed: int
) -> None:
    student, teacher = (normal(seed + i, 2, vocabulary, dtype=dtype) for i in (0, 1))
    labels = torch.tensor([0, vocabulary - 1])
    keywords: dict[str, Any] = {
        "divergence": divergence,
        "label_smoothing": 0.2,
        "backend": fast,
    }
    value, gradient = scalar_and_gradient(student, teacher, labels, **keywords)
    padded = [F.pad(x, (0, padding), value=-math.inf) for x in (student, teacher)]
    got = scalar_and_gradient(*padded, labels, **keywords)
    torch.testing.assert_close(got[0], value, rtol=4e-6, atol=1e-6)
    step = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(got[1][:, :vocabulary], gradient, rtol=step, atol=1e-7)
    assert torch.equal(got[1][:, vocabulary:], torch.zeros_like(got[1][:, vocabulary:]))
    tall = [F.pad(x, (0, 0, 1, 2), value=math.nan) for x in (student, teacher)]
    marked = F.pad(labels, (1, 2), value=-100)
    got = scalar_and_gradient(*tall, marked, **keywords)
    torch.testing.assert_close(got[0], value, rtol=1e-6, atol=0)
    assert torch.equal(got[1][1:3], gradient)


@few
@given(divergences, st.integers(2, 200), st.floats(1e3, 1e5), seeds)
def test_the_limit_of_a_large_temperature(
    divergence: str, vocabulary: int, temperature: float, seed: int
) -> None:
    # T²·KL → Σ(centred difference)²/(2V); a jsd is β(1-β) of it, and mse Σ difference²/V.
    assume(divergence != "tvd")
    student, teacher = (normal(seed + i, 3, vocabulary).double() for i in (0, 1))
    got = kd_loss(
        student,
        teacher,
        divergence=divergence,
        temperature=temperature,
        beta=0.3,
        reduction="none",
        **SOFT,
    )
    difference = student - teacher
    if divergence != "mse":
        difference = difference - difference.mean(1, keepdim=True)
    factor = {"forward_kl": 0.5, "reverse_kl": 0.5, "jsd": 0.5 * 0.3 * 0.7, "mse": 1.0}[divergence]
    want = factor * difference.square().sum(1) / vocabulary
    torch.testing.assert_close(got, want, rtol=30 / temperature, atol=1e-12 * temperature**2)


@few
@given(divergences, vocabularies, st.sampled_from([0.5, 2.0, 4.0, 8.0]), seeds)
def test_temperature_is_a_scaling(
    backend: str, divergence: str, vocabulary: int, temperature: float, seed: int
) -> None:
    # f(z, T) = T²·f(z/T, 1), bit for bit if T is a power of two.
    student, teacher = (normal(seed + i, 2, vocabulary, scale=2.0) for i in (0, 1))
    keywords: dict[str, Any] = {"divergence": divergence, "backend": backend, **SOFT}
    got = rows_and_gradient(student, teacher, temperature=temperature, **keywords)
    scaled = rows_and_gradient(student / temperature, teacher / temperature, **keywords)
    torch.testing.assert_close(got[0], temperature**2 * scaled[0], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(got[1], temperature * scaled[1], rtol=2e-6, atol=1e-8)


@few
@given(st.integers(2, 300), seeds)
def test_cross_entropy_is_entropy_plus_divergence(vocabulary: int, seed: int) -> None:
    student, teacher = (normal(seed + i, 3, vocabulary, scale=2.0).double() for i in (0, 1))
    q = teacher.softmax(1)
    entropy = -(q * q.log()).sum(1)
    want = F.cross_entropy(student, q, reduction="none") - entropy
    got = kd_loss(student, teacher, reduction="none", **SOFT)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


# a weight that float32 would take for 0 is refused
weights = st.just(0.0) | st.floats(2.0**-126, 3.0)


@few
@given(divergences, weights, weights, st.integers(1, 60), seeds)
def test_linear_in_the_weights(
    backend: str, divergence: str, hard: float, soft: float, vocabulary: int, seed: int
) -> None:
    student, teacher = (normal(seed + i, 4, vocabulary) for i in (0, 1))
    labels = torch.arange(4) % vocabulary
    keywords: dict[str, Any] = {"divergence": divergence, "temperature": 3.0, "backend": backend}

    def run(a: float, b: float) -> tuple[Tensor, Tensor]:
        return scalar_and_gradient(
            student, teacher, labels, hard_weight=a, soft_weight=b, **keywords
        )

    got, only_hard, only_soft = run(hard, soft), run(1, 0), run(0, 1)
    for x, h, s in zip(got, only_hard, only_soft, strict=True):
        torch.testing.assert_close(x, hard * h + soft * s, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(only_hard[0], F.cross_entropy(student, labels))


@few
@given(divergences, st.lists(st.integers(0, 12), min_size=1, max_size=5), dtypes, seeds)
def test_any_split_of_the_rows_equals_the_whole(
    fast: str, divergence: str, cuts: list[int], dtype: torch.dtype, seed: int
) -> None:
    rows, vocabulary = 12, 37
    student, teacher = (normal(seed + i, rows, vocabulary, dtype=dtype) for i in (0, 1))
    labels = torch.arange(rows) % vocabulary
    labels[seed % rows] = labels[(seed // 7) % rows] = -100
    kept = int((labels != -100).sum())
    keywords: dict[str, Any] = {"divergence": divergence, "backend": fast, "num_items": kept}
    whole = scalar_and_gradient(student, teacher, labels, **keywords)
    bounds = [0, *sorted(cuts), rows]
    pieces = [
        scalar_and_gradient(student[a:b], teacher[a:b], labels[a:b], **keywords)
        for a, b in itertools.pairwise(bounds)  # some are empty
    ]
    total = torch.stack([loss for loss, _ in pieces]).sum()
    torch.testing.assert_close(total, whole[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(torch.cat([gradient for _, gradient in pieces]), whole[1])
