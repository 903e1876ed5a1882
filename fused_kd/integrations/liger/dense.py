"""Liger's losses from logits, log-probabilities or probabilities of the whole vocabulary."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from ... import KDLoss
from ...checks import check_dense
from ..arguments import check_target, named
from ..probabilities import check_reduction, denominator, kl_from, kl_of_mass, mass_of
from .options import FORWARD_KL, SOFT_ALONE, Shown, check_beta, mask


class LigerJSD(Shown):
    """JSD(β) of log-probabilities; `beta` = 0 and 1 are forward and reverse KL.

    The log-softmax of log-probabilities is they themselves, so they are taken as logits. The
    gradient by `log_q` is the one by logits. Liger's takes `log_q` for a free variable and differs
    by a multiple of softmax in each row, which the backward of the log_softmax in front removes:
    behind that, both are the same. Log-probabilities of either side that do not sum to 1 are
    normalised, since they are taken as logits.

    Args:
        beta: the teacher's weight, in [0, 1].
        ignore_index: rows with this label do not count.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value outside its range.
    """

    def __init__(self, beta: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__()
        self.beta = beta
        self.ignore_index = ignore_index
        self._loss()  # refuses what is out of range

    def _loss(self) -> KDLoss:
        check_beta(self.beta)
        return KDLoss.like("liger", **SOFT_ALONE, beta=self.beta, ignore_index=self.ignore_index)

    @named(student_logits="log_q", teacher_logits="log_p", labels="shift_labels")
    def forward(
        self,
        log_q: Tensor,  # (..., V), the student's
        log_p: Tensor,  # (..., V), the teacher's
        shift_labels: Tensor | None = None,  # (...); only says which rows count
    ) -> Tensor:
        """Return the mean over the rows that count; raises as :func:`fused_kd.kd_loss`."""
        check_dense("log_p", log_p)
        loss: Tensor = self._loss()(log_q, log_p, mask(shift_labels, self.ignore_index))
        return loss


class LigerKLDIVLoss(nn.KLDivLoss):
    """KL(y_true ‖ exp(y_pred)) of log-probabilities `y_pred`; of its gradient see LigerJSD.

    Rows of `y_true` need not sum to 1; `y_pred` must be normalised. Probabilities
    (``log_target=False``) cost a float32 tensor of their logarithms.

    Args:
        eps: no effect.
        args: of :class:`torch.nn.KLDivLoss`: size_average, reduce, reduction, log_target.
        kwargs: the same by name.

    Raises:
        ValueError: a reduction other than "mean" (by N·V), "batchmean" (by N) and "sum".
    """

    def __init__(self, eps: float = 1e-10, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_reduction(self.reduction)
        self.eps = eps

    @named(student_logits="y_pred", teacher_logits="y_true")
    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:  # (..., V), (..., V)
        """Return the reduced divergence; raises as :func:`fused_kd.kd_loss`."""
        check_dense("y_pred", y_pred)
        check_target("y_true", y_true, tuple(y_pred.shape))
        loss = partial(KDLoss(**FORWARD_KL), y_pred)
        if not self.log_target:
            return kl_from(y_true, None, self.reduction, loss, "y_true")
        divisor = denominator(self.reduction, y_true[..., 0].numel(), None, y_true.shape[-1])
        return kl_of_mass(y_true, mass_of(y_true), divisor, loss)


class LigerFusedCETVDLoss(Shown):
    """Cross-entropy and total variation distance of every row, from logits.

    Each of the two has its own pass and its own gradient: who weighs them by constants saves one
    with ``KDLoss(divergence="tvd", reduction="none", hard_weight=..., soft_weight=...)``.

    Args:
        ignore_index: rows with this label are 0 in both.

    Raises:
        TypeError: a value of the wrong type.
    """

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self._loss(1.0)  # refuses what is out of range

    def _loss(self, hard_weight: float) -> KDLoss:
        return KDLoss(
            hard_weight=hard_weight,
            soft_weight=1.0 - hard_weight,
            divergence="tvd",
            ignore_index=self.ignore_index,
            reduction="none",
        )

    @named(labels="target")
    def forward(
        self,
        student_logits: Tensor,  # (..., V)
        teacher_logits: Tensor,  # (..., V)
        target: Tensor,  # (...)
    ) -> tuple[Tensor, Tensor]:
        """Return both terms, (...) each; raises as :func:`fused_kd.kd_loss`."""
        check_dense("teacher_logits", teacher_logits)
        tensors = student_logits, teacher_logits, target
        ce, tvd = (self._loss(hard_weight)(*tensors) for hard_weight in (1.0, 0.0))
        assert isinstance(ce, Tensor)
        assert isinstance(tvd, Tensor)
        return ce, tvd
