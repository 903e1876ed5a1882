"""The registered operators of the chunk loop: schemas, fakes, and that they are opaque."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.heads import H_S, H_T, make_heads
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fused_kd import Head, kd_loss
from fused_kd.engines import ChunkSettings
from fused_kd.options import Formula, KDOptions, temperature_tensor

CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration")
FORMULA = Formula("forward_kl", temperature_tensor(KDOptions(temperature=2.0)), 0.5, "t2", 0.0)
PAIRS = ("heads", "a head and logits", "logits and a head")
#: Positions in what _arguments returns.
TEACHER, LABELS, W_HARD, W_SOFT = 3, 7, 8, 9


def _arguments(dtype: torch.dtype, pair: str, ignored: bool) -> tuple[Any, ...]:
    """Return chunked_losses' arguments; `ignored`: row 3 has weight 0, the soft term is off."""
    heads = make_heads(rows=12, dtype=dtype)
    student: tuple[Tensor | None, ...] = tuple(x.detach() for x in heads.student)
    teacher: tuple[Tensor | None, ...] = (*heads.teacher, None)
    if pair == "a head and logits":
        teacher = (F.linear(*heads.teacher), None, None)
    if pair == "logits and a head":
        student = (F.linear(*heads.student).detach(), None, None)
    w = torch.full((12,), 0.25, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    w[3] = 0.0 if ignored else 0.25
    chunks = ChunkSettings(dtype, dtype, 2.0, 0.5, 5, None, None, torch.float32)
    return (
        *(*student, *teacher, None, heads.labels, w, None if ignored else w),
        *(*FORMULA, "reference", *chunks[:-1]),
    )


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_losses(dtype: torch.dtype, pair: str, ignored: bool) -> None:
    arguments = _arguments(dtype, pair, ignored)
    torch.library.opcheck(torch.ops.fused_kd.chunked_losses.default, arguments, test_utils=CHECKS)


@pytest.mark.parametrize("wanted", [[True, True, True], [False, True, False]])
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradients(dtype: torch.dtype, pair: str, wanted: list[bool]) -> None:
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    if pair == "logits and a head":
        wanted = [True, False, False]
    arguments = (*_arguments(dtype, pair, True), wanted, accumulate, False)
    operator = torch.ops.fused_kd.chunked_gradients
    torch.library.opcheck(operator.default, arguments, test_utils=CHECKS)
    _, _, *gradients = operator(*arguments)
    assert [g.numel() > 0 for g in gradients] == wanted


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_in_place(dtype: torch.dtype, ignored: bool) -> None:
    arguments = _arguments(dtype, "logits and a head", ignored)
    operator = torch.ops.fused_kd.chunked_gradients_
    torch.library.opcheck(operator.default, arguments, test_utils=CHECKS)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, False)])
def test_flop_counter_mode_counts_the_products(wanted: tuple[bool, bool], reduction: str) -> None:
    heads = make_heads()
    rows, vocabulary = heads.hidden.shape[0], heads.weight.shape[0]
    student, teacher = (2 * rows * vocabulary * size for size in (H_S, H_T))
    inputs = [x.detach().requires_grad_(w) for x, w in zip(heads.student[:2], wanted, strict=True)]
    for soft_weight, of_teacher in ((0.5, teacher), (0.0, 0)):
        with FlopCounterMode(display=False) as counter:
            loss = kd_loss(
                Head(*inputs),
                heads.teacher_side,
                heads.labels,
                soft_weight=soft_weight,
                reduction=reduction,
            )
            if any(wanted):
                loss.sum().backward()
        again = 2 if reduction == "none" and any(wanted) else 1  # the logits, in the backward
        want = again * (student + of_teacher) + sum(wanted) * student
        assert counter.get_total_flops() == want


@pytest.mark.parametrize("inplace", [False, True])
def test_logits_next_to_a_head_are_an_operator(inplace: bool) -> None:
    # So a mode that counts or fakes operators includes it.
    heads = make_heads()
    logits = F.linear(*heads.student)
    with FlopCounterMode(display=False) as counter:
        loss = kd_loss(logits, heads.teacher_side, heads.labels, inplace=inplace)
        torch.autograd.grad(loss, logits)
    assert counter.get_total_flops() == 2 * logits.numel() * H_T
    tensors = (logits.detach().requires_grad_(), *heads.teacher, heads.labels)
    with FakeTensorMode() as mode:
        fake, hidden, weight, labels = map(mode.from_tensor, tensors)
        assert kd_loss(fake * 1, Head(hidden, weight), labels, inplace=inplace).shape == ()


def test_a_weight_that_underflows_reports_its_term() -> None:
    heads = make_heads()
    options = {"hard_weight": 1e-30, "soft_weight": 1.0, "return_parts": True}
    small = heads.student_side._replace(scale=1e-16)
    got = kd_loss(small, heads.teacher_side, heads.labels, **options)
    logits = 1e-16 * F.linear(*heads.student)
    want = kd_loss(logits, heads.teacher_side, heads.labels, **options)
    torch.testing.assert_close(got.hard, want.hard)


def test_a_row_counts_if_either_of_its_terms_does() -> None:
    arguments = list(_arguments(torch.float64, "heads", True))
    w_hard, w_soft = arguments[W_HARD], torch.full((12,), 0.5, dtype=torch.float64)
    w_soft[5] = 0.0
    arguments[W_SOFT] = w_soft
    arguments += [[True, True, True], torch.float64, False]
    hard, soft, *gradients = torch.ops.fused_kd.chunked_gradients(*arguments)
    student = [x.clone().requires_grad_() for x in arguments[:TEACHER]]
    logits, teacher = 2.0 * F.linear(*student), 0.5 * F.linear(*arguments[TEACHER : TEACHER + 2])
    by_hard = F.cross_entropy(logits, arguments[LABELS], reduction="none")
    p, q = (F.log_softmax(x / 2, 1) for x in (logits, teacher))
    by_soft = 4 * F.kl_div(p, q, reduction="none", log_target=True).sum(1)
    torch.testing.assert_close(hard, by_hard.detach() * (w_hard != 0))
    torch.testing.assert_close(soft, by_soft.detach() * (w_soft != 0))
    want = torch.autograd.grad((w_hard * by_hard + w_soft * by_soft).sum(), student)
    torch.testing.assert_close(tuple(gradients), want)
