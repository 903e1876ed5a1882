"""Liger's kernels, weighted 0.5 each, with the T² that its divergences leave out.

If it has them, its cross-entropies are the hard half. On logits its cross-entropy writes its
gradient over them in the forward, so it goes last.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cases import HEADS, LOGITS, Case
from .base import Loss, Method, needs

#: Its JSDs are the forward KL at beta 0 and the reverse one at beta 1.
BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}
#: A chunk has 1024 rows by default; it may be up to one row less than twice as large.
MOST_ROWS = 2 * 1024 - 1


def _logits(case: Case) -> Loss:
    """Return its losses of log-probabilities ("tvd": probabilities), after torch's softmax."""
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
    cross_entropy, t = LigerCrossEntropyLoss(), case.temperature

    def loss(student, teacher, labels):
        soft = divergence(*(soften(x.float() / t, -1) for x in (student, teacher)))
        return 0.5 * cross_entropy(student, labels) + 0.5 * t**2 * soft

    return loss


def _fused_tvd(case: Case) -> Loss:
    """Return both terms of a row in one kernel, so at one temperature."""
    from liger_kernel.transformers.fused_ce_tvd import LigerFusedCETVDLoss

    both = LigerFusedCETVDLoss()
    return lambda *logits_and_labels: 0.5 * sum(both(*logits_and_labels)).mean()


def _chunked(case: Case, compiled: bool) -> Loss:
    """Return its loss whose softened softmaxes and weight gradient are in the inputs' dtype."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    t = case.temperature
    return LigerFusedLinearJSDLoss(
        0.5, 0.5 * t**2, BETA[case.divergence], temperature=t, compiled=compiled
    )


def _fused_jsd(case: Case) -> Loss:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    divergence = LigerFusedLinearJSD(BETA[case.divergence], temperature=case.temperature)
    return _with_cross_entropy(divergence, case)


def _fused_kl(case: Case) -> Loss:
    """Return its KL of the teacher's probabilities: torch's softmax of whole logits before it."""
    from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss

    divergence = LigerFusedLinearKLDivLoss(temperature=case.temperature)

    def soft(hidden, weight, teacher, head, labels):
        with torch.no_grad():
            target = F.softmax(F.linear(teacher, head).float() / case.temperature, -1)
        return divergence(hidden, weight, target, labels)

    return _with_cross_entropy(soft, case)


def _with_cross_entropy(soft: Loss, case: Case) -> Loss:
    """Add its cross-entropy from hidden states, which also works in chunks."""
    from liger_kernel.transformers.fused_linear_cross_entropy import (
        LigerFusedLinearCrossEntropyLoss,
    )

    cross_entropy, factor = LigerFusedLinearCrossEntropyLoss(), case.temperature**2

    def loss(*tensors: Tensor) -> Tensor:
        hidden, weight, _, _, labels = tensors
        return 0.5 * cross_entropy(weight, hidden, labels) + 0.5 * factor * soft(*tensors)

    return loss


def _triton(module: str, *divergences: str) -> Callable[[Case], str | None]:
    return needs(f"liger_kernel.transformers.{module}", *divergences, gpu=True)


_TVD, _JSD = _triton("fused_ce_tvd", "tvd"), _triton("fused_linear_jsd", *BETA)
_KL = _triton("fused_linear_kl_div", "forward_kl")
_CHUNKS = {"why_not": needs("liger_kernel.chunked_loss", *BETA), "most_rows": MOST_ROWS}
_AT_ONE = {
    "computes": lambda case: {"temperature": 1.0, "divergence": case.divergence},
    "nearest": "the same at temperature 1",
}
_eager, _compiled = partial(_chunked, compiled=False), partial(_chunked, compiled=True)
_on_logits = partial(Method, level=LOGITS, package="liger-kernel")
_on_heads = partial(Method, level=HEADS, package="liger-kernel")
METHODS = [
    _on_logits(
        "liger", "Liger", build=_logits, why_not=_triton("cross_entropy", *BETA, "tvd"), matrices=7
    ),
    _on_logits(
        "liger-ce-tvd",
        "Liger fused CE + TVD",
        build=_fused_tvd,
        why_not=_TVD,
        matrices=1,
        **_AT_ONE,
    ),
    _on_heads("liger-chunked", "Liger chunked", build=_eager, matrices=10, **_CHUNKS),
    _on_heads(
        "liger-chunked-compiled",
        "Liger chunked, compiled",
        build=_compiled,
        compiles=True,
        matrices=4.5,
        **_CHUNKS,
    ),
    _on_heads(
        "liger-fused-jsd", "Liger fused linear JSD", build=_fused_jsd, why_not=_JSD, most_rows=2048
    ),
    _on_heads("liger-fused-kl", "Liger fused linear KL", build=_fused_kl, why_not=_KL, matrices=4),
]
