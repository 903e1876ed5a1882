"""verl's forward_kl_topk: golden numbers, rows without entries, options."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from support.losses import outcome, refused
from torch import Tensor

from fused_kd.integrations.verl import forward_kl_topk

Q = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03], dtype=torch.float64)
P = torch.tensor([0.4, 0.3, 0.1, 0.15, 0.05], dtype=torch.float64)
#: Calculated by hand, of the teacher's first two entries: the value, and its gradient.
GOLDEN = 0.0659914
GRADIENT = torch.tensor([[-0.2, -0.025, 0.075, 0.1125, 0.0375]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_numbers(dtype: torch.dtype) -> None:
    student, logs = P.log()[None].to(dtype), Q[None, :2].log().to(dtype)
    value, gradient = outcome(forward_kl_topk, [student], logs, torch.tensor([[0, 1]]))
    assert value.tolist() == pytest.approx([GOLDEN], abs=1e-6)
    torch.testing.assert_close(gradient / 2, GRADIENT.to(dtype), rtol=0, atol=1e-6)


def test_it_may_be_negative() -> None:
    student = torch.tensor([[0.9, 0.1], [0.9, 0.1]]).log()
    logs, ids = torch.full((2, 1), 0.6).log(), torch.zeros(2, 1, dtype=torch.int32)
    loss = forward_kl_topk(student, logs, ids, torch.ones(2))
    assert loss.tolist() == pytest.approx([-0.243279, 0.0], abs=1e-6)  # the last row is padding


def rows() -> tuple[Tensor, Tensor, Tensor]:
    """Return logits (2, 4, 9), and log-probabilities and ids (2, 4, 3), padded with 0.0 and 0."""
    logs, ids = torch.randn(2, 4, 9).log_softmax(-1).topk(3)
    padding = torch.tensor([[0, 0, 0, 1], [1, 0, 0, 1]]).bool()[..., None]
    return torch.randn(2, 4, 9), logs.masked_fill(padding, 0.0), ids.masked_fill(padding, 0)


def test_a_row_of_zeros_has_no_loss() -> None:
    student, logs, ids = rows()
    value, gradient = outcome(forward_kl_topk, [student], logs, ids)
    none = (logs == 0).all(-1)
    assert torch.count_nonzero(value[none]) == torch.count_nonzero(gradient[none]) == 0
    log_p = student.log_softmax(-1).gather(-1, ids)
    want = (logs.exp() * (logs - log_p)).sum(-1)
    torch.testing.assert_close(value[~none], want[~none], rtol=1e-5, atol=1e-6)


def test_options_and_refusals() -> None:
    student, logs, ids = rows()
    exact = forward_kl_topk(student.double(), logs, ids, backend="reference")
    ours = forward_kl_topk(student, logs, ids).double()
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-6)
    refuses = partial(refused, ValueError)
    refuses(r"teacher_topk_ids must be in \[0, V\)", forward_kl_topk, student, logs, ids + 9)
    refuses("teacher_topk_ids and teacher_topk_log_probs", forward_kl_topk, student, logs, ids[0])
    refuses("student_logits", forward_kl_topk, student[0], logs, ids)
    refuses("inplace=True needs reduction", forward_kl_topk, student, logs, ids, inplace=True)
