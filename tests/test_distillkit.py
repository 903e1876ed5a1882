"""DistillKit's dense losses by their signature: the formulas of its source in float64."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.logits import make
from torch import Tensor

from fused_kd.integrations.distillkit import DENSE_LOSSES, KLDLoss

T = 1.7


def formula(name: str, student: Tensor, teacher: Tensor) -> Tensor:
    """Every row, times T²."""
    p, q = (F.softmax(x.double() / T, -1) for x in (student, teacher))
    m = (p + q) / 2
    if name == "kl":
        rows = (q * (q / p).log()).sum(-1)
    elif name == "jsd":
        rows = ((q * (q / m).log()).sum(-1) + (p * (p / m).log()).sum(-1)) / 2
    else:
        rows = (p - q).abs().sum(-1) / 2
    return T**2 * rows


def test_the_signature() -> None:
    names = ["self", "student_outputs", "signal", "mask", "hidden_state_mapping",
             "num_items_in_batch"]  # fmt: skip
    for loss in DENSE_LOSSES:
        assert list(inspect.signature(loss.__call__).parameters) == names
        assert not loss(temperature=1.0).requires_hidden_states()
    assert [loss.name() for loss in DENSE_LOSSES] == ["kl", "jsd", "tvd"]


@pytest.mark.parametrize("loss", DENSE_LOSSES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("count", [None, 11])
def test_value_and_gradient(loss: Any, masked: bool, count: int | None) -> None:
    student, teacher, _ = make(2, 4)
    mask = torch.rand(2, 4, 1) > 0.5 if masked else None
    outputs, signal = SimpleNamespace(logits=student), SimpleNamespace(logits=teacher)
    got = loss(temperature=T, sparse_chunk_length=3)(
        outputs, signal, mask=mask, hidden_state_mapping=None, num_items_in_batch=count
    )
    exact = student.detach().double().requires_grad_()
    kept = torch.ones(2, 4).bool() if mask is None else mask.squeeze(-1)
    want = formula(loss.name(), exact, teacher)[kept].sum() / (count or kept.sum())
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    got.backward()
    want.backward()
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_a_sparse_teacher_is_refused() -> None:
    student, _, _ = make(2, 4)
    signal = SimpleNamespace(sparse_ids=None, sparse_values=None)
    with pytest.raises(TypeError, match=r"signal.logits must be .* got a SimpleNamespace without"):
        KLDLoss(1.0)(SimpleNamespace(logits=student), signal)
