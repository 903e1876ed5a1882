"""Liger's losses from logits, log-probabilities or probabilities of the whole vocabulary."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from ... import KDLoss
from ...checks import check_dense
from .._common.arguments import check_target, named
from .._common.parts import as_tensor
from .._common.probabilities import check_reduction, denominator, kl_from, kl_of_mass, mass_of
from .options import FORWARD_KL, SOFT_ALONE, Shown, check_beta, mask


class LigerJSD(Shown):
    """JSD(β) of log-probabilities; `beta` = 0 and 1 are forward and reverse KL.

    The log-softmax of log-probabilities is the identity, so they are used as logits. The gradient
    by `log_q` is the one by logits. Liger's gradient, in which `log_q` is a free variable, differs
    by a multiple of softmax in each row. The backward of the log_softmax that made `log_q` removes
    that multiple, so all gradients after it agree. Log-probabilities of either side whose
    exponentials do not sum to 1 are normalised, since they are used as logits.

    Args:
        beta: the teacher's weight, in [0, 1].
        ignore_index: rows with this label do not count.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is outside its range.
    """

    def __init__(self, beta: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__()
        self.beta = beta
        self.ignore_index = ignore_index
        self._loss()  # refuses what is out of range

    def _loss(self) -> KDLoss:
        """Return the KDLoss of the current attributes; raises as the class."""
        check_beta(self.beta)
        return KDLoss.like("liger", **SOFT_ALONE, beta=self.beta, ignore_index=self.ignore_index)

    @named(student="log_q", teacher="log_p", labels="shift_labels")
    def forward(
        self,
        log_q: Tensor,  # (..., V), the student's
        log_p: Tensor,  # (..., V), the teacher's
        shift_labels: Tensor | None = None,  # (...); only says which rows count
    ) -> Tensor:
        """Return the mean over the rows that count, 0-d; raises as :func:`fused_kd.kd_loss`."""
        check_dense("log_q", log_q)
        check_dense("log_p", log_p)
        loss: Tensor = self._loss()(log_q, log_p, mask(shift_labels, self.ignore_index))
        return loss


class LigerKLDIVLoss(nn.KLDivLoss):
    """KL(y_true ‖ exp(y_pred)) of log-probabilities `y_pred`; for its gradient see LigerJSD.

    Rows of `y_true` need not sum to 1; `y_pred` must be normalised. Probabilities
    (``log_target=False``) need a float32 tensor for their logarithms.

    Args:
        eps: no effect.
        args: those of :class:`torch.nn.KLDivLoss`: size_average, reduce, reduction, log_target.
        kwargs: the same by name.

    Raises:
        ValueError: The reduction is not "mean" (divides by N·V), "batchmean" (by N) or "sum".
    """

    def __init__(self, eps: float = 1e-10, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_reduction(self.reduction)
        self.eps = eps

    @named(student="y_pred", teacher="y_true")
    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:  # (..., V), (..., V)
        """Return the reduced divergence, 0-d; raises as :func:`fused_kd.kd_loss`."""
        check_dense("y_pred", y_pred)
        check_target("y_true", y_true, tuple(y_pred.shape))
        loss = partial(KDLoss(**FORWARD_KL), y_pred)
        if not self.log_target:
            return kl_from(y_true, None, self.reduction, loss, "y_true")
        divisor = denominator(self.reduction, y_true[..., 0].numel(), None, y_true.shape[-1])
        return kl_of_mass(y_true, mass_of(y_true), divisor, loss)


class LigerFusedCETVDLoss(Shown):
    """Cross-entropy and total variation distance of every row, from logits.

    Each of the two has its own pass and its own gradient. If their weights are constants, one pass
    and one gradient suffice:
    ``KDLoss(divergence="tvd", reduction="none", hard_weight=..., soft_weight=...)``.

    Args:
        ignore_index: both terms of a row with this label are 0.

    Raises:
        TypeError: A value has the wrong type.
    """

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self._loss(1.0)  # refuses what is out of range

    def _loss(self, hard_weight: float) -> KDLoss:
        """Return the KDLoss of cross-entropy for `hard_weight` = 1, of the distance for 0."""
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
        """Return cross-entropy and distance, (...) each; raises as :func:`fused_kd.kd_loss`."""
        check_dense("student_logits", student_logits)
        check_dense("teacher_logits", teacher_logits)
        tensors = student_logits, teacher_logits, target
        ce, tvd = (as_tensor(self._loss(hard_weight)(*tensors)) for hard_weight in (1.0, 0.0))
        return ce, tvd
