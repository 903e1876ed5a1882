"""Liger's kernels, weighted 0.5 each, with the T² that its divergences leave out.

Where it has them, its cross-entropies are the hard half. On logits that writes its gradient over
them in the forward, so it goes last.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cases import HEADS, LOGITS, Case
from .base import Entrant, Loss, cannot_import, needs_gpu, only

#: Its JSDs are the forward KL at beta 0 and the reverse one at beta 1.
BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}
#: Rows of a chunk, by default; it may be up to one row less than twice as large.
CHUNK_ROWS = 1024


def _logits(case: Case) -> Loss:
    """They take log-probabilities or, for "tvd", probabilities: torch's softmaxes before them."""
    from liger_kernel.transformers.cross_entropy import LigerCrossEntropyLoss
    from liger_kernel.transformers.jsd import LigerJSD
    from liger_kernel.transformers.kl_div import LigerKLDIVLoss
    from liger_kernel.transformers.tvd import LigerTVDLoss

    divergence = {
        "forward_kl": lambda: LigerKLDIVLoss(reduction="batchmean", log_target=True),
        "reverse_kl": lambda: LigerJSD(beta=1.0),
        "jsd": lambda: LigerJSD(beta=0.5),
        "tvd": lambda: LigerTVDLoss(),
    }[case.divergence]()
    soften = F.softmax if case.divergence == "tvd" else F.log_softmax
    cross_entropy, temperature = LigerCrossEntropyLoss(), case.temperature

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        p, q = (soften(x.float() / temperature, -1) for x in (student, teacher))
        soft: Tensor = divergence(p, q)
        hard: Tensor = cross_entropy(student, labels)
        return 0.5 * hard + 0.5 * temperature**2 * soft

    return loss


def _fused_tvd(case: Case) -> Loss:
    """Both terms of a row in one kernel, so at one temperature."""
    from liger_kernel.transformers.fused_ce_tvd import LigerFusedCETVDLoss

    both = LigerFusedCETVDLoss()

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        hard, soft = both(student, teacher, labels)
        result: Tensor = (0.5 * hard + 0.5 * soft).mean()
        return result

    return loss


def _at_one(case: Case) -> dict[str, Any]:
    return {"temperature": 1.0, "divergence": case.divergence}


def _chunked(compiled: bool, case: Case) -> Loss:
    """Softened softmaxes and the weight's gradient are in the dtype of the inputs."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss: Loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.5,
        weight_soft_loss=0.5 * case.temperature**2,
        beta=BETA[case.divergence],
        temperature=case.temperature,
        compiled=compiled,
    )
    return loss


def _fused_jsd(case: Case) -> Loss:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    divergence = LigerFusedLinearJSD(BETA[case.divergence], temperature=case.temperature)
    return _with_cross_entropy(divergence, case)


def _fused_kl(case: Case) -> Loss:
    """It takes the teacher's probabilities: torch's softmax of whole logits before it."""
    from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss

    temperature = case.temperature
    divergence = LigerFusedLinearKLDivLoss(temperature=temperature)

    def soft(hidden: Tensor, weight: Tensor, teacher: Tensor, head: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            target = F.softmax(F.linear(teacher, head).float() / temperature, -1)
        result: Tensor = divergence(hidden, weight, target, y)
        return result

    return _with_cross_entropy(soft, case)


def _with_cross_entropy(soft: Loss, case: Case) -> Loss:
    """Add its cross-entropy from hidden states, which also works in chunks."""
    from liger_kernel.transformers.fused_linear_cross_entropy import (
        LigerFusedLinearCrossEntropyLoss,
    )

    cross_entropy, factor = LigerFusedLinearCrossEntropyLoss(), case.temperature**2

    def loss(*tensors: Tensor) -> Tensor:
        hidden, weight, _, _, labels = tensors
        hard: Tensor = cross_entropy(weight, hidden, labels)
        return 0.5 * hard + 0.5 * factor * soft(*tensors)

    return loss


def _triton(module: str, *divergences: str) -> Callable[[Case], str | None]:
    def why_not(case: Case) -> str | None:
        found = only(case, *divergences) or needs_gpu(case)
        return found or cannot_import(f"liger_kernel.transformers.{module}")

    return why_not


def _chunked_why_not(case: Case) -> str | None:
    return only(case, *BETA) or cannot_import("liger_kernel.chunked_loss")


ENTRANTS = [
    Entrant("liger", "Liger", LOGITS, _logits, _triton("cross_entropy", *BETA, "tvd"),
            "liger-kernel", matrices=7),
    Entrant("liger-ce-tvd", "Liger fused CE + TVD", LOGITS, _fused_tvd,
            _triton("fused_ce_tvd", "tvd"), "liger-kernel", computes=_at_one,
            nearest="the same at temperature 1", matrices=1),
    Entrant("liger-chunked", "Liger chunked", HEADS, partial(_chunked, False), _chunked_why_not,
            "liger-kernel", most_rows=2 * CHUNK_ROWS - 1, matrices=10),
    Entrant("liger-chunked-compiled", "Liger chunked, compiled", HEADS, partial(_chunked, True),
            _chunked_why_not, "liger-kernel", compiles=True, most_rows=2 * CHUNK_ROWS - 1,
            matrices=4.5),
    Entrant("liger-fused-jsd", "Liger fused linear JSD", HEADS, _fused_jsd,
            _triton("fused_linear_jsd", *BETA), "liger-kernel", most_rows=2048, matrices=9),
    Entrant("liger-fused-kl", "Liger fused linear KL", HEADS, _fused_kl,
            _triton("fused_linear_kl_div", "forward_kl"), "liger-kernel", matrices=4),
]  # fmt: skip
