"""Calls at the edge of what is allowed: the right value, or an error that names the argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.logits import V
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fused_kd import Head, kd_loss

ROWS, H = 4, 8


def tensors() -> tuple[Tensor, Tensor, Head, Tensor]:
    """Return a student's logits, a teacher's logits and Head, and labels."""
    torch.manual_seed(0)
    student = torch.randn(ROWS, V, requires_grad=True)
    head = Head(torch.randn(ROWS, H), torch.randn(V, H))
    return student, torch.randn(ROWS, V), head, torch.arange(ROWS)


@pytest.mark.parametrize("layout", ["sparse", "nested"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_labels_of_another_layout_are_refused_by_name(layout: str) -> None:
    student, teacher, _, labels = tensors()
    other = labels.to_sparse() if layout == "sparse" else torch.nested.nested_tensor([labels])
    with pytest.raises(TypeError, match="labels must be a dense"):
        kd_loss(student, teacher, other)
    with pytest.raises(TypeError, match="student must be"):
        kd_loss("logits", teacher, other)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "sparse num_items": (lambda: {"num_items": torch.tensor(2.0).to_sparse()}, "num_items must be"),
    "tiny num_items": (lambda: {"num_items": torch.tensor(1e-40)}, "num_items must be 0 or in"),
    "softcap": (lambda: {"softcap": 30.0}, "'softcap': it is a field of Head"),
    "an array": (lambda: {"divergence": torch.zeros(3)}, "divergence must be one of .* a Tensor$"),
    "negated": (lambda: {"inplace": True}, "inplace=True needs .* negates them lazily"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str) -> None:
    student, teacher, _, labels = tensors()
    keywords, message = REFUSED[case][0](), REFUSED[case][1]
    logits = torch._neg_view(student * 1) if case == "negated" else student
    with pytest.raises((TypeError, ValueError), match=message):
        kd_loss(logits, teacher, labels, **keywords)


def test_rows_without_a_term_are_attached_to_the_graph() -> None:
    student, teacher, _, labels = tensors()
    loss = kd_loss(student, teacher, labels, hard_weight=0, soft_weight=0, reduction="none")
    loss.sum().backward()
    assert student.grad is not None
    assert not student.grad.any()


def test_a_weight_that_underflows_reports_its_term() -> None:
    _, teacher, head, labels = tensors()
    weights = {"hard_weight": 1e-30, "soft_weight": 1.0, "return_parts": True}
    small = kd_loss(head._replace(scale=1e-16), teacher, labels, **weights)
    logits = 1e-16 * (head.hidden @ head.weight.t())
    expected = kd_loss(logits, teacher, labels, **weights)
    torch.testing.assert_close(small.hard, expected.hard)


def test_in_place_next_to_a_head_is_an_operator() -> None:
    """Whatever counts or fakes operators sees it."""
    student, _, head, labels = tensors()
    with FlopCounterMode(display=False) as counter:
        kd_loss(student * 1, head, labels, inplace=True)
    assert counter.get_total_flops() == 2 * ROWS * V * H
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(student)
        side = head._replace(
            hidden=mode.from_tensor(head.hidden), weight=mode.from_tensor(head.weight)
        )
        assert kd_loss(fake * 1, side, mode.from_tensor(labels), inplace=True).shape == ()
