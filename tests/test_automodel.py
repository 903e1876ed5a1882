"""NeMo Automodel's KDLoss by its signature: the formula of its source in float64."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from support.logits import INF, make, make_ignored
from torch import Tensor
from torch import distributed as dist
from torch.testing._internal.distributed import fake_pg

from fused_kd.integrations.automodel import KDLoss

T = 1.7


def formula(student: Tensor, teacher: Tensor, labels: Tensor, count: int | None) -> Tensor:
    """T²·KL(teacher ‖ student), over the rows that count."""
    kept = labels != -100
    log_p = F.log_softmax(student.double()[kept] / T, -1)
    log_q = F.log_softmax(teacher.double()[kept] / T, -1)
    rows = T**2 * (log_q.exp() * (log_q - log_p)).sum(-1)
    return rows.mean() if count is None else rows.sum() / count


def test_the_signature() -> None:
    assert str(inspect.signature(KDLoss)).startswith(
        "(ignore_index: 'int' = -100, temperature: 'float' = 1.0, fp32_upcast: 'bool' = True, "
        "tp_group: 'Any' = None, chunk_size: 'int' = 0)"
    )
    names = list(inspect.signature(KDLoss.forward).parameters)
    assert names == ["self", "student_logits", "teacher_logits", "labels", "num_batch_labels"]


@pytest.mark.parametrize("count", [None, 11])
def test_value_and_gradient(count: int | None) -> None:
    student, teacher, labels = make_ignored()
    exact = student.detach().double().requires_grad_()
    got = KDLoss(temperature=T)(student, teacher, labels, num_batch_labels=count)
    want = formula(exact, teacher, labels, count)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    got.backward()
    want.backward()
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_attributes_may_be_changed() -> None:
    student, teacher, labels = make_ignored()
    loss = pickle.loads(pickle.dumps(KDLoss(ignore_index=3)))
    loss.temperature, loss.ignore_index = T, -100
    want = KDLoss(temperature=T)(student, teacher, labels)
    assert torch.equal(loss(student, teacher, labels), want)


@pytest.mark.parametrize("count", [None, 0, torch.tensor(0)])
def test_no_row_that_counts_P47(count: int | Tensor | None) -> None:
    """The recipe counts labels as a Python int, which is 0 then."""
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
    assert torch.equal(loss(student, teacher, labels), want)
    assert torch.equal(loss(student, teacher, odd), want)
    assert torch.equal(loss(student, teacher, labels.flatten()), want)
    narrow = torch.full((2, 4), 156, dtype=torch.uint8)  # -100 in eight bits
    every = loss(student, teacher, torch.ones(2, 4).long())
    assert torch.equal(loss(student, teacher, narrow), every)


@pytest.fixture
def groups() -> Iterator[dict[int, dist.ProcessGroup]]:
    """Process groups of this one process, by the number of ranks that they claim."""
    dist.init_process_group("fake", store=fake_pg.FakeStore(), rank=0, world_size=2)
    yield {ranks: dist.new_group(range(ranks)) for ranks in (1, 2)}
    dist.destroy_process_group()


def test_tensor_parallelism_R_60(groups: dict[int, dist.ProcessGroup]) -> None:
    """A group of one rank has whole rows."""
    student, teacher, labels = make_ignored()
    want = KDLoss()(student, teacher, labels)
    assert torch.equal(KDLoss(tp_group=groups[1])(student, teacher, labels), want)
    with pytest.raises(ValueError, match=r"tp_group must be None or of one rank.*got 2 ranks"):
        KDLoss(tp_group=groups[2])
    loss = KDLoss()
    loss.tp_group = groups[2]
    with pytest.raises(ValueError, match="tp_group must be None or of one rank"):
        loss(student, teacher, labels)


def test_refusals() -> None:
    with pytest.raises(TypeError, match=r"tp_group must be None or a .*ProcessGroup; got object"):
        KDLoss(tp_group=object())
    student, teacher, labels = make()
    loss = KDLoss()
    with pytest.raises(TypeError, match=r"labels must be a torch\.Tensor; got NoneType"):
        loss(student, teacher, None)
    with pytest.raises(ValueError, match=r"labels must have the leading shape .*; got \(5,\)"):
        loss(student, teacher, labels[1:])
    with pytest.raises(ValueError, match=r"^num_batch_labels must be positive .*; got -3"):
        loss(student, teacher, labels, num_batch_labels=-3)
    with pytest.raises(ValueError, match="temperature must be positive"):
        KDLoss(temperature=0.0)
