"""Every loss, ours and the adapters', traces without a break: ``fullgraph=True`` equals eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fused_kd import Head, KDLoss, kd_loss
from fused_kd.integrations import automodel, axolotl, liger, model_optimizer

N, V, H = 6, 11, 5
DRAW = torch.Generator().manual_seed(0)
S, T = (torch.randn(N, V, generator=DRAW) for _ in range(2))
HIDDEN, TEACHER, W = (torch.randn(n, H, generator=DRAW) for n in (N, N, V))
Y = torch.arange(N)
TOP = (Y.view(1, N, 1), T.log_softmax(-1)[:, :1].view(1, N, 1), torch.ones(1, N, 1))


def assigned(module: KDLoss) -> Any:
    """Set an option inside the trace."""
    module.temperature = 3.0
    return module(S, T, Y)


CALLS: dict[str, Callable[[], Any]] = {
    "KDLoss made in the trace": lambda: KDLoss(temperature=2.0)(S, T, Y),
    "an option read": lambda: kd_loss(S, T, Y, temperature=KDLoss(temperature=2.0).temperature),
    "an option assigned": lambda: assigned(KDLoss()),
    "no teacher": lambda: kd_loss(S, None, Y, soft_weight=0.0, label_smoothing=0.1),
    "heads made in the trace": lambda: KDLoss()(Head(HIDDEN, W), Head(TEACHER, W), Y),
    "a head, no teacher": lambda: KDLoss(soft_weight=0.0)(Head(HIDDEN, W), None, Y),
}
ADAPTERS: list[tuple[Any, tuple[Any, ...]]] = [
    (automodel.KDLoss(), (S, T, Y, 0)),
    (axolotl.ChunkedTopKKDLoss(2), (S[None], *TOP)),
    (liger.LigerJSD(), (S, T.log_softmax(-1), Y)),
    (liger.LigerKLDIVLoss(), (S, T.softmax(-1))),
    (liger.LigerFusedLinearJSD(), (HIDDEN, W, TEACHER, W, Y)),
    (liger.LigerFusedLinearJSDLoss(), (HIDDEN, W, TEACHER, W, Y)),
    (liger.LigerFusedCETVDLoss(), (S, T, Y)),
    (model_optimizer.LogitsDistillationLoss(), (S, T)),
]


def check(function: Any, *arguments: Any) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), function(*arguments))


@pytest.mark.parametrize("name", CALLS)
def test_losses(name: str) -> None:
    check(CALLS[name])


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda a: type(a[0]).__name__)
def test_adapters(adapter: tuple[Any, tuple[Any, ...]]) -> None:
    loss, arguments = adapter
    check(loss, *arguments)
