"""KDLoss: kd_loss as an nn.Module that keeps its options."""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from .functional import KDLossParts, kd_loss_with
from .options import KDOptions

#: Always shown by repr; the other options only where they differ from the default.
_ALWAYS_SHOWN = ("temperature", "hard_weight", "soft_weight", "divergence", "backend")


class KDLoss(nn.Module):
    """Knowledge-distillation loss on logits: the keywords here, the tensors in ``forward``.

    Equivalent to::

        def forward(student_logits, teacher_logits, labels=None, **weights):
            return kd_loss(student_logits, teacher_logits, labels, **weights, **keywords)

    The keywords are those of :func:`fused_kd.kd_loss`, where they are documented. The module has
    no parameters and no buffers. Its ``options`` are frozen; to change one during training, assign
    ``loss.options = dataclasses.replace(loss.options, temperature=2.0)``.

    Raises:
        TypeError: a keyword of the wrong type.
        ValueError: a keyword outside its range.
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        hard_weight: float = 0.5,
        soft_weight: float = 0.5,
        divergence: str = "forward_kl",
        beta: float = 0.5,
        soft_scale: str = "t2",
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        return_parts: bool = False,
        inplace: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.options = KDOptions(
            temperature=temperature,
            hard_weight=hard_weight,
            soft_weight=soft_weight,
            divergence=divergence,
            beta=beta,
            soft_scale=soft_scale,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            reduction=reduction,
            inplace=inplace,
            return_parts=return_parts,
            backend=backend,
        )

    def forward(
        self,
        student_logits: Tensor,  # (..., V)
        teacher_logits: Tensor,  # (..., V)
        labels: Tensor | None = None,  # (...)
        *,
        token_weight: Tensor | None = None,  # (...)
        num_items: float | Tensor | None = None,
    ) -> Tensor | KDLossParts:
        """The loss, as :func:`fused_kd.kd_loss` returns it."""
        return kd_loss_with(
            self.options, student_logits, teacher_logits, labels, token_weight, num_items
        )

    def extra_repr(self) -> str:
        """The main options, and the others that are not the default."""
        return ", ".join(
            f"{field.name}={getattr(self.options, field.name)!r}"
            for field in dataclasses.fields(KDOptions)
            if field.name in _ALWAYS_SHOWN or getattr(self.options, field.name) != field.default
        )
