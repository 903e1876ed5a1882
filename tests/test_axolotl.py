"""axolotl's loss of a top-k teacher by its signature: the formula of its source in float64."""

from __future__ import annotations

import inspect
from functools import partial

import pytest
import torch
from torch import Tensor

from fused_kd.integrations.axolotl import ChunkedTopKKDLoss, loss

B, S, S_T, V, K = 2, 6, 5, 31, 4
Teacher = tuple[Tensor, Tensor, Tensor]


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Teacher]:
    """Log-probabilities that do not sum to 1; masked entries that all point at 0; an empty row."""
    draw = torch.Generator().manual_seed(0)
    student = (3 * torch.randn(B, S, V, generator=draw)).to(dtype).requires_grad_()
    logs, ids = torch.randn(B, S_T, V, generator=draw).mul(3).log_softmax(-1).topk(K)
    mask = torch.rand(B, S_T, K, generator=draw) > 0.3
    mask[0, 1] = False
    return student, (ids.where(mask, 0), logs, mask.long())


def formula(student: Tensor, teacher: Teacher, count: int, temperature: float) -> Tensor:
    ids, logs, mask = teacher
    p = (student[:, : ids.shape[1]] / temperature).log_softmax(-1).gather(-1, ids)
    terms = (logs.double().exp() * (logs.double() - p))[mask.bool()]
    return terms.sum() / (count if count > 0 else len(terms))


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("count", [-1, 9])
@pytest.mark.parametrize("chunks", [0, 1, 3, 8])
def test_value_and_gradient(temperature: float, count: int, chunks: int) -> None:
    student, teacher = inputs()
    if chunks:
        got = ChunkedTopKKDLoss(chunks, temperature)(student, *teacher, count)
    else:
        got = loss(student, *teacher, count, temperature)
    exact = student.detach().double().requires_grad_()
    want = formula(exact, teacher, count, temperature)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    got.backward()
    want.backward()
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunks", [0, 3])
def test_a_token_that_is_twice_among_the_top_k(chunks: int) -> None:
    """Its probability is the sum of its entries; the entropy is that of the entries."""
    student, (ids, logs, mask) = inputs()
    ids[..., 1] = ids[..., 0]
    ids[1] = ids[1, :, :1]  # rows of one token; some of its entries are masked
    run = ChunkedTopKKDLoss(chunks, 1.7) if chunks else partial(loss, kd_temperature=1.7)
    exact = student.detach().double().requires_grad_()
    got, want = run(student, ids, logs, mask), formula(exact, (ids, logs, mask), -1, 1.7)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    got.backward()
    want.backward()
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunks", [0, 3])
def test_a_masked_token_is_not_read(chunks: int) -> None:
    run = ChunkedTopKKDLoss(chunks) if chunks else loss
    student, (ids, logs, mask) = inputs()
    want = run(student, ids, logs, mask)
    for padding in (-100, V):
        got = run(student, ids.where(mask.bool(), padding), logs, mask)
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("count", [-1, 0, 9])
def test_a_count_in_a_tensor_is_that_number(count: int) -> None:
    """A compiler takes it too, since nothing reads its value."""
    student, teacher = inputs()
    want = loss(student, *teacher, count)
    for run in (loss, torch.compile(loss, backend="eager", fullgraph=True)):
        got = run(student, *teacher, torch.tensor(count))
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_narrow_logits() -> None:
    student, teacher = inputs(torch.bfloat16)
    want = formula(student.detach().double(), teacher, -1, 2.0)
    got = loss(student, *teacher, kd_temperature=2.0)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_no_entry_that_counts_P47() -> None:
    student, (ids, logs, mask) = inputs()
    got = loss(student, ids, logs, torch.zeros_like(mask))
    got.backward()
    assert got == 0
    assert not student.grad.any()


def test_the_signatures() -> None:
    names = ["student_logits", "target_token_ids", "target_logprobs", "target_mask",
             "num_items_in_batch"]  # fmt: skip
    assert list(inspect.signature(loss).parameters) == [*names, "kd_temperature"]
    assert list(inspect.signature(ChunkedTopKKDLoss.forward).parameters) == ["self", *names]


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
    with pytest.raises(ValueError, match="temperature"):
        ChunkedTopKKDLoss(kd_temperature=0.0)(student, ids, logs, mask)
