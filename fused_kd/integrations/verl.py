"""verl's loss of a top-k teacher (``loss_mode: forward_kl_topk`` of its distillation).

verl sums q·log(q/p) over the K tokens that it has of the teacher, and leaves the others out. That
is no divergence: it is negative where the student gives these tokens more than the teacher does.
With Q = Σ q over the K tokens, it is Q times the divergence of :class:`fused_kd.TopK` with
``tail="zero"``, plus Q·log Q, which has no gradient. So it teaches what "zero" does, with less
weight for rows whose Q is small. ``KDLoss.like("verl")`` with
:func:`fused_kd.teachers.servers.from_verl` is "zero" itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..functional import kd_loss
from ..teachers.servers import from_verl
from ._common.arguments import named
from ._common.parts import as_tensor

#: Our names → verl's.
_NAMES = {"teacher.logprobs": "teacher_topk_log_probs", "teacher.token_ids": "teacher_topk_ids"}


@named(**_NAMES, teacher_logprobs="teacher_topk_log_probs", teacher_ids="teacher_topk_ids")
def forward_kl_topk(
    student_logits: Tensor,  # (B, S, V)
    teacher_topk_log_probs: Tensor,  # (B, S, K)
    teacher_topk_ids: Tensor,  # (B, S, K)
    attention_mask: Tensor | None = None,  # (B, S)
    **options: Any,
) -> Tensor:
    """Return Σ q (log q - log p) over the K entries of each row, verl's ``distillation_losses``.

    verl clamps all log-probabilities to its ``log_prob_min_clamp`` (-10 by default), and then the
    loss of each token to at least 0; both stop gradients, and neither is done here. verl divides
    the student's logits by the temperature before: pass what it passes.

    Args:
        student_logits: (B, S, V); or (1, N, V) for nested teacher tensors, as verl packs them.
        teacher_topk_log_probs: (B, S, K), or nested: verl's ``teacher_logprobs``, with its rows of
            0.0, which count as rows without entries.
        teacher_topk_ids: the same shape, int32 or int64: ``teacher_ids``.
        attention_mask: as in :func:`fused_kd.teachers.servers.from_verl`; needed for K = 1.
        options: of :func:`fused_kd.kd_loss`: `backend`.

    Returns:
        (B, S), float32 (float64 for float64 logits); 0 for a row without entries.

    Raises:
        TypeError: As :func:`fused_kd.kd_loss` and from_verl.
        ValueError: The same.
    """
    teacher = from_verl(teacher_topk_ids, teacher_topk_log_probs, attention_mask, tail="zero")
    mass = teacher.logprobs.exp().sum(-1)
    divergence = kd_loss(
        student_logits,
        teacher,
        hard_weight=0.0,
        soft_weight=1.0,
        token_weight=mass,
        reduction="none",
        **options,
    )
    return as_tensor(divergence) + torch.xlogy(mass, mass)
