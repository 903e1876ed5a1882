"""The registered operators of the linear level: schemas, fakes, and that they are opaque."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from linear_helpers import H_S, H_T, make_heads
from torch.utils.flop_counter import FlopCounterMode

from fused_kd import linear_kd_loss
from fused_kd.linear.autograd import Settings
from fused_kd.options import KDOptions

CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration")


def _arguments(dtype: torch.dtype, given_logits: bool, ignored: bool) -> tuple[Any, ...]:
    heads = make_heads(rows=12, dtype=dtype)
    tensors = [x.detach() for x in heads.student]
    teacher: tuple[Any, ...] = (*heads.teacher, None, None)
    if given_logits:
        teacher = (None, None, None, F.linear(*heads.teacher))
    w = torch.full((12,), 0.25, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    w[3] = 0.0 if ignored else 0.25
    backend = "reference"
    settings = Settings(
        KDOptions(temperature=2.0), backend, dtype, dtype, 5, None, None, torch.float32
    )
    return (*tensors, *teacher, heads.labels, w, None, *settings.arguments())


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("given_logits", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_losses(dtype: torch.dtype, given_logits: bool, ignored: bool) -> None:
    arguments = _arguments(dtype, given_logits, ignored)
    torch.library.opcheck(torch.ops.fused_kd.linear_losses.default, arguments, test_utils=CHECKS)


@pytest.mark.parametrize("wanted", [[True, True, True], [False, True, False]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradients(dtype: torch.dtype, wanted: list[bool]) -> None:
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    arguments = (*_arguments(dtype, False, True), wanted, accumulate)
    torch.library.opcheck(torch.ops.fused_kd.linear_gradients.default, arguments, test_utils=CHECKS)
    _, _, *gradients = torch.ops.fused_kd.linear_gradients(*arguments)
    assert [g.numel() > 0 for g in gradients] == wanted


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, False)])
def test_flop_counter_mode_counts_the_products(wanted: tuple[bool, bool], reduction: str) -> None:
    heads = make_heads()
    rows, vocabulary = heads.hidden.shape[0], heads.weight.shape[0]
    student, teacher = (2 * rows * vocabulary * size for size in (H_S, H_T))
    inputs = [x.detach().requires_grad_(w) for x, w in zip(heads.student[:2], wanted, strict=True)]
    for soft_weight, of_teacher in ((0.5, teacher), (0.0, 0)):
        with FlopCounterMode(display=False) as counter:
            loss = linear_kd_loss(
                *inputs, *heads.teacher, heads.labels, soft_weight=soft_weight, reduction=reduction
            )
            if any(wanted):
                loss.sum().backward()
        again = 2 if reduction == "none" and any(wanted) else 1  # the logits, in the backward
        want = again * (student + of_teacher) + sum(wanted) * student
        assert counter.get_total_flops() == want


def test_a_row_counts_if_either_of_its_terms_does() -> None:
    arguments = list(_arguments(torch.float64, False, True))
    w_hard, w_soft = arguments[8], torch.full((12,), 0.5, dtype=torch.float64)
    w_soft[5] = 0.0
    arguments[9] = w_soft
    arguments += [[True, True, True], torch.float64]
    hard, soft, *gradients = torch.ops.fused_kd.linear_gradients(*arguments)
    student = [x.clone().requires_grad_() for x in arguments[:3]]
    logits, teacher = F.linear(*student), F.linear(*arguments[3:5])
    by_hard = F.cross_entropy(logits, arguments[7], reduction="none")
    p, q = (F.log_softmax(x / 2, 1) for x in (logits, teacher))
    by_soft = 4 * F.kl_div(p, q, reduction="none", log_target=True).sum(1)
    torch.testing.assert_close(hard, by_hard.detach() * (w_hard != 0))
    torch.testing.assert_close(soft, by_soft.detach() * (w_soft != 0))
    want = torch.autograd.grad((w_hard * by_hard + w_soft * by_soft).sum(), student)
    torch.testing.assert_close(tuple(gradients), want)
