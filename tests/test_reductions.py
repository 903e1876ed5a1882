"""Ignored rows, token weights, num_items, reductions and parts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.logits import DTYPES, N, V, check, make

from fused_kd import kd_loss
from fused_kd.divergences import DIVERGENCES
from fused_kd.testing import eager_kd_loss


def test_no_labels(backend: str) -> None:
    student, teacher, _ = make(2, 3)
    got = kd_loss(student, teacher, hard_weight=0, soft_weight=1, backend=backend)
    want = eager_kd_loss(student, teacher, hard_weight=0, soft_weight=1)
    check(got, want, student)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("ignore_index", [-100, 0, 7])
def test_ignored_rows_count_in_neither_term_R_36(
    backend: str, divergence: str, ignore_index: int
) -> None:
    student, teacher, labels = make()
    labels[0] = labels[3] = ignore_index
    kept = labels != ignore_index
    got = kd_loss(
        student, teacher, labels, divergence=divergence, ignore_index=ignore_index, backend=backend
    )
    want = eager_kd_loss(student[kept], teacher[kept], labels[kept], divergence=divergence)
    check(got, want, student)


def test_label_zero_counts_R_45(backend: str) -> None:
    student, teacher, _ = make()
    labels = torch.zeros(N, dtype=torch.int64)
    check(
        kd_loss(student, teacher, labels, backend=backend),
        eager_kd_loss(student, teacher, labels, ignore_index=-1),
        student,
    )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_kept_row_is_zero_with_a_graph_R_32_R_33(
    backend: str, reduction: str, weighted: bool
) -> None:
    student, teacher, _ = make()
    labels = torch.full((N,), -100)
    weight = torch.rand(N) if weighted else None
    parts = kd_loss(
        student,
        teacher,
        labels,
        token_weight=weight,
        reduction=reduction,
        return_parts=True,
        backend=backend,
    )
    for part in parts:
        assert torch.equal(part, torch.zeros_like(part))
    (gradient,) = torch.autograd.grad(parts.loss.sum(), student)
    assert torch.equal(gradient, torch.zeros(N, V))


@pytest.mark.parametrize("zero", ["weights", "num_items"])
def test_a_zero_denominator_that_is_a_tensor_gives_zero_R_40(backend: str, zero: str) -> None:
    student, teacher, labels = make()
    keywords: dict[str, Any] = (
        {"token_weight": torch.zeros(N)} if zero == "weights" else {"num_items": torch.tensor(0)}
    )
    loss = kd_loss(student, teacher, labels, backend=backend, **keywords)
    assert loss.item() == 0
    (gradient,) = torch.autograd.grad(loss, student)
    assert torch.equal(gradient, torch.zeros(N, V))


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16, torch.int64, bool])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_token_weight(backend: str, reduction: str, kind: torch.dtype) -> None:
    student, teacher, labels = make()
    labels[1] = -100
    weight = torch.tensor([0.0, 1.0, 2.0, 3.0, 1.0, 0.0]).to(torch.bool if kind is bool else kind)
    got = kd_loss(
        student, teacher, labels, token_weight=weight, reduction=reduction, backend=backend
    )
    rows = eager_kd_loss(student, teacher, labels, reduction="none")
    w = torch.where(labels != -100, weight.float(), 0.0)
    want = {"mean": (w * rows).sum() / w.sum(), "sum": (w * rows).sum(), "none": w * rows}
    check(got, want[reduction], student)


@pytest.mark.parametrize("hard_weight", [1.0, 0.3])  # 1: the weights reach the kernel as given
@pytest.mark.parametrize("leading", [(2, 3), (6,)])
def test_token_weight_is_taken_in_any_layout(
    backend: str, leading: tuple[int, ...], hard_weight: float
) -> None:
    student, teacher, labels = make(*leading)
    weight = torch.rand(3, 2).t() if len(leading) == 2 else torch.rand(6, 2)[:, 0]
    for reduction in ("mean", "sum", "none"):
        keywords: dict[str, Any] = {
            "token_weight": weight,
            "reduction": reduction,
            "hard_weight": hard_weight,
        }
        got = kd_loss(student, teacher, labels, backend=backend, **keywords)
        check(got, eager_kd_loss(student, teacher, labels, **keywords), student)


@pytest.mark.parametrize("num_items", [4, 2.5, torch.tensor(4), torch.tensor(2.5)], ids=str)
def test_num_items_is_the_denominator(backend: str, num_items: Any) -> None:
    student, teacher, labels = make()
    got = kd_loss(student, teacher, labels, num_items=num_items, backend=backend)
    want = eager_kd_loss(student, teacher, labels, reduction="sum") / float(num_items)
    check(got, want, student)


@pytest.mark.parametrize("kind", [int, torch.tensor])
def test_any_split_with_num_items_equals_the_whole_R_40(backend: str, kind: Any) -> None:
    student, teacher, labels = make()
    labels[0] = labels[4] = -100
    kept = kind(4)
    for split in (1, 2, 5):
        whole = kd_loss(student, teacher, labels, backend=backend)
        pieces = [
            kd_loss(student[part], teacher[part], labels[part], num_items=kept, backend=backend)
            for part in (slice(None, split), slice(split, None))
        ]
        check(sum(pieces), whole, student)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_parts(backend: str, reduction: str) -> None:
    student, teacher, labels = make()
    labels[2] = -100
    keywords: dict[str, Any] = {"reduction": reduction, "temperature": 2.0}
    weights: dict[str, Any] = {"hard_weight": 0.3, "soft_weight": 0.6}
    parts = kd_loss(
        student, teacher, labels, return_parts=True, backend=backend, **keywords, **weights
    )
    check(parts.loss, eager_kd_loss(student, teacher, labels, **keywords, **weights), student)
    hard = eager_kd_loss(student, teacher, labels, hard_weight=1, soft_weight=0, **keywords)
    soft = eager_kd_loss(student, teacher, labels, hard_weight=0, soft_weight=1, **keywords)
    torch.testing.assert_close(parts.hard, hard.detach())
    torch.testing.assert_close(parts.soft, soft.detach())


@pytest.mark.parametrize("off", ["hard_weight", "soft_weight"])
def test_a_term_of_weight_zero_is_not_computed_and_reported_as_zero(backend: str, off: str) -> None:
    student, teacher, labels = make()
    if off == "soft_weight":
        teacher = torch.full_like(teacher, torch.nan)
    parts = kd_loss(student, teacher, labels, return_parts=True, backend=backend, **{off: 0.0})
    assert (parts.hard if off == "hard_weight" else parts.soft).item() == 0
    assert parts.loss.isfinite()
    (gradient,) = torch.autograd.grad(parts.loss, student)
    assert gradient.isfinite().all()


# 156 is -100 in eight bits: labels are compared as what they say
def test_narrow_labels_do_not_wrap_into_ignore_index(backend: str) -> None:
    student, teacher = torch.randn(3, 300), torch.randn(3, 300)
    labels = torch.tensor([156, 44, 7])
    for ignore_index in (-100, 300):
        options = {"reduction": "none", "backend": backend, "ignore_index": ignore_index}
        got = kd_loss(student, teacher, labels.to(torch.uint8), **options)
        want = kd_loss(student, teacher, labels, **options)
        assert torch.equal(got, want)


def test_token_weights_whose_sum_overflows(backend: str) -> None:
    student, teacher, labels = torch.randn(3, 30), torch.randn(3, 30), torch.tensor([1, 2, 3])
    huge = kd_loss(student, teacher, labels, token_weight=torch.full((3,), 2e38), backend=backend)
    torch.testing.assert_close(huge, kd_loss(student, teacher, labels, backend=backend))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_infinite_upstream_leaves_ignored_rows_at_zero(dtype: torch.dtype, backend: str) -> None:
    student = torch.randn(3, 30).to(dtype).requires_grad_()
    loss = kd_loss(student, torch.randn(3, 30), torch.tensor([-100, 2, 3]), backend=backend)
    loss.backward(torch.tensor(math.inf))
    assert student.grad is not None
    assert not student.grad[0].any()


def test_a_range_check_sees_parameters(backend: str) -> None:
    labels = torch.nn.Parameter(torch.tensor([0, 99]), requires_grad=False)
    with pytest.raises(ValueError, match="got 99 at position 1"):
        kd_loss(torch.randn(2, 30), torch.randn(2, 30), labels, backend=backend)
