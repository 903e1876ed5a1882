"""KDLoss, LinearKDLoss: the losses as nn.Modules that keep their options."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from .functional import KDLossParts, kd_loss_with
from .linear.checks import check_chunks
from .linear.functional import ChunkOptions, linear_kd_loss_with
from .options import KDOptions
from .presets import keywords as preset

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

    @classmethod
    def like(cls, name: str, **keywords: Any) -> KDLoss:
        """The loss with the conventions of another framework: see :mod:`fused_kd.presets`.

        Args:
            name: "automodel", "distillkit", "fla", "kdflow", "liger", "model_optimizer",
                "torchdistill", "torchtune" or "trl".
            keywords: of the constructor, instead of the framework's; `beta` as it means it.

        Raises:
            TypeError: a keyword of the wrong type.
            ValueError: no such framework, or a keyword outside its range.
        """
        return cls(**preset(name, keywords))

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
        return _shown(self.options)


class LinearKDLoss(nn.Module):
    """Knowledge-distillation loss on hidden states: the keywords here, tensors in ``forward``.

    Equivalent to::

        def forward(*tensors, **named_tensors):
            return linear_kd_loss(*tensors, **named_tensors, **keywords)

    The keywords are those of :func:`fused_kd.linear_kd_loss`, where they are documented. The module
    has no parameters and no buffers: the heads stay where they are, in the models.

    Raises:
        TypeError: a keyword of the wrong type.
        ValueError: a keyword outside its range.
    """

    def __init__(
        self,
        *,
        chunk_rows: int | None = None,
        memory_budget: int | None = None,
        grad_accum_dtype: torch.dtype = torch.float32,
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
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_chunks(chunk_rows, memory_budget, grad_accum_dtype)
        self.chunks = ChunkOptions(chunk_rows, memory_budget, grad_accum_dtype)
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
            return_parts=return_parts,
            backend=backend,
        )

    @classmethod
    def like(cls, name: str, **keywords: Any) -> LinearKDLoss:
        """As :meth:`KDLoss.like`."""
        return cls(**preset(name, keywords))

    def forward(
        self,
        student_hidden: Tensor,  # (..., H_s)
        student_weight: Tensor,  # (V, H_s)
        teacher_hidden: Tensor | None = None,  # (..., H_t)
        teacher_weight: Tensor | None = None,  # (V, H_t)
        labels: Tensor | None = None,  # (...)
        *,
        student_bias: Tensor | None = None,  # (V,)
        teacher_bias: Tensor | None = None,  # (V,)
        teacher_logits: Tensor | None = None,  # (..., V)
        token_weight: Tensor | None = None,  # (...)
        num_items: float | Tensor | None = None,
        kept_rows: int | None = None,
    ) -> Tensor | KDLossParts:
        """The loss, as :func:`fused_kd.linear_kd_loss` returns it."""
        return linear_kd_loss_with(
            self.options,
            self.chunks,
            (student_hidden, student_weight, student_bias),
            (teacher_hidden, teacher_weight, teacher_bias),
            teacher_logits,
            labels,
            token_weight,
            num_items,
            kept_rows,
        )

    def extra_repr(self) -> str:
        """The main options, and the others that are not the default."""
        changed = [
            f"{name}={value!r}"
            for name, value in self.chunks._asdict().items()
            if value != ChunkOptions._field_defaults[name]
        ]
        return ", ".join([_shown(self.options), *changed])


def _shown(options: KDOptions) -> str:
    return ", ".join(
        f"{field.name}={getattr(options, field.name)!r}"
        for field in dataclasses.fields(KDOptions)
        if field.name in _ALWAYS_SHOWN or getattr(options, field.name) != field.default
    )
