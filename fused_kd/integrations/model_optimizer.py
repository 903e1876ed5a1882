"""NVIDIA Model Optimizer: its losses on logits, for ``KDLossConfig.criterion``.

::

    loss = LogitsDistillationLoss(temperature=2.0)  # from here instead of modelopt.torch.distill
    config = {"teacher_model": teacher, "criterion": {("lm_head", "lm_head"): loss}}
    model = mtd.convert(student, mode=[("kd_loss", config)])

Names, keywords and numbers are modelopt's. It accepts any ``_Loss``, and need not be installed.
The losses are float32, or float64 for float64 logits. The teacher gets no gradient.
"""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor
from torch.nn.modules.loss import _Loss

from ..checks import check_call, check_dense
from ..modules import KDLoss
from ..options import KDOptions
from ..rows import labels_and_kept
from ..sides import arithmetic_dtype
from ._common.arguments import named
from ._common.labels import in_rows_of
from ._common.parts import as_tensor
from ._common.probabilities import blocks, check_reduction, denominator

#: Our names → modelopt's.
_NAMES = {"student": "logits_s", "teacher": "logits_t"}
#: Options with which labels need not be given.
_SOFT_ALONE = KDOptions(hard_weight=0.0, soft_weight=1.0)
#: Added by modelopt to a denominator of MFTLoss.
TINY = 1e-7


class LogitsDistillationLoss(_Loss):
    """T²·KL(teacher ‖ student) of N rows of V logits, both softened by T.

    Args:
        temperature: T.
        reduction: "mean" divides the sum over the rows by N·V, "batchmean" by the first dimension,
            "sum" by nothing; "none" returns the loss of every row.
        inplace: write the gradient over the student's logits, see :func:`fused_kd.kd_loss`.
        backend: as in :func:`fused_kd.kd_loss`.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is outside its range.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        reduction: str = "mean",
        *,
        inplace: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(reduction=reduction)
        self.temperature = temperature
        self.inplace = inplace
        self.backend = backend
        self._loss()  # refuses what is out of range

    def _loss(self) -> KDLoss:
        """Return the KDLoss of the current attributes; raises as the class."""
        if self.reduction != "none":
            check_reduction(self.reduction)
        return KDLoss.like(
            "model_optimizer",
            temperature=self.temperature,
            reduction="none" if self.reduction == "none" else "mean",
            inplace=self.inplace,
            backend=self.backend,
        )

    @named(**_NAMES)
    def forward(
        self,
        logits_s: Tensor,  # (..., V)
        logits_t: Tensor,  # (..., V)
    ) -> Tensor:
        """Return the loss, 0-d, or (...) for "none"; raises as :func:`fused_kd.kd_loss`.

        The teacher's logits may require grad: they are detached.
        """
        logits_t = _checked(logits_s, logits_t)
        num_items = None
        if self.reduction != "none":
            first, vocabulary = logits_s.shape[0], logits_s.shape[-1]
            rows = first if self.reduction == "batchmean" else logits_s[..., 0].numel()
            num_items = denominator(self.reduction, rows, None, vocabulary)
        return as_tensor(self._loss()(logits_s, logits_t, num_items=num_items))

    def extra_repr(self) -> str:
        """Return the constructor's arguments, for repr()."""
        names = ("temperature", "reduction", "inplace", "backend")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


class MFTLoss(_Loss):
    """T²·KL(corrected teacher ‖ student): minifinetuning, which moves the teacher to the label.

    The target is (1-m)·q + m·[label]. Its m raises the label to `threshold` above the largest other
    probability; a label that is the teacher's largest is raised by `threshold`, to at most 1. All
    entries but the label's keep their ratios, so the target is a softmax of logits that differ
    from the teacher's in one entry of each row. These logits are a copy in float32, or float64.

    Args:
        temperature: T.
        threshold: a probability, in [0, 1].
        reduction: "batchmean" divides the sum by the number of rows that count, "mean" by V times
            that, "sum" by nothing. "none", in modelopt (N, V), is refused.
        inplace: write the gradient over the student's logits, see :func:`fused_kd.kd_loss`.
        backend: as in :func:`fused_kd.kd_loss`.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is outside its range.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        threshold: float = 0.2,
        reduction: str = "batchmean",
        *,
        inplace: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(reduction=reduction)
        check_reduction(reduction)
        if not isinstance(threshold, (int, float, Real)):
            raise TypeError(f"threshold must be a Python number; got {type(threshold).__name__}")
        if not 0.0 <= threshold <= 1.0:
            raise ValueError(f"threshold must be in [0, 1]; got {threshold}")
        self.threshold = threshold
        self.loss = KDLoss.like(
            "model_optimizer",
            temperature=temperature,
            reduction="mean",
            inplace=inplace,
            backend=backend,
        )

    @named(**_NAMES)
    def forward(
        self,
        logits_s: Tensor,  # (..., V)
        logits_t: Tensor,  # (..., V)
        labels: Tensor,  # (N,), or (...)
    ) -> Tensor:
        """Return the loss, 0-d; rows of label -100 do not count. Raises as fused_kd.kd_loss.

        The teacher's logits may require grad: they are detached.
        """
        check_dense("logits_s", logits_s)
        check_dense("labels", labels)
        targets, kept = labels_and_kept(in_rows_of(logits_s, labels), self.loss.options)
        logits_t = _checked(logits_s, logits_t, targets, kept)
        assert kept is not None
        corrected = self._corrected(logits_t, torch.where(kept, targets, 0))
        num_items = denominator(self.reduction, 0, kept, logits_s.shape[-1])
        return as_tensor(self.loss(logits_s, corrected, targets, num_items=num_items))

    @torch.no_grad()
    def _corrected(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return new logits whose softmax at T is the target; `labels` (...) in [0, V)."""
        temperature = self.loss.options.temperature
        corrected = logits.new_empty(logits.shape, dtype=arithmetic_dtype(logits)).copy_(logits)
        all_rows, labels = corrected.view(-1, logits.shape[-1]), labels.reshape(-1, 1)
        for rows, label in blocks(all_rows, labels):
            softened = rows / temperature
            log_sum = softened.logsumexp(-1, keepdim=True)
            top, which = softened.max(-1, keepdim=True)
            p_top = (top - log_sum).exp()
            p_label = (softened.gather(-1, label) - log_sum).exp()
            odds = self._odds(p_top, p_label, which == label)
            rows.scatter_(-1, label, temperature * (log_sum + (p_label + odds).log()))
        return corrected

    def _odds(self, p_top: Tensor, p_label: Tensor, is_right: Tensor) -> Tensor:
        """Return m/(1-m) by modelopt's formula of m, without the rounding of an m near 1.

        `p_top` is the teacher's largest probability at T, `p_label` the label's, `is_right` whether
        they are the same entry.
        """
        wrong = (p_top - p_label + self.threshold) / (1 - self.threshold + TINY)
        capped = torch.where(p_label > 1 - self.threshold, 1, p_label + self.threshold)
        return torch.where(is_right, (capped - p_top) / (1 - capped + TINY), wrong)

    def extra_repr(self) -> str:
        """Return threshold and reduction, which the repr() of the inner loss does not have."""
        return f"threshold={self.threshold!r}, reduction={self.reduction!r}"


def _checked(
    logits_s: Tensor, logits_t: Tensor, labels: Tensor | None = None, kept: Tensor | None = None
) -> Tensor:
    """Check the tensors; return the teacher's logits detached. Raises as fused_kd.kd_loss."""
    check_dense("logits_s", logits_s)
    check_dense("logits_t", logits_t)
    logits_t = logits_t.detach()
    check_call(_SOFT_ALONE, logits_s, logits_t, labels, kept, None, None, None)
    return logits_t
