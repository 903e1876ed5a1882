"""A batch without rows is no error in any layout: a rank of DDP may have one while others train."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.logits import DTYPES
from torch import Tensor

from fused_kd import Head, kd_loss

#: (..., 4) without rows.
LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "plain": lambda: torch.randn(0, 4),
    "transposed": lambda: torch.randn(4, 0).t(),
    "three dimensions": lambda: torch.randn(2, 0, 4),
    "three dimensions, last stride 7": lambda: torch.randn(0, 4, 7).transpose(1, 2),
    "three dimensions, permuted": lambda: torch.randn(4, 0, 7).permute(1, 2, 0),
    "four dimensions": lambda: torch.randn(2, 3, 0, 4).transpose(0, 1),
    "four dimensions, last stride 7": lambda: torch.randn(2, 0, 4, 7).transpose(2, 3),
    "a slice": lambda: torch.randn(3, 5, 9)[:, 2:2, 1:5],
    "every second entry": lambda: torch.randn(0, 8)[:, ::2],
    "expanded": lambda: torch.randn(1, 1, 4).expand(3, 0, 4),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_from_logits(backend: str, reduction: str, layout: str, dtype: torch.dtype) -> None:
    for inplace in (False, reduction == "mean"):
        student = LAYOUTS[layout]().to(dtype).requires_grad_()
        head = Head(torch.randn(*student.shape[:-1], 3), torch.randn(4, 3))
        teachers = [LAYOUTS[layout](), torch.randn(student.shape), head]
        labels = torch.zeros(student.shape[:-1], dtype=torch.int64)
        for teacher in teachers:
            loss = kd_loss(
                student * 1.0, teacher, labels,
                token_weight=labels.float(), reduction=reduction, inplace=inplace, backend=backend,
            )  # fmt: skip
            _check(loss, student, reduction)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_from_hidden_states(backend: str, reduction: str, layout: str, dtype: torch.dtype) -> None:
    hidden = LAYOUTS[layout]().to(dtype).requires_grad_()
    weight = torch.randn(9, 4, dtype=dtype, requires_grad=True)
    labels = torch.zeros(hidden.shape[:-1], dtype=torch.int64)
    transposed = torch.randn(9, *hidden.shape[:-1]).movedim(0, -1)
    for teacher in (Head(LAYOUTS[layout](), torch.randn(9, 4)), transposed):
        student = Head(hidden, weight)
        loss = kd_loss(student, teacher, labels, reduction=reduction, backend=backend)
        _check(loss, hidden, reduction)
        assert weight.grad is not None
        assert not weight.grad.any()


def _check(loss: Tensor, student: Tensor, reduction: str) -> None:
    assert loss.shape == (student.shape[:-1] if reduction == "none" else ())
    assert loss.sum() == 0
    loss.sum().backward()
    assert student.grad is not None
    assert student.grad.shape == student.shape
