"""What tests of adapters compare: values, gradients and signatures of losses; and refusals."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor


def outcome(
    loss: Callable[..., Any], leaves: Sequence[Tensor], *rest: Any, **keywords: Any
) -> list[Tensor]:
    """Return the loss, or its parts if it is a tuple, then the gradients with respect to `leaves`.

    The entries' upstream gradients are 2, 3, ...: none is 1, so a dropped factor is seen.
    """
    inputs = [x.detach().clone().requires_grad_() for x in leaves]
    result = loss(*inputs, *rest, **keywords)
    outputs = result if isinstance(result, tuple) else (result,)
    attached = [x for x in outputs if x.requires_grad]
    upstream = [torch.arange(2, x.numel() + 2).view(x.shape).to(x) for x in attached]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(attached, inputs, upstream)]


def parameters(call: Any) -> list[tuple[str, Any, Any]]:
    """Return the name, kind and default of each parameter of a callable."""
    return [(p.name, p.kind, p.default) for p in inspect.signature(call).parameters.values()]


def refused(
    error: Any, message: str, call: Callable[..., Any], *arguments: Any, **keywords: Any
) -> None:
    """Assert that a call raises `error` (a class or several) with a matching message."""
    with pytest.raises(error, match=message):
        call(*arguments, **keywords)
