"""Ignored rows, token weights, num_items, reductions and parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.logits import N, check, gradient, make, pair, scalar_and_gradient

from fused_kd import kd_loss
from fused_kd.testing import eager_kd_loss


def test_no_labels(backend: str) -> None:
    student, teacher, _ = make(2, 3)
    got = kd_loss(student, teacher, hard_weight=0, soft_weight=1, backend=backend)
    want = eager_kd_loss(student, teacher, hard_weight=0, soft_weight=1)
    check(got, want, student)


# in the vocabulary, at both ends, in the padding of a last block of 2048, beyond
@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 3, 2050, 2056, 4096])
def test_ignored_rows_count_in_neither_term(
    backend: str, divergence: str, ignore_index: int
) -> None:
    student, teacher = pair(N, 2051)
    labels = torch.randint(4, 2050, (N,))
    labels[0] = labels[3] = ignore_index
    kept = torch.tensor([1, 2, 4, 5])
    options = {"divergence": divergence, "label_smoothing": 0.1}
    leaf = student[kept].requires_grad_()
    want = eager_kd_loss(leaf, teacher[kept], labels[kept], **options)
    student[0], student[3, 1], teacher[3] = torch.nan, torch.inf, torch.nan
    options |= {"ignore_index": ignore_index, "backend": backend}
    for reduction, count in (("mean", 1), ("sum", 4)):
        got = scalar_and_gradient(student, teacher, labels, reduction=reduction, **options)
        torch.testing.assert_close(got[0], count * want.detach(), rtol=1e-5, atol=1e-6)
        by_kept = count * gradient(want, leaf, retain_graph=True)
        torch.testing.assert_close(got[1][kept], by_kept, rtol=1e-4, atol=1e-7)
        assert not got[1][[0, 3]].any()


def test_the_mean_is_over_the_kept_rows(backend: str) -> None:
    student = torch.tensor([[0.0, 0.0], [1.0, 5.0], [0.0, 0.0], [9.0, 2.0]]).log_softmax(1)
    student[2] = torch.tensor([0.25, 0.75]).log()
    teacher = torch.full((4, 2), 0.5).log()
    labels = torch.tensor([-100, -100, 0, -100])
    hard, soft = 1.3862943611, 0.1438410362  # log 4, and log 2 - log 3 / 2, by hand
    for divisor, items in ((1, None), (4, 4)):
        got = kd_loss(student, teacher, labels, hard_weight=0.25, num_items=items, backend=backend)
        want = torch.tensor((0.25 * hard + 0.5 * soft) / divisor)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_a_mean_of_a_million_rows(backend: str) -> None:
    student, teacher = torch.randn(2, 2**20, 4)
    labels = torch.randint(4, (2**20,))
    loss, by_student = scalar_and_gradient(student, teacher, labels, backend=backend)
    leaf = student.double().requires_grad_()
    want = eager_kd_loss(leaf, teacher.double(), labels)
    torch.testing.assert_close(loss.double(), want.detach(), rtol=1e-6, atol=0)
    exact = gradient(want, leaf)
    assert (by_student.double() - exact).norm() <= 1e-6 * exact.norm()


def test_label_zero_counts(backend: str) -> None:
    student, teacher, _ = make()
    labels = torch.zeros(N, dtype=torch.int64)
    check(
        kd_loss(student, teacher, labels, backend=backend),
        eager_kd_loss(student, teacher, labels, ignore_index=-1),
        student,
    )


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
    assert gradient(parts.loss, student).isfinite().all()


# 156 is -100 in eight bits: labels are compared by their values
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
