"""DistillKit's losses for dense teachers, by their signature.

Put them in front of its own before the trainer is made::

    from distillkit import lossfuncs
    from fused_kd.integrations import distillkit

    lossfuncs.ALL_LOSS_CLASSES[:0] = distillkit.DENSE_LOSSES  # the first of a name is taken

Written from its source (2025 and 2026) and tested against its formulas; DistillKit's own trainer
was run alongside and agrees. A sparse teacher (top-k values of a dataset or a server) is refused:
use DistillKit's loss for it.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from .. import KDLoss
from ..checks import check_dense
from ._common.arguments import allow_zero, named


class _DenseLoss:
    """T² · a divergence at temperature T, over the rows that count.

    The loss is float32; DistillKit's has the logits' dtype.

    Args:
        temperature: softens both sides.
        missing_probability_handling: no effect: a dense teacher has every probability.
        sparse_chunk_length: no effect.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is outside its range.
    """

    NAME: ClassVar[str]
    DIVERGENCE: ClassVar[str]

    def __init__(
        self,
        temperature: float,
        missing_probability_handling: Any = None,
        sparse_chunk_length: int | None = None,
    ) -> None:
        self.loss = KDLoss.like("distillkit", divergence=self.DIVERGENCE, temperature=temperature)

    @classmethod
    def name(cls) -> str:
        """Return the loss's name in a configuration."""
        return cls.NAME

    def requires_hidden_states(self) -> bool:
        """Return False: the loss needs logits only."""
        return False

    @named(
        student="student_outputs.logits",
        teacher="signal.logits",
        token_weight="mask",
        num_items="num_items_in_batch",
    )
    def __call__(
        self,
        student_outputs: Any,  # with logits (B, S, V)
        signal: Any,  # with logits (B, S, V)
        mask: Tensor | None = None,  # (B, S) or (B, S, 1)
        hidden_state_mapping: Any = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> Tensor:
        """Return the sum over the mask's rows, divided by `num_items_in_batch` or their number.

        A `num_items_in_batch` of 0 gives a loss of 0.

        Raises:
            TypeError: The teacher has no logits, or a tensor has the wrong dtype.
            ValueError: Shapes or values do not fit; as :func:`fused_kd.kd_loss`.
        """
        if getattr(signal, "logits", None) is None:
            raise TypeError(
                "signal.logits must be the teacher's logits (B, S, V); got a "
                f"{type(signal).__name__} without: use DistillKit's loss for a sparse teacher"
            )
        check_dense("student_outputs.logits", student_outputs.logits)
        if mask is not None and mask.dim() == 3:
            mask = mask.squeeze(-1)
        loss: Tensor = self.loss(
            student_outputs.logits,
            signal.logits,
            token_weight=mask,
            num_items=allow_zero(num_items_in_batch),
        )
        return loss


class KLDLoss(_DenseLoss):
    """KL(teacher ‖ student)."""

    NAME, DIVERGENCE = "kl", "forward_kl"


class JSDLoss(_DenseLoss):
    """The Jensen-Shannon divergence, with equal weights of both sides."""

    NAME, DIVERGENCE = "jsd", "jsd"


class TVDLoss(_DenseLoss):
    """The total variation distance."""

    NAME, DIVERGENCE = "tvd", "tvd"


#: In the order of ``distillkit.lossfuncs.ALL_LOSS_CLASSES``.
DENSE_LOSSES = [KLDLoss, JSDLoss, TVDLoss]
