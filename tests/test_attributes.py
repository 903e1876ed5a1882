"""Options are attributes of the module: readable, checked when assigned, hard to misspell."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from support.heads import make_heads
from support.logits import make
from torch import nn

from fused_kd import KDLoss, kd_loss
from fused_kd.options import KDOptions

VALUES: dict[str, Any] = {
    "temperature": 2.0,
    "hard_weight": 0.25,
    "soft_weight": 0.75,
    "divergence": "jsd",
    "beta": 0.1,
    "soft_scale": "none",
    "label_smoothing": 0.1,
    "ignore_index": -1,
    "reduction": "sum",
    "inplace": True,
    "return_parts": True,
    "backend": "reference",
    "chunk_rows": 3,
    "memory_budget": 2**28,
    "grad_accum_dtype": torch.bfloat16,
}


def test_every_option_is_an_attribute() -> None:
    assert VALUES.keys() == {field.name for field in dataclasses.fields(KDOptions)}
    for name, value in VALUES.items():
        loss = KDLoss()
        assert getattr(loss, name) != value
        setattr(loss, name, value)
        assert getattr(loss, name) == value
        assert repr(loss) == repr(KDLoss(**{name: value}))


def test_an_assigned_option_is_the_one_that_counts() -> None:
    student, teacher, labels = make()
    loss = KDLoss()
    loss.temperature = 8.0
    assert torch.equal(
        loss(student, teacher, labels), kd_loss(student, teacher, labels, temperature=8.0)
    )
    heads = make_heads()
    inputs = (heads.student_side, heads.teacher_side, heads.labels)
    loss.chunk_rows = 5
    assert torch.equal(loss(*inputs), kd_loss(*inputs, temperature=8.0, chunk_rows=5))
    with pytest.raises(ValueError, match="chunk_rows is for a student or teacher given as a Head"):
        loss(student, teacher, labels)


def test_an_assignment_is_checked_and_a_refused_one_changes_nothing() -> None:
    loss = KDLoss(chunk_rows=3)
    before = repr(loss)
    with pytest.raises(ValueError, match="temperature must be positive and finite; got 0"):
        loss.temperature = 0
    with pytest.raises(TypeError, match="return_parts must be True or False"):
        loss.return_parts = 1
    with pytest.raises(ValueError, match="chunk_rows and memory_budget both set the number"):
        loss.memory_budget = 2**28
    with pytest.raises(TypeError, match="options must be a KDOptions; got dict"):
        loss.options = {"temperature": 2.0}
    assert repr(loss) == before


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("temperatur", "temperature"),
        ("Temperature", "temperature"),
        ("soft_weigth", "soft_weight"),
        ("chunk_row", "chunk_rows"),
    ],
)
def test_a_misspelt_option_is_refused(name: str, meant: str) -> None:
    with pytest.raises(
        AttributeError, match=f"KDLoss has no option {name!r}: did you mean {meant!r}"
    ):
        setattr(KDLoss(), name, 1.0)


def test_all_else_is_as_in_any_module() -> None:
    loss = KDLoss()
    for name in dir(nn.Module()):
        if not name.startswith("__"):
            setattr(loss, name, getattr(loss, name))  # none is taken for a misspelt option
    loss.teacher, loss.log, loss._temperatur = nn.Linear(2, 2), [1.0], 3
    assert list(loss.children()) == [loss.teacher]
    assert not loss.eval().training
    with pytest.raises(AttributeError, match="no attribute 'tau'"):
        _ = loss.tau
    loss = KDLoss()
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        twin.temperature = 3.0
        assert (twin.temperature, loss.temperature) == (3.0, 1.0)
