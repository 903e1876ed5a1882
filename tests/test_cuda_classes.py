"""The CUDA kernels for a top-k teacher, run on the CPU as those of test_cuda_kernels.py.

Losses and gradients are compared with the float64 reference, entry by entry. The error of an entry
outside of the support is measured in units of its share of the tail, so that a tail of 1e-12 must
be as accurate as any other.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from support.backends import formula_of
from support.emulated_cuda import EmulatedCUDA
from support.logits import INF, NAN, identical, shifted
from torch import Tensor

from fused_kd import TopK, kd_loss
from fused_kd.backends import reference
from fused_kd.classes import NO_CLASS, Classes, classes_of
from fused_kd.divergences import TABLE
from fused_kd.options import Formula

#: So one worker builds the library, which all of these tests use; "cuda" is the emulated backend.
pytestmark = [
    pytest.mark.xdist_group("the emulated CUDA library"),
    pytest.mark.usefixtures("cuda"),
]

SINGLE, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
OF_CLASSES = [name for name, entry in TABLE.items() if not entry.of_logits]
EPS = 2.0**-23


class Rows(NamedTuple):
    """What a row kernel takes."""

    student: Tensor  # (1, N, V)
    teacher: Classes  # logits (1, N, K+1)
    labels: Tensor  # (N,)
    w_hard: Tensor | None  # (N,)
    w_soft: Tensor | None  # (N,)
    formula: Formula


def make(student: Tensor, topk: TopK, labels: Tensor | None = None, **keywords) -> Rows:
    """Return the rows of a student (N, V); weights 0.5 and 0.25 but for terms that are None."""
    count, vocabulary = student.shape
    labels = torch.randint(vocabulary, (count,)) if labels is None else labels
    weights = {"w_hard": torch.full((count,), 0.5), "w_soft": torch.full((count,), 0.25)}
    weights |= {name: keywords.pop(name) for name in weights if name in keywords}
    classes, _ = classes_of(topk, vocabulary, SINGLE)
    classes = classes._replace(logits=classes.logits[None])
    formula = formula_of(temperature=topk.temperature, beta=0.3, **keywords)
    return Rows(student[None], classes, labels, **weights, formula=formula)


def pair(vocabulary: int, dtype: torch.dtype, rows: int = 3) -> tuple[Tensor, Tensor]:
    """Return logits of a student and of a teacher that is like it, (N, V)."""
    student = 3 * torch.randn(rows, vocabulary)
    return student.to(dtype), student + torch.randn(rows, vocabulary)


def results(cuda: EmulatedCUDA, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Return hard, soft and gradient (1, N, V); assert that every kind of launch gives the same."""
    *losses, stats, gradient = cuda.forward_backward(*rows)
    over, later = rows.student.clone(), rows.student.clone()
    *again, _, _ = cuda.forward_backward(over, *rows[1:], inplace=True)
    cuda.backward(later, *rows[1:5], stats, rows.formula, inplace=True)
    got = (*cuda.forward(*rows)[:2], *again, over, later)
    want = (*losses, *losses, gradient, gradient)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    return *losses, gradient


def check(cuda: EmulatedCUDA, rows: Rows) -> None:
    """Assert that losses and gradient are within four units of float64's, entry by entry."""
    hard, soft, _, gradient = cuda.forward_backward(*rows)
    exact = rows._replace(student=rows.student.double())
    true_hard, true_soft, _, true_gradient = reference.forward_backward(*exact)
    s, t = exact.student[0], rows.teacher.logits[0].double()
    reach = 1 + finite_range(s) + finite_range(t)
    for got, want in ((hard, true_hard), (soft, true_soft)):
        assert_within(got, want, 4 * EPS * (reach + want.abs()))
    unit = torch.zeros_like(s)
    if rows.w_hard is not None:
        target = torch.nn.functional.one_hot(rows.labels, s.shape[1]).double()
        target += rows.formula.label_smoothing / s.shape[1]
        unit += rows.w_hard[:, None] * (s.softmax(1) * reach[:, None] + target)
    if rows.w_soft is not None:
        factor = rows.formula.soft_factor() / rows.formula.temperature
        unit += factor * rows.w_soft[:, None] * unit_of_soft(s, rows.teacher, rows.formula, reach)
    info = torch.finfo(gradient.dtype)
    allowed = 4 * EPS * unit + 0.51 * info.eps * true_gradient[0].abs() + info.smallest_normal
    assert_within(gradient[0], true_gradient[0], allowed)


def finite_range(x: Tensor) -> Tensor:
    """Return the largest minus the smallest finite number of each row (N,), 0 without any."""
    finite = x.isfinite()
    low, high = x.where(finite, INF).amin(1), x.where(finite, -INF).amax(1)
    return (high - low).clamp(min=0).nan_to_num(0.0, 0.0, 0.0)


def unit_of_soft(s: Tensor, classes: Classes, formula: Formula, reach: Tensor) -> Tensor:
    """Return the unit of each entry's soft gradient (N, V), in double, without its weight.

    It is reach·(p + q)·(1 + |log(p/q)|) of the entry's class, times the entry's share of it. A sign
    of p - q that no float32 arithmetic determines counts as an error.
    """
    vocabulary, ids, t = s.shape[1], classes.token_ids, classes.logits[0].double()
    at = torch.where(ids >= 0, ids, vocabulary).long()
    z = torch.nn.functional.pad(s / formula.temperature, (0, 1), value=-INF)
    outside = z.scatter(1, at, -INF)
    tail = torch.where(t[:, -1:] == NO_CLASS, -INF, outside.logsumexp(1, keepdim=True))
    log_p = torch.cat([z.gather(1, at), tail], 1).log_softmax(1)
    log_q = (t.where(t != NO_CLASS, -INF) / formula.temperature).log_softmax(1)
    p, ratio = log_p.exp(), (log_p - log_q).abs().nan_to_num(0.0, 0.0, 0.0)
    unit = reach[:, None] * (p + log_q.exp()) * (1 + ratio)
    if TABLE[formula.divergence].has_sign:
        unclear = (ratio <= 8 * EPS * reach[:, None]).double()
        unit = unit + p * (unclear + (p * unclear).sum(1, keepdim=True)) / EPS
    share = outside.softmax(1).nan_to_num(0.0)
    return (unit[:, -1:] * share).scatter(1, at, unit[:, :-1])[:, :vocabulary].nan_to_num(0.0)


def assert_within(got: Tensor, want: Tensor, allowed: Tensor) -> None:
    """Assert that numbers differ by at most `allowed`, and that the others are the same."""
    finite = want.isfinite()
    torch.testing.assert_close(
        got.double().where(~finite, 0.0), want.where(~finite, 0.0), rtol=0, atol=0, equal_nan=True
    )
    error = (got.double() - want).where(finite, 0.0).abs()
    worst = (error / allowed.where(finite, 1.0)).max()
    assert worst <= 1, f"{worst:.3g} times what is allowed, at {error.argmax()}"


def tails_of(divergence: str) -> list[str]:
    """Return the tails that a divergence takes, but for "sampled", which is "zero" to a kernel."""
    return ["bucket", "renormalize"] + ["zero"] * (not TABLE[divergence].needs_mass)


# one partial group, whole groups in one block, several blocks and a ragged end
SIZES = [(7, 0), (7, 1), (7, 7), (504, 5), (1203, 0), (1203, 5), (1203, 1203)]


@pytest.mark.parametrize("divergence", OF_CLASSES)
def test_every_tail(cuda: EmulatedCUDA, divergence: str) -> None:
    for turn, (vocabulary, k) in enumerate(SIZES):
        student, teacher = pair(vocabulary, [SINGLE, BRAIN, HALF][turn % 3])
        topk = TopK.from_logits(teacher, k, 2.0)
        labels = torch.randint(vocabulary, (3,))
        labels[: min(k, 1)] = topk.token_ids[0, -1:]
        for tail in tails_of(divergence) if k else ["bucket"]:
            keywords = {"divergence": divergence, "label_smoothing": 0.1}
            rows = make(student, topk._replace(tail=tail), labels, **keywords)
            check(cuda, rows)
            results(cuda, rows)


# the hard term's exponential is the soft one's, its square, a separate one
@pytest.mark.parametrize("divergence", OF_CLASSES)
def test_temperatures_and_terms(cuda: EmulatedCUDA, divergence: str) -> None:
    for temperature in (1.0, 2.0, 3.7):
        student, teacher = pair(1203, BRAIN)
        topk = TopK.from_logits(teacher, 5, temperature)
        labels = topk.token_ids[:, 1].clone()
        labels[1] = 7
        for terms in ({}, {"w_hard": None}, {"w_soft": None}):
            for smoothing in (0.0, 0.2):
                keywords = {"divergence": divergence, "label_smoothing": smoothing, **terms}
                check(cuda, make(student, topk, labels, **keywords))


# more classes than threads; slices of two chunks; a row that no cluster can hold
@pytest.mark.parametrize(("vocabulary", "k"), [(40_000, 300), (270_001, 5)])
def test_long_rows(cuda: EmulatedCUDA, vocabulary: int, k: int) -> None:
    student, teacher = pair(vocabulary, BRAIN, rows=2)
    rows = make(student, TopK.from_logits(teacher, k, 2.0), divergence="jsd")
    check(cuda, rows)
    assert (cuda.workspace(*rows) == 0) == (cuda.capability == 90 and vocabulary == 40_000)


def test_all_tokens_are_a_dense_teacher(cuda: EmulatedCUDA) -> None:
    student, teacher = pair(1203, SINGLE)
    rows = make(student, TopK.from_logits(teacher, 1203, 2.0), label_smoothing=0.1)
    *got, _, gradient = cuda.forward_backward(*rows)
    *want, _, dense = cuda.forward_backward(*rows._replace(teacher=teacher[None]))
    torch.testing.assert_close((*got, gradient), (*want, dense), rtol=1e-5, atol=1e-7)


def in_support(vocabulary: int) -> Tensor:
    """Return a mask (V,) of 37 entries in all blocks of a row."""
    mask = torch.zeros(vocabulary, dtype=torch.bool)
    mask[torch.randperm(vocabulary)[:37]] = True
    return mask


def topk_of(teacher: Tensor, mask: Tensor, temperature: float, tail: str = "bucket") -> TopK:
    """Return a teacher (N, V), float64, with the support of a mask (V,), in random order."""
    logprobs = (teacher / temperature).log_softmax(-1)
    ids = mask.nonzero().squeeze(1)
    ids = ids[torch.randperm(len(ids))].expand(len(teacher), -1)
    outside = logprobs.masked_fill(mask, -INF).logsumexp(-1)
    return TopK(ids, logprobs.gather(1, ids).float(), outside, tail, temperature)


def with_tail(x: Tensor, mask: Tensor, mass: float, temperature: float) -> Tensor:
    """Return logits (V,) whose mass outside of a mask is `mass`, or 1 + mass if it is negative."""
    log_odds = math.copysign(1.0, mass) * (math.log(abs(mass)) - math.log1p(-abs(mass)))
    inside, outside = ((x[m] / temperature).logsumexp(0) for m in (mask, ~mask))
    return torch.where(mask, x, x + temperature * (inside - outside + log_odds))


MASSES = [1e-12, 1e-6, 0.3, -1e-6, -1e-12]


@pytest.mark.parametrize("divergence", OF_CLASSES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_tails_of_any_mass(cuda: EmulatedCUDA, divergence: str, temperature: float) -> None:
    # Every pair of masses, of a student at an offset of 0 and 1e4
    mask = in_support(1203)
    sides = [
        [with_tail(2 * torch.randn(1203).double(), mask, m, temperature) for m in masses]
        for masses in zip(*((a, b) for a in MASSES for b in MASSES), strict=True)
    ]
    student, teacher = (torch.stack(side) for side in sides)
    for offset in (0.0, 1e4):
        topk = topk_of(teacher, mask, temperature)
        check(cuda, make((student + offset).float(), topk, divergence=divergence))


# far below or above the tail: sums that one reference for both cannot hold
@pytest.mark.parametrize("divergence", OF_CLASSES)
def test_a_support_that_underflows(cuda: EmulatedCUDA, divergence: str) -> None:
    mask = in_support(1203)
    shifts = torch.tensor([-1e4, -300.0, -40.0, 40.0, 300.0, 1e4])
    student, teacher = pair(1203, SINGLE, rows=6)
    student = student + shifts[:, None] * mask
    labels = torch.where(torch.arange(6) % 2 == 0, mask.nonzero()[0], (~mask).nonzero()[0])
    for tail in tails_of(divergence):
        topk = topk_of(teacher.double(), mask, 1.0, tail)
        check(cuda, make(student, topk, labels, divergence=divergence, label_smoothing=0.1))
        *_, gradient = cuda.forward_backward(*make(student, topk, labels, divergence=divergence))
        assert gradient.isfinite().all()


@pytest.mark.parametrize("divergence", OF_CLASSES)
def test_logits_that_are_not_finite(cuda: EmulatedCUDA, divergence: str) -> None:
    # One logit or all of them, inside or outside of the support; a label inside or outside.
    mask = in_support(1203)
    one, other = torch.zeros_like(mask), torch.zeros_like(mask)
    one[mask.nonzero()[5]] = other[(~mask).nonzero()[700]] = True
    places = [one, other, one | other, mask, ~mask, torch.ones_like(mask)]
    values = [(-INF, place) for place in places] + [(x, p) for x in (NAN, INF) for p in places[:2]]
    student, teacher = pair(1203, SINGLE, rows=2 * len(values))
    for n, (value, place) in enumerate(values * 2):
        student[n, place] = value
    labels = torch.tensor([int(mask.nonzero()[0]), int((~mask).nonzero()[0])])
    labels = labels.repeat_interleave(len(values))
    for turn, tail in enumerate(tails_of(divergence)):
        topk = topk_of(teacher.double(), mask, 2.0, tail)
        keywords = {"divergence": divergence, "label_smoothing": [0.1, 0.0, 0.2][turn]}
        check(cuda, make(student, topk, labels, **keywords))


def test_rows_without_entries_and_absent_ones(cuda: EmulatedCUDA) -> None:
    # Row 0 has none: a soft term and gradient of exactly 0. Row 1 has two of five.
    for divergence in OF_CLASSES:
        student, teacher = pair(1203, SINGLE)
        topk = TopK.from_logits(teacher, 5, 2.0)
        topk.logprobs[0] = topk.logprobs[1, [0, 2, 4]] = -INF
        topk.token_ids[0], topk.token_ids[1, 2] = 2**40, -7
        topk.tail_logprob[1] = (1 - topk.logprobs[1].exp().sum()).log()
        rows = make(student, topk, w_hard=None, divergence=divergence)
        check(cuda, rows)
        _, soft, _, gradient = cuda.forward_backward(*rows)
        assert soft[0] == 0
        assert not gradient[0, 0].any()


@pytest.mark.parametrize("dtype", [SINGLE, BRAIN])
def test_ids_outside_the_vocabulary_are_absent(cuda: EmulatedCUDA, dtype: torch.dtype) -> None:
    # Nothing is read or written there: between rows there is NaN, which stays.
    student, teacher = pair(1203, dtype)
    good = make(student, TopK.from_logits(teacher, 5, 2.0), label_smoothing=0.1)
    bad, ids = Classes(*(x.clone() for x in good.teacher)), good.teacher.token_ids
    ids[:, 3:] = -1
    bad.token_ids[:, 3], bad.token_ids[:, 4] = torch.tensor([1203, 2**31 - 1, -2]), -(2**31)
    want = cuda.forward_backward(*good)
    memory = torch.full((1, 3, 1203 + 80), NAN, dtype=dtype)
    place = memory[..., 40:-40].copy_(student)
    rows = good._replace(student=place, teacher=bad)
    identical(cuda.forward_backward(*rows), want)
    cuda.forward_backward(*rows, inplace=True)
    assert torch.equal(place, want[3])
    place.copy_(student)
    assert torch.equal(cuda.backward(*rows[:5], want[2], rows.formula, inplace=True), want[3])
    assert memory[..., :40].isnan().all()
    assert memory[..., -40:].isnan().all()


def test_rows_that_are_not_valid(cuda: EmulatedCUDA) -> None:
    # As made on a GPU: logits of NaN, an id twice. The soft term is NaN, in this row alone.
    student, teacher = pair(1203, SINGLE)
    rows = make(student, TopK.from_logits(teacher, 5, 2.0))
    hard, soft, _ = results(cuda, rows)
    rows.teacher.logits[0, 1], rows.teacher.token_ids[1, 1:] = NAN, rows.teacher.token_ids[1, 0]
    got_hard, got_soft, gradient = results(cuda, rows)
    torch.testing.assert_close(got_hard, hard)
    soft[1] = NAN
    torch.testing.assert_close(got_soft, soft, rtol=0, atol=0, equal_nan=True)
    nan = gradient[0].isnan()
    assert torch.equal(nan.all(1), soft.isnan())
    assert torch.equal(nan.any(1), soft.isnan())


# whole groups are copied in bulk
@pytest.mark.parametrize("vocabulary", [1203, 1200])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_terms_that_are_off_for_a_row_are_not_read(
    cuda: EmulatedCUDA, vocabulary: int, smoothing: float
) -> None:
    # Rows: both terms, hard alone (a NaN teacher), soft alone, neither (NaN everywhere).
    weights = {"w_hard": torch.tensor([0.5, 0.5, 0, 0]), "w_soft": torch.tensor([0.5, 0, 0.5, 0])}
    for divergence in OF_CLASSES:
        student, teacher = pair(vocabulary, SINGLE, rows=4)
        topk = TopK.from_logits(teacher, 5, 2.0)
        student[1, topk.token_ids[1, 2]] = student[1, 6] = -INF  # the first is present
        keywords = {"divergence": divergence, "label_smoothing": smoothing, **weights}
        rows = make(student, topk, torch.tensor([1, 2, 3, 4]), **keywords)
        check(cuda, rows)
        want = results(cuda, rows)
        rows.teacher.logits[0, [1, 3]], rows.student[0, 3], rows.labels[3] = NAN, NAN, -100
        torch.testing.assert_close(results(cuda, rows), want, rtol=0, atol=0)


def test_bits_depend_on_the_row_alone(cuda: EmulatedCUDA) -> None:
    # Not on the batch, whose rows share the records in memory and may be off, nor on the order in
    # which threads and blocks run.
    student, teacher = pair(1203, SINGLE, rows=13)
    topk = TopK.from_logits(teacher, 40, 2.0)
    w = torch.tensor([0.5, 0.0, 0.25, 0.0, 0.0, 1.0, 0.5, 0.5, 0.0, 0.5, 0.5, 0.0, 0.5])
    for divergence in ("forward_kl", "jsd"):
        rows = make(student, topk, w_hard=w, w_soft=w, divergence=divergence)
        want = cuda.forward_backward(*rows)
        for seed in range(3):
            cuda.seed(seed)
            identical(cuda.forward_backward(*rows), want)
        for n in range(13):
            row = slice(n, n + 1)
            classes = Classes(rows.teacher.logits[:, row], rows.teacher.token_ids[row])
            alone = rows.student[:, row], classes, rows.labels[row], w[row], w[row], rows.formula
            got = cuda.forward_backward(*alone)
            identical((*got[:3], got[3][0]), (*(x[row] for x in want[:3]), want[3][0, row]))


@pytest.mark.parametrize("dtype", [SINGLE, BRAIN])
@pytest.mark.parametrize("vocabulary", [520, 1203])
def test_any_alignment(cuda: EmulatedCUDA, vocabulary: int, dtype: torch.dtype) -> None:
    student, teacher = pair(vocabulary, dtype)
    rows = make(student, TopK.from_logits(teacher, 40, 2.0))
    want = cuda.forward_backward(*rows)
    for offset in range(9):
        place = shifted(rows.student, offset)
        moved = rows._replace(student=place)
        identical(cuda.forward_backward(*moved), want)
        cuda.forward_backward(*moved, inplace=True)
        assert torch.equal(place, want[3]), offset


def test_gradients_of_other_memory_and_other_scales(cuda: EmulatedCUDA) -> None:
    student, teacher = pair(1203, SINGLE, rows=9)
    w = torch.tensor([0.5, 0.0, 0.25] * 3)
    for dtype in (SINGLE, BRAIN, HALF):
        rows = make(student.to(dtype), TopK.from_logits(teacher, 40, 2.0), w_hard=w, w_soft=w)
        *_, stats, gradient = cuda.forward_backward(*rows)
        exact = reference.forward_backward(rows.student.double(), *rows[1:])[3]
        for scale in (2.0, 0.3, 0.0):
            scaled = gradient.clone()
            cuda.rescale(scaled, torch.tensor(scale), *rows[:5], stats, rows.formula)
            half_unit = 0.51 * torch.finfo(dtype).eps
            torch.testing.assert_close(scaled.double(), scale * exact, rtol=half_unit, atol=1e-6)
        if dtype == SINGLE:  # a 16-bit gradient, in rows of another stride; nothing else is written
            memory = torch.full((1, 9, 1203 + 3), 7.0, dtype=BRAIN)
            cuda.forward_backward(*rows, out=memory[..., :1203])
            assert torch.equal(memory[..., :1203], gradient.to(BRAIN))
            assert (memory[..., 1203:] == 7).all()


def test_through_the_public_function() -> None:
    student, teacher = pair(1203, BRAIN, rows=4)
    topk, labels = TopK.from_logits(teacher, 5), torch.tensor([1, -100, 3, 4])
    want_leaf, leaf = (student.to(x).requires_grad_() for x in (torch.float64, BRAIN))
    want = kd_loss(want_leaf, topk, labels, temperature=1.0, backend="reference")
    logits = leaf * 1.0
    loss = kd_loss(logits, topk, labels, temperature=1.0, backend="cuda", inplace=True)
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    (exact,) = torch.autograd.grad(want, want_leaf)
    (gradient,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(gradient.double(), exact, rtol=2.0**-8, atol=1e-7)
