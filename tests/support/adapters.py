"""The adapters that need no framework, each as a loss of logits and labels without a hard term."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fused_kd.integrations import automodel, axolotl, liger, model_optimizer

T = 2.0
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of student (N, V), teacher and labels (N,)


def _under_identity(fused_linear: nn.Module) -> Loss:
    """Return a loss of logits, which a fused linear loss multiplies by the identity matrix."""

    def of_logits(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
        head = torch.eye(s.shape[-1], dtype=s.dtype)
        return fused_linear(s, head, t, head, y)  # type: ignore[no-any-return]

    return of_logits


def _kl_under_identity(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    loss = liger.LigerFusedLinearKLDivLoss(temperature=T)
    return loss(s, torch.eye(s.shape[-1], dtype=s.dtype), (t / T).softmax(-1), y)  # type: ignore[no-any-return]


def _axolotl(loss: Any) -> Loss:
    """Return a loss of logits: the sum over the kept rows, with all V entries as the top k."""

    def of_logits(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
        logs = t.log_softmax(-1)[None].float()
        ids = torch.arange(s.shape[-1]).expand_as(logs)
        mask = (y != -100)[None, :, None].expand_as(logs)
        return loss(s[None], ids, logs, mask, num_items_in_batch=1)  # type: ignore[no-any-return]

    return of_logits


_MFT = model_optimizer.MFTLoss(T, 0.0)
_ONLY_SOFT: Any = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "temperature": T}
#: Adapters that skip the rows whose label is -100.
LABELLED: dict[str, Loss] = {
    "liger fused linear jsd loss": _under_identity(liger.LigerFusedLinearJSDLoss(**_ONLY_SOFT)),
    "liger fused linear jsd": _under_identity(liger.LigerFusedLinearJSD(temperature=T)),
    "liger fused linear kl": _kl_under_identity,
    "liger jsd": lambda s, t, y: liger.LigerJSD()(s.log_softmax(-1), t.log_softmax(-1), y),
    "liger ce and tvd": lambda s, t, y: liger.LigerFusedCETVDLoss()(s, t, y)[1].sum(),
    "automodel": automodel.KDLoss(temperature=T),
    "axolotl": _axolotl(axolotl.loss),
    "axolotl, chunks": _axolotl(axolotl.ChunkedTopKKDLoss(2)),
}
ADAPTERS: dict[str, Loss] = {
    **LABELLED,
    "liger kl": lambda s, t, y: liger.LigerKLDIVLoss()(s.log_softmax(-1), t.softmax(-1)),
    "liger kl of log-probabilities": lambda s, t, y: liger.LigerKLDIVLoss(log_target=True)(
        s.log_softmax(-1), t.log_softmax(-1)
    ),
    "model optimizer": lambda s, t, y: model_optimizer.LogitsDistillationLoss(T)(s, t),
    "model optimizer, mft": lambda s, t, y: _MFT(s, t, s.argmax(-1)),
}
