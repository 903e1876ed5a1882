"""Heads against the float64 reference on whole logits: values, reductions, rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.heads import Heads, distance, make_heads, near, ours, truth
from support.logits import DTYPES, identical

from fused_kd import Head, KDLoss, kd_loss

# one term off; smoothing; weights; reductions
CASES: list[dict[str, Any]] = [
    {},
    {"hard_weight": 0.0},
    {"soft_weight": 0.0, "label_smoothing": 0.1},
    {"hard_weight": 0.0, "soft_weight": 0.0},
    {"reduction": "sum", "soft_scale": "none", "temperature": 3.0},
    {"reduction": "mean", "num_items": 11},
    {"reduction": "mean", "num_items": torch.tensor(0.0)},
    {"token_weight": torch.arange(37) % 3},
    {"token_weight": torch.arange(37) % 3, "reduction": "none"},
    {"reduction": "none", "label_smoothing": 0.2},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("ignored", [0, 3, 37])
def test_same_as_logits(case: dict[str, Any], ignored: int) -> None:
    heads = make_heads(dtype=torch.float64)
    heads.labels[:ignored] = -100
    got, want = ours(heads, chunk_rows=5, **case), truth(heads, **case)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_do_not_depend_on_the_height_of_a_chunk(dtype: torch.dtype) -> None:
    heads = make_heads(dtype=dtype)
    whole = ours(heads, reduction="none", chunk_rows=37)
    for height in (1, 2, 5, 16, 36, 100):
        got = ours(heads, reduction="none", chunk_rows=height)
        assert torch.equal(got.loss, whole.loss)
        assert torch.equal(got.hidden, whole.hidden)
        # sums over the rows in another order: a bound without the number of chunks
        for mine, theirs in ((got.weight, whole.weight), (got.bias, whole.bias)):
            assert distance(mine, theirs) <= 2 * torch.finfo(dtype).eps


def test_the_weight_gradient_is_as_exact_in_many_chunks() -> None:
    heads = make_heads(rows=512, dtype=torch.bfloat16)
    exact = truth(heads).weight
    in_one, in_many = (distance(ours(heads, chunk_rows=c).weight, exact) for c in (512, 2))
    assert in_many <= 1.01 * in_one
    rounded = ours(heads, chunk_rows=2, grad_accum_dtype=torch.bfloat16)
    assert distance(rounded.weight, exact) > 3 * in_one  # what float32 is there to avoid


@pytest.mark.parametrize("chunk_rows", [None, 7])
@pytest.mark.parametrize("accumulate", [torch.float32, torch.bfloat16])
def test_a_bias_wider_than_its_head_keeps_its_digits(
    accumulate: torch.dtype, chunk_rows: int | None
) -> None:
    # In one chunk too, whose weight gradient is accumulated in 16 bits.
    narrow = make_heads(dtype=torch.bfloat16)
    for bias_dtype in (torch.float32, torch.float64):  # of which the sums are float32
        heads = narrow._replace(bias=narrow.bias.detach().to(bias_dtype).requires_grad_())
        upstream = torch.tensor(3.0)
        got = ours(heads, upstream, chunk_rows=chunk_rows, grad_accum_dtype=accumulate)
        assert got.bias.dtype == bias_dtype
        assert distance(got.bias, truth(heads, upstream).bias) < 1e-6


def test_no_teacher_where_only_labels_are_learned_from(backend: str) -> None:
    heads = make_heads()
    masked = heads._replace(bias=heads.bias.detach().clone())
    masked.bias[5] = -torch.inf  # no label of make_heads is 5
    masked = masked._replace(
        bias=masked.bias.requires_grad_(), labels=torch.where(heads.labels == 5, 6, heads.labels)
    )
    options: dict[str, Any] = {"soft_weight": 0, "label_smoothing": 0.1, "backend": backend}
    with_teacher = ours(masked, **options)
    loss = kd_loss(masked.student_side, None, masked.labels, **options)
    assert torch.equal(loss, with_teacher.loss)
    double = masked._replace(teacher_hidden=masked.teacher_hidden.double())
    double = double._replace(teacher_weight=masked.teacher_weight.double())
    for got, expected in zip(ours(double, **options), with_teacher, strict=True):
        # the teacher has no influence on dtypes
        assert got.dtype == torch.float32
        assert torch.equal(got, expected)
    rest = [i for i in range(131) if i != 5]
    logits = F.linear(*masked.student)[:, rest]
    labels = torch.where(masked.labels > 5, masked.labels - 1, masked.labels)
    want = 0.5 * F.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(with_teacher.loss, want.detach())
    gradients = torch.autograd.grad(want, masked.student)
    torch.testing.assert_close(with_teacher[1:], gradients, rtol=1e-5, atol=1e-6)


def test_logits_of_a_teacher_instead_of_a_head() -> None:
    heads = make_heads()
    logits = F.linear(*heads.teacher)
    for dtype in DTYPES:
        cast = logits.to(dtype)
        padded = F.pad(cast, (0, 3))[:, :-3]  # rows that are not contiguous
        for teacher in (cast, padded, cast.t().contiguous().t()):
            for ignored in (False, True):
                labels = heads.labels.clone()
                labels[::2] = -100 if ignored else 0
                student = Head(heads.hidden, heads.weight)
                got = kd_loss(student, teacher, labels, chunk_rows=9)
                want = kd_loss(F.linear(heads.hidden, heads.weight), cast, labels)
                torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtypes", [(32, 64), (64, 32), (16, 32), (32, 16)])
def test_each_model_has_its_own_dtype(dtypes: tuple[int, int]) -> None:
    kinds = {16: torch.bfloat16, 32: torch.float32, 64: torch.float64}
    heads = make_heads(dtype=kinds[dtypes[0]])
    teachers = make_heads(dtype=kinds[dtypes[1]])
    heads = heads._replace(
        teacher_hidden=teachers.teacher_hidden, teacher_weight=teachers.teacher_weight
    )
    got, want = ours(heads), truth(heads)
    assert got.loss.dtype == (torch.float64 if 64 in dtypes else torch.float32)
    eps = torch.finfo(kinds[dtypes[0]]).eps
    near(got, want, 1e-6 + eps)
    teacher_logits = F.linear(*(x.double() for x in heads.teacher))
    loss = kd_loss(heads.student_side, teacher_logits, heads.labels)
    assert distance(loss.detach(), want.loss) < 1e-6


def test_a_teacher_that_no_term_reads_is_not_multiplied() -> None:
    heads = make_heads()
    want = ours(heads, soft_weight=0.0)
    broken = heads._replace(teacher_hidden=torch.full_like(heads.teacher_hidden, torch.nan))
    for height in (7, 100):
        got = ours(broken, soft_weight=0.0, chunk_rows=height)
        assert torch.equal(got.loss, want.loss)
        torch.testing.assert_close(tuple(got), tuple(want))
    # label smoothing counts the entries that are absent on both sides
    assert ours(broken, soft_weight=0.0, label_smoothing=0.1).loss.isfinite()


@pytest.mark.parametrize("shape", [(), (4,), (2, 5), (2, 3, 4)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    rows = max(1, torch.Size(shape).numel())
    heads = make_heads(rows=rows)
    want = ours(heads, reduction="none")
    hidden = heads.hidden.detach().view(*shape, -1).requires_grad_()
    student = Head(hidden, heads.weight, heads.bias)
    teacher = Head(heads.teacher_hidden.view(*shape, -1), heads.teacher_weight)
    loss = kd_loss(student, teacher, heads.labels.view(shape), reduction="none", chunk_rows=3)
    assert loss.shape == shape
    assert torch.equal(loss.flatten(), want.loss)
    loss.sum().backward()
    assert torch.equal(hidden.grad.view(rows, -1), want.hidden)


def test_rows_that_lie_apart_are_not_copied_together() -> None:
    heads = make_heads(rows=24)
    hidden = heads.hidden.detach().view(4, 6, -1)[:, :-1].requires_grad_()
    teacher = heads.teacher_hidden.view(4, 6, -1)[:, :-1]
    labels = heads.labels.view(4, 6)[:, :-1]
    logits = F.linear(heads.teacher_hidden, heads.teacher_weight).view(4, 6, -1)[:, :-1]
    student = Head(hidden.contiguous(), heads.weight)
    want = kd_loss(student, Head(teacher.contiguous(), heads.teacher_weight), labels)
    (expected,) = torch.autograd.grad(want, hidden)
    for side in (Head(teacher, heads.teacher_weight), logits):
        got = kd_loss(Head(hidden, heads.weight), side, labels, chunk_rows=7)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, hidden)[0], expected)


def test_rows_at_an_offset_of_2_to_the_31() -> None:
    # Address space only: two rows of each model are touched.
    heads = make_heads(rows=2, dtype=torch.bfloat16)
    want = ours(heads)

    def far(x: torch.Tensor) -> torch.Tensor:
        memory = torch.empty(2**31 + 4096, dtype=x.dtype)
        view = memory.as_strided(x.shape, (2**31, 1)).copy_(x.detach())
        return view.requires_grad_(x.requires_grad)

    placed = heads._replace(hidden=far(heads.hidden), teacher_hidden=far(heads.teacher_hidden))
    loss = kd_loss(placed.student_side, placed.teacher_side, heads.labels)
    assert torch.equal(loss.detach(), want.loss)
    student = (placed.hidden, heads.weight)
    identical(torch.autograd.grad(loss, student), want[1:3])


def test_any_strides() -> None:
    heads = make_heads()
    want = ours(heads, chunk_rows=10)

    def spread(x: torch.Tensor) -> torch.Tensor:
        """Return a copy whose last stride is 2."""
        return x.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_(x.requires_grad)

    def transposed(x: torch.Tensor) -> torch.Tensor:
        return x.detach().t().contiguous().t().requires_grad_(x.requires_grad)

    for lay in (spread, transposed):
        got = ours(Heads(*(lay(x) if x.dim() == 2 else x for x in heads)), chunk_rows=10)
        identical(got, want)
    got = ours(heads._replace(bias=spread(heads.bias)), chunk_rows=10)
    assert torch.equal(got.weight, want.weight)


def test_ignored_rows_are_not_looked_at() -> None:
    heads = make_heads()
    heads.labels[[0, 5, 36]] = -100
    clean = ours(heads, chunk_rows=8)
    with torch.no_grad():
        heads.hidden[[0, 5, 36]] = torch.nan
        heads.teacher_hidden[[0, 5, 36]] = torch.inf
    got = ours(heads, chunk_rows=8)
    identical(got, clean)
    assert not got.hidden[[0, 5, 36]].any()


def test_a_row_that_is_not_a_number_spoils_no_other_loss() -> None:
    heads = make_heads()
    clean = ours(heads, reduction="none")
    with torch.no_grad():
        heads.hidden[3, 0] = torch.nan
    got = ours(heads, reduction="none", chunk_rows=8)
    others = torch.arange(37) != 3
    assert got.loss[3].isnan()
    assert torch.equal(got.loss[others], clean.loss[others])
    assert torch.equal(got.hidden[others], clean.hidden[others])


def test_a_vocabulary_padded_with_minus_infinity_changes_nothing() -> None:
    heads = make_heads()
    clean = ours(heads, label_smoothing=0.1)
    padding = torch.full((9,), -torch.inf)
    bias = torch.cat([heads.bias.detach(), padding]).requires_grad_()
    teacher_weight = F.pad(heads.teacher_weight, (0, 0, 0, 9))
    teacher_bias = torch.cat([torch.zeros(131), padding])
    got = kd_loss(
        Head(heads.hidden, F.pad(heads.weight, (0, 0, 0, 9)), bias),
        Head(heads.teacher_hidden, teacher_weight, teacher_bias),
        heads.labels,
        label_smoothing=0.1,
    )
    torch.testing.assert_close(got, clean.loss)
    (grad,) = torch.autograd.grad(got, bias)
    torch.testing.assert_close(grad, F.pad(clean.bias, (0, 9)), rtol=1e-5, atol=1e-7)


def test_a_skewed_mask_in_chunks_of_any_height(backend: str) -> None:
    # A mean over the chunks differs from a mean over the tokens.
    plain = make_heads(rows=11)
    for first, last in ((2, 5), (0, 1), (3, 11)):  # all kept tokens follow each other
        labels = torch.full((11,), -100)
        labels[first:last] = plain.labels[first:last]
        heads = plain._replace(labels=labels)
        for options in ({}, {"token_weight": torch.rand(11) + 0.1}, {"num_items": 7}):
            want = truth(heads, temperature=2.0, **options)
            for height in range(1, 12):
                got = ours(heads, temperature=2.0, chunk_rows=height, backend=backend, **options)
                torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6, check_dtype=False)


def test_parts() -> None:
    heads = make_heads()
    options = {"hard_weight": 0.25, "soft_weight": 2.0, "temperature": 2.0, "return_parts": True}
    got = KDLoss(**options)(heads.student_side, heads.teacher_side, heads.labels)
    logits = F.linear(*heads.student), F.linear(*heads.teacher)
    torch.testing.assert_close(tuple(got), tuple(kd_loss(*logits, heads.labels, **options)))
    assert not got.hard.requires_grad
    assert not got.soft.requires_grad
