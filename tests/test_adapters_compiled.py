"""Every loss, ours and the adapters', traces without a break: ``fullgraph=True`` equals eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.adapters import ADAPTERS

from fused_kd import Head, KDLoss, kd_loss
from fused_kd.integrations import automodel, liger

N, V, H = 6, 11, 5
DRAW = torch.Generator().manual_seed(0)
S, T = (torch.randn(N, V, generator=DRAW) for _ in range(2))
HIDDEN, TEACHER, W = (torch.randn(n, H, generator=DRAW) for n in (N, N, V))
Y = torch.arange(N)


def assigned(module: KDLoss) -> Any:
    """Return the loss after setting an option, which torch.compile traces too."""
    module.temperature = 3.0
    return module(S, T, Y)


CALLS: dict[str, Callable[[], Any]] = {
    "KDLoss made in the trace": lambda: KDLoss(temperature=2.0)(S, T, Y),
    "an option read": lambda: kd_loss(S, T, Y, temperature=KDLoss(temperature=2.0).temperature),
    "an option assigned": lambda: assigned(KDLoss()),
    "no teacher": lambda: kd_loss(S, None, Y, soft_weight=0.0, label_smoothing=0.1),
    "heads made in the trace": lambda: KDLoss()(Head(HIDDEN, W), Head(TEACHER, W), Y),
    "a head, no teacher": lambda: KDLoss(soft_weight=0.0)(Head(HIDDEN, W), None, Y),
    "both terms of liger": lambda: liger.LigerFusedLinearJSDLoss()(HIDDEN, W, TEACHER, W, Y),
    "automodel, a count of 0": lambda: automodel.KDLoss()(S, T, Y, 0),
}


def check(function: Any, *arguments: Any) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), function(*arguments))


@pytest.mark.parametrize("name", CALLS)
def test_losses(name: str) -> None:
    check(CALLS[name])


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(name: str) -> None:
    check(ADAPTERS[name], S, T, Y)
