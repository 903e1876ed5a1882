"""Liger's losses from hidden states and heads; logits are computed chunk by chunk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import Head, KDLoss
from ...checks import check_dense
from .._common.arguments import check_target, named
from .._common.probabilities import check_reduction, kl_from
from .options import FORWARD_KL, SOFT_ALONE, Shown, check_beta, mask

#: Our names → Liger's, for each class.
_PARTS = {"": "_weight", ".hidden": "_input", ".weight": "_weight", ".bias": "_bias"}
_INPUTS = {side + a: side + b for side in ("student", "teacher") for a, b in _PARTS.items()}
_JSD_AND_CE = {
    **_INPUTS,
    "labels": "true_labels",
    "hard_weight": "weight_hard_loss",
    "soft_weight": "weight_soft_loss",
}
_JSD = {**_INPUTS, "labels": "shift_labels", "beta": "jsd_beta"}
_KL = {**_INPUTS, "teacher": "target", "labels": "shift_labels"}


class LigerFusedLinearJSDLoss(Shown):
    """``weight_hard_loss`` · cross-entropy + ``weight_soft_loss`` · JSD(β), from hidden states.

    It computes ``KDLoss.like("liger", ...)``; `beta` = 0 and 1 are forward and reverse KL.

    Args:
        weight_hard_loss: weight of the cross-entropy, which is at temperature 1.
        weight_soft_loss: weight of the divergence, which is not multiplied by T².
        beta: the teacher's weight, in [0, 1].
        ignore_index: rows with this label do not count.
        temperature: T of the divergence.
        compiled: no effect.
        chunk_size: the largest number of rows of a chunk.
        return_soft_hard_loss: return (loss, soft, hard), the last two without gradient. A part
            whose weight is 0 needs a second forward pass.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is outside its range.
    """

    @named(**_JSD_AND_CE)
    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__()
        self.weight_hard_loss = weight_hard_loss
        self.weight_soft_loss = weight_soft_loss
        self.beta = beta
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.compiled = compiled
        self.chunk_size = chunk_size
        self.return_soft_hard_loss = return_soft_hard_loss
        self._loss(weight_hard_loss, weight_soft_loss)  # refuses what is out of range

    def _loss(self, hard_weight: float, soft_weight: float) -> KDLoss:
        """Return the KDLoss of the current attributes with these weights; raises as the class."""
        if not isinstance(self.chunk_size, int) or self.chunk_size < 1:
            raise ValueError(f"chunk_size must be an int of at least 1; got {self.chunk_size!r}")
        check_beta(self.beta)
        return KDLoss.like(
            "liger",
            hard_weight=hard_weight,
            soft_weight=soft_weight,
            beta=self.beta,
            ignore_index=self.ignore_index,
            temperature=self.temperature,
            chunk_rows=self.chunk_size,
            return_parts=self.return_soft_hard_loss,
        )

    @named(**_JSD_AND_CE)
    def forward(
        self,
        student_input: Tensor,  # (..., H_s)
        student_weight: Tensor,  # (V, H_s)
        teacher_input: Tensor,  # (..., H_t)
        teacher_weight: Tensor,  # (V, H_t)
        true_labels: Tensor,  # (...)
        student_bias: Tensor | None = None,  # (V,)
        teacher_bias: Tensor | None = None,  # (V,)
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Return the mean over the rows that count, 0-d; raises as :func:`fused_kd.kd_loss`.

        With `return_soft_hard_loss`, the result is (loss, soft, hard): soft and hard are the means,
        0-d, before they are multiplied by their weights. Without it, if `weight_hard_loss` is 0,
        the labels only say which rows count.
        """
        check_dense("teacher_input", teacher_input)
        check_dense("teacher_weight", teacher_weight)
        labels: Tensor | None = true_labels
        if self.weight_hard_loss == 0:
            labels = mask(true_labels, self.ignore_index)
        student = Head(student_input, student_weight, student_bias)
        teacher = Head(teacher_input, teacher_weight, teacher_bias)
        result = self._loss(self.weight_hard_loss, self.weight_soft_loss)(student, teacher, labels)
        if isinstance(result, Tensor):
            return result
        loss, hard, soft = result
        if 0 in (self.weight_hard_loss, self.weight_soft_loss):
            with torch.no_grad():  # a term of weight 0 was not computed
                _, hard, soft = self._loss(1.0, 1.0)(student, teacher, true_labels)
        return loss, soft, hard


class LigerFusedLinearJSD(Shown):
    """JSD(β) alone, from hidden states; `jsd_beta` = 0 and 1 are forward and reverse KL.

    Args:
        jsd_beta: the teacher's weight, in [0, 1].
        ignore_index: rows with this label do not count.
        temperature: softens both sides; nothing is multiplied by T².
        accum_dtype: dtype in which the chunks' weight gradients are added: float32 (None) or that
            of the student's weight; a call raises ValueError for another one.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is outside its range.
    """

    @named(**_JSD)
    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.jsd_beta = jsd_beta
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.accum_dtype = accum_dtype
        self._loss()  # refuses what is out of range

    def _loss(self) -> KDLoss:
        """Return the KDLoss of the current attributes; raises as the class."""
        check_beta(self.jsd_beta)
        return KDLoss.like(
            "liger",
            **SOFT_ALONE,
            beta=self.jsd_beta,
            ignore_index=self.ignore_index,
            temperature=self.temperature,
            grad_accum_dtype=_accumulation(self.accum_dtype),
        )

    @named(**_JSD)
    def forward(
        self,
        student_input: Tensor,  # (..., H_s)
        student_weight: Tensor,  # (V, H_s)
        teacher_input: Tensor,  # (..., H_t)
        teacher_weight: Tensor,  # (V, H_t)
        shift_labels: Tensor | None,  # (...); only says which rows count
    ) -> Tensor:
        """Return the mean over the rows that count, 0-d; raises as :func:`fused_kd.kd_loss`."""
        check_dense("student_weight", student_weight)
        check_dense("teacher_input", teacher_input)
        check_dense("teacher_weight", teacher_weight)
        _accumulation(self.accum_dtype, student_weight)  # refuses one that does not fit
        student, teacher = Head(student_input, student_weight), Head(teacher_input, teacher_weight)
        loss: Tensor = self._loss()(student, teacher, mask(shift_labels, self.ignore_index))
        return loss


class LigerFusedLinearKLDivLoss(Shown):
    """KL(target ‖ softmax(student / T)) from hidden states, against explicit probabilities.

    Rows of the target need not sum to 1, but must not be negative. Their logarithm is the only
    tensor (N, V) allocated, in float32. If you have the teacher's logits or log-probabilities,
    ``KDLoss(...)(Head(hidden, weight), teacher_logits)`` does not need that tensor.

    Args:
        reduction: "batchmean" divides by the number of rows that count, "mean" by V times that,
            "sum" by nothing.
        ignore_index: rows with this label do not count.
        temperature: softens the student only.
        eps: no effect.
        accum_dtype: see :class:`LigerFusedLinearJSD`.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is outside its range.
    """

    @named(**_KL)
    def __init__(
        self,
        reduction: str = "batchmean",
        ignore_index: int = -100,
        temperature: float = 1.0,
        eps: float = 1e-10,
        accum_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.eps = eps
        self.accum_dtype = accum_dtype
        self._loss()  # refuses what is out of range

    def _loss(self) -> KDLoss:
        """Return the KDLoss of the current attributes; raises as the class."""
        return KDLoss(
            **FORWARD_KL,
            ignore_index=self.ignore_index,
            temperature=self.temperature,
            grad_accum_dtype=_accumulation(self.accum_dtype),
        )

    @named(**_KL)
    def forward(
        self,
        student_input: Tensor,  # (..., H)
        student_weight: Tensor,  # (V, H)
        target: Tensor,  # (..., V), probabilities
        shift_labels: Tensor | None = None,  # (...); only says which rows count
    ) -> Tensor:
        """Return the reduced divergence, 0-d; raises as :func:`fused_kd.kd_loss`."""
        check_dense("student_input", student_input)
        check_dense("student_weight", student_weight)
        _accumulation(self.accum_dtype, student_weight)  # refuses one that does not fit
        check_target("target", target, (*student_input.shape[:-1], student_weight.shape[0]))
        labels = mask(shift_labels, self.ignore_index)

        def loss(logs: Tensor, **weights: Any) -> Tensor:
            """Return the divergence from log-probabilities, which are overwritten."""
            logs = logs.mul_(self.temperature)  # the target is not softened: the loss divides again
            student = Head(student_input, student_weight)
            divergence: Tensor = self._loss()(student, logs, labels, **weights)
            return divergence

        kept = None if labels is None else labels != self.ignore_index
        return kl_from(target, kept, self.reduction, loss, "target")


def _accumulation(dtype: object, weight: Tensor | None = None) -> torch.dtype | None:
    """Return an accum_dtype, which must be None, float32 or the dtype of `weight`.

    Raises:
        TypeError: `dtype` is neither None nor a torch.dtype.
        ValueError: There is a `weight`, and `dtype` is neither float32 nor the weight's dtype.
    """
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"accum_dtype must be None or a torch.dtype; got {dtype!r}")
    if weight is not None and dtype not in (None, torch.float32, weight.dtype):
        raise ValueError(
            "accum_dtype must be None, torch.float32 or the dtype of student_weight, "
            f"{weight.dtype}; got {dtype}"
        )
    return dtype
