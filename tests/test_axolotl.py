"""The top-k losses with axolotl's signature; test_framework_losses.py compares the numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fused_kd.integrations.axolotl import ChunkedTopKKDLoss, loss

B, S, S_T, V, K = 2, 6, 5, 31, 4
BOTH = pytest.mark.parametrize("run", [loss, ChunkedTopKKDLoss(3)], ids=["whole", "chunks"])


def inputs() -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Return a student's logits, and a teacher whose masked entries all have the id 0."""
    student = (3 * torch.randn(B, S, V)).requires_grad_()
    logs, ids = torch.randn(B, S_T, V).mul(3).log_softmax(-1).topk(K)
    mask = torch.rand(B, S_T, K) > 0.3
    return student, (ids.where(mask, 0), logs, mask.long())


@BOTH
def test_a_masked_token_is_not_read(run: Any) -> None:
    student, (ids, logs, mask) = inputs()
    want = run(student, ids, logs, mask)
    for padding in (-100, V):
        got = run(student, ids.where(mask.bool(), padding), logs, mask)
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("count", [-1, 0, 9])
def test_a_count_in_a_tensor_is_not_read_by_the_host(count: int) -> None:
    student, teacher = inputs()
    want = loss(student, *teacher, count)
    for run in (loss, torch.compile(loss, backend="eager", fullgraph=True)):
        got = run(student, *teacher, torch.tensor(count))
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


@BOTH
def test_no_entry_that_counts_P47(run: Any) -> None:
    student, (ids, logs, mask) = inputs()
    got = run(student, ids, logs, torch.zeros_like(mask))
    got.backward()
    assert got == 0
    assert not student.grad.any()


def test_refusals() -> None:
    student, (ids, logs, mask) = inputs()
    with pytest.raises(ValueError, match=r"target_logprobs must be \(B, S_t, K\)"):
        loss(student, ids, logs[..., 1:], mask)
    with pytest.raises(TypeError, match=r"target_token_ids must be int64; got torch\.int32"):
        loss(student, ids.int(), logs, mask)
    with pytest.raises(ValueError, match="at most its length, 4"):
        loss(student[:, :4], ids, logs, mask)
    with pytest.raises(ValueError, match=r"student_logits must be \(B, S, V\)"):
        loss(student[0], ids, logs, mask)
    with pytest.raises(TypeError, match="target_mask"):
        loss(student, ids, logs, None)
