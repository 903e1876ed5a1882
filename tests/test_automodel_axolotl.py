"""The losses with Automodel's and axolotl's signatures: masks, counts, tensor parallelism.

test_adapter_messages.py has the refusals; tests/integrations/test_framework_losses.py compares the
numbers.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.logits import INF, make, make_ignored
from support.losses import refused
from torch import Tensor
from torch import distributed as dist
from torch.testing._internal.distributed import fake_pg

from fused_kd.integrations import axolotl
from fused_kd.integrations.automodel import KDLoss

# ------------------------------------------------------------------------------------ Automodel


def test_attributes_may_be_changed() -> None:
    tensors = make_ignored()
    loss = pickle.loads(pickle.dumps(KDLoss(ignore_index=3)))
    loss.temperature, loss.ignore_index = 1.7, -100
    assert torch.equal(loss(*tensors), KDLoss(temperature=1.7)(*tensors))


@pytest.mark.parametrize("count", [None, 0, torch.tensor(0)])
def test_no_row_that_counts_P47(count: int | Tensor | None) -> None:
    student, teacher, labels = make_ignored()
    logits = torch.full_like(student, -INF).requires_grad_()
    loss = KDLoss()(logits, teacher, torch.full_like(labels, -100), num_batch_labels=count)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.count_nonzero(logits.grad) == 0


@pytest.mark.parametrize("ignore_index", [-100, 0])
def test_labels_only_mask_and_may_be_flat(ignore_index: int) -> None:
    student, teacher, _ = make(2, 4)
    labels = torch.tensor([[ignore_index, 1, 2, 3], [4, 5, 6, ignore_index]])
    odd = labels.clone()
    odd[0, 1], odd[0, 2] = -1, 10**6
    loss = KDLoss(ignore_index)
    want = KDLoss()(student, teacher, labels.where(labels != ignore_index, -100))
    for form in (labels, odd, labels.flatten()):
        assert torch.equal(loss(student, teacher, form), want)
    narrow = torch.full((2, 4), 156, dtype=torch.uint8)  # -100 in eight bits
    every = loss(student, teacher, torch.ones(2, 4).long())
    assert torch.equal(loss(student, teacher, narrow), every)


@pytest.fixture
def groups() -> Iterator[dict[int, dist.ProcessGroup]]:
    """Yield process groups of this one process, by the number of ranks that they claim."""
    dist.init_process_group("fake", store=fake_pg.FakeStore(), rank=0, world_size=2)
    yield {ranks: dist.new_group(range(ranks)) for ranks in (1, 2)}
    dist.destroy_process_group()


def test_tensor_parallelism_R_60(groups: dict[int, dist.ProcessGroup]) -> None:
    tensors, loss = make_ignored(), KDLoss()
    want = loss(*tensors)
    assert torch.equal(KDLoss(tp_group=groups[1])(*tensors), want)  # one rank has whole rows
    message = r"tp_group must be None or of one rank.*got 2 ranks"
    refused(ValueError, message, KDLoss, tp_group=groups[2])
    loss.tp_group = groups[2]
    refused(ValueError, message, loss, *tensors)


# -------------------------------------------------------------------------------------- axolotl


def top_k() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return student logits (2, 6, 31), and a teacher's ids, log-probabilities and mask (2, 5, 4).

    The id of a masked entry is 0.
    """
    logs, ids = torch.randn(2, 5, 31).mul(3).log_softmax(-1).topk(4)
    mask = torch.rand(2, 5, 4) > 0.3
    return 3 * torch.randn(2, 6, 31), ids.where(mask, 0), logs, mask.long()


@pytest.mark.parametrize("run", [axolotl.loss, axolotl.ChunkedTopKKDLoss(3)])
def test_a_masked_token_is_not_read(run: Any) -> None:
    student, ids, logs, mask = top_k()
    want = run(student, ids, logs, mask)
    for padding in (-100, 31):
        got = run(student, ids.where(mask.bool(), padding), logs, mask)
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("count", [-1, 0, 9])
def test_a_count_in_a_tensor_is_not_read_by_the_host(count: int) -> None:
    inputs = top_k()
    want = axolotl.loss(*inputs, count)
    for run in (axolotl.loss, torch.compile(axolotl.loss, backend="eager", fullgraph=True)):
        torch.testing.assert_close(run(*inputs, torch.tensor(count)), want, rtol=1e-6, atol=0)
