"""The KDLoss with NeMo Automodel's signature; test_framework_losses.py compares the numbers."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import pytest
import torch
from support.logits import INF, make, make_ignored
from torch import Tensor
from torch import distributed as dist
from torch.testing._internal.distributed import fake_pg

from fused_kd.integrations.automodel import KDLoss

T = 1.7


def test_attributes_may_be_changed() -> None:
    tensors = make_ignored()
    loss = pickle.loads(pickle.dumps(KDLoss(ignore_index=3)))
    loss.temperature, loss.ignore_index = T, -100
    assert torch.equal(loss(*tensors), KDLoss(temperature=T)(*tensors))


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
    for given in (labels, odd, labels.flatten()):
        assert torch.equal(loss(student, teacher, given), want)
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
    with pytest.raises(ValueError, match=r"tp_group must be None or of one rank.*got 2 ranks"):
        KDLoss(tp_group=groups[2])
    loss.tp_group = groups[2]
    with pytest.raises(ValueError, match="tp_group must be None or of one rank"):
        loss(*tensors)


def test_refusals() -> None:
    with pytest.raises(TypeError, match=r"tp_group must be None or a .*ProcessGroup; got object"):
        KDLoss(tp_group=object())
    student, teacher, labels = make()
    with pytest.raises(TypeError, match=r"labels must be a torch\.Tensor; got NoneType"):
        KDLoss()(student, teacher, None)
    with pytest.raises(ValueError, match=r"labels must have the leading shape .*; got \(5,\)"):
        KDLoss()(student, teacher, labels[1:])
    with pytest.raises(ValueError, match="temperature must be positive"):
        KDLoss(temperature=0.0)
