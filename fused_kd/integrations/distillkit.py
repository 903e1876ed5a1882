"""DistillKit's losses for dense teachers, by their signature.

In place of its own, before the trainer is made::

    from distillkit import lossfuncs
    from fused_kd.integrations import distillkit

    lossfuncs.ALL_LOSS_CLASSES[:0] = distillkit.DENSE_LOSSES  # the first of a name is taken

Written from its source (2025 and 2026) and tested against its formulas; DistillKit's own trainer
was run alongside and agrees. A sparse teacher, top-k values of a dataset or a server, is refused:
keep theirs.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from .. import KDLoss
from .arguments import count_of_tokens, named


class _DenseLoss:
    """T² · a divergence at temperature T, over the rows that count.

    The loss is float32; DistillKit's has the logits' dtype.

    Args:
        temperature: of both sides.
        missing_probability_handling: no effect: a dense teacher misses nothing.
        sparse_chunk_length: no effect.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value outside its range.
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
        """Return what a configuration calls it."""
        return cls.NAME

    def requires_hidden_states(self) -> bool:
        """Return False: logits are enough."""
        return False

    @named(
        student_logits="student_outputs.logits",
        teacher_logits="signal.logits",
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
            TypeError: a teacher without logits; a tensor of the wrong dtype.
            ValueError: shapes or values that do not fit; as :func:`fused_kd.kd_loss`.
        """
        if getattr(signal, "logits", None) is None:
            raise TypeError(
                "signal.logits must be the teacher's logits (B, S, V); got a "
                f"{type(signal).__name__} without: keep DistillKit's loss for a sparse one"
            )
        if mask is not None and mask.dim() == 3:
            mask = mask.squeeze(-1)
        loss: Tensor = self.loss(
            student_outputs.logits,
            signal.logits,
            token_weight=mask,
            num_items=count_of_tokens(num_items_in_batch),
        )
        return loss


class KLDLoss(_DenseLoss):
    """KL(teacher ‖ student)."""

    NAME, DIVERGENCE = "kl", "forward_kl"


class JSDLoss(_DenseLoss):
    """The Jensen-Shannon divergence, both sides weighing the same."""

    NAME, DIVERGENCE = "jsd", "jsd"


class TVDLoss(_DenseLoss):
    """The total variation distance."""

    NAME, DIVERGENCE = "tvd", "tvd"


#: In the order of ``distillkit.lossfuncs.ALL_LOSS_CLASSES``.
DENSE_LOSSES = [KLDLoss, JSDLoss, TVDLoss]
