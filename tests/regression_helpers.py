"""What the regression cases share: small inputs, losses, gradients, comparisons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_kd import kd_loss

V = 33
STEP = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}


def make(rows: int = 6, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Student (a leaf), teacher, labels whose first row is ignored."""
    student = torch.randn(rows, V).to(dtype).requires_grad_()
    labels = torch.randint(V, (rows,))
    labels[0] = -100
    return student, torch.randn(rows, V).to(dtype), labels


def loss_of(*tensors: Any, **keywords: Any) -> Tensor:
    result = kd_loss(*tensors, **keywords)
    assert isinstance(result, Tensor)
    return result


def grad(loss: Tensor, of: Tensor, *upstream: Tensor, **keywords: Any) -> Tensor:
    return torch.autograd.grad(loss, of, *upstream, **keywords)[0]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b.to(a.dtype), rtol=STEP[a.dtype], atol=2**-22)


def raises(error: type[Exception], words: str, call: Callable[[], object]) -> None:
    try:
        call()
    except error as caught:
        assert words in str(caught), str(caught)  # noqa: PT017
    else:
        raise AssertionError(f"no {error.__name__} with {words!r}")
