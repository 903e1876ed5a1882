"""The distillation losses of ``liger_kernel.transformers.functional``.

Each function calls the class of :mod:`fused_kd.integrations.liger` with its name, and has the order
of arguments and the defaults of Liger's function. It raises what that class and its forward raise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._common.arguments import named
from .dense import LigerJSD, LigerKLDIVLoss
from .linear import LigerFusedLinearJSD, LigerFusedLinearKLDivLoss


@named(log_q="input", log_p="target")
def liger_jsd(
    input: Tensor,
    target: Tensor,
    shift_labels: Tensor | None = None,
    beta: float = 0.5,
    ignore_index: int = -100,
) -> Tensor:
    """Return :class:`LigerJSD` of log-probabilities (..., V); `input` is the student's.

    Only the student gets a gradient: `target` must not require grad.
    """
    loss: Tensor = LigerJSD(beta, ignore_index)(input, target, shift_labels)
    return loss


@named(y_pred="input", y_true="target")
def liger_kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool = True,
    reduce: bool = True,
    reduction: str = "mean",
    log_target: bool = False,
    eps: float = 1e-10,
) -> Tensor:
    """Return :class:`LigerKLDIVLoss` of the student's log-probabilities, `input` (..., V).

    `target` are the teacher's probabilities, or with `log_target` their logarithms. `size_average`,
    `reduce` and `eps` have no effect.
    """
    loss: Tensor = LigerKLDIVLoss(eps, reduction=reduction, log_target=log_target)(input, target)
    return loss


def liger_fused_linear_jsd(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    shift_labels: Tensor | None = None,
    jsd_beta: float = 0.5,
    ignore_index: int = -100,
    temperature: float = 1.0,
    accum_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return :class:`LigerFusedLinearJSD` of hidden states (..., H) and weights (V, H)."""
    loss: Tensor = LigerFusedLinearJSD(jsd_beta, ignore_index, temperature, accum_dtype)(
        student_input, student_weight, teacher_input, teacher_weight, shift_labels
    )
    return loss


def liger_fused_linear_kl_div(
    student_input: Tensor,
    student_weight: Tensor,
    target: Tensor,
    shift_labels: Tensor | None = None,
    reduction: str = "batchmean",
    ignore_index: int = -100,
    temperature: float = 1.0,
    eps: float = 1e-10,
    accum_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return :class:`LigerFusedLinearKLDivLoss` of hidden states (..., H) and a weight (V, H).

    `target` (..., V) are the teacher's probabilities.
    """
    kind = LigerFusedLinearKLDivLoss(reduction, ignore_index, temperature, eps, accum_dtype)
    loss: Tensor = kind(student_input, student_weight, target, shift_labels)
    return loss
