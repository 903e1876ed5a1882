"""KDLoss, LinearKDLoss: the losses as nn.Modules that keep their options."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .functional import KDLossParts, kd_loss_with
from .linear.functional import ChunkOptions, linear_kd_loss_with
from .options import KDOptions
from .presets import keywords as preset

#: The keywords of either module that are KDOptions, and those that are ChunkOptions.
_OPTIONS = frozenset(field.name for field in dataclasses.fields(KDOptions))
_CHUNKS = frozenset(field.name for field in dataclasses.fields(ChunkOptions))
#: Always shown by repr; the other options only where they differ from the default.
_ALWAYS_SHOWN = ("temperature", "hard_weight", "soft_weight", "divergence", "backend")


class _Loss(nn.Module):
    """A loss whose keywords are attributes, held by frozen objects that check them."""

    options: KDOptions
    #: Keyword: the attribute that holds it.
    _HOLDERS: ClassVar[dict[str, str]]

    def __getattr__(self, name: str) -> Any:
        """Return the value of a keyword; all else is nn.Module's."""
        holder = self._HOLDERS.get(name)
        return super().__getattr__(name) if holder is None else getattr(getattr(self, holder), name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Check and replace a keyword; all else is nn.Module's.

        Raises:
            TypeError, ValueError: A value that the constructor would refuse.
            AttributeError: A public name that this loss does not have, close to that of an option.
        """
        holder = self._HOLDERS.get(name)
        kind = {"options": KDOptions, "chunks": ChunkOptions}.get(name)
        if kind is not None and not isinstance(value, kind):
            raise TypeError(f"{name} must be a {kind.__name__}; got {type(value).__name__}")
        if holder is None:
            self._refuse_misspelt(name)
            super().__setattr__(name, value)
        else:
            held = dataclasses.replace(getattr(self, holder), **{name: value})
            super().__setattr__(holder, held)

    def _refuse_misspelt(self, name: str) -> None:
        is_known = name in ("options", "chunks") or name in vars(self) or hasattr(type(self), name)
        if is_known or name.startswith("_") or torch.compiler.is_compiling():
            return
        for near in difflib.get_close_matches(name, _OPTIONS | _CHUNKS, n=1, cutoff=0.8):
            why = "it belongs to the other level" if near == name else f"did you mean {near!r}?"
            raise AttributeError(f"{type(self).__name__} has no option {name!r}: {why}")


class KDLoss(_Loss):
    """Knowledge-distillation loss on logits: the keywords here, the tensors in ``forward``.

    Equivalent to::

        def forward(student_logits, teacher_logits, labels=None, **weights):
            return kd_loss(student_logits, teacher_logits, labels, **weights, **keywords)

    The keywords are those of :func:`fused_kd.kd_loss`, where they are documented. The module has
    no parameters and no buffers. The keywords are attributes too: ``loss.temperature = 2.0`` is
    checked as the constructor checks it, and counts from the next call on.

    Raises:
        TypeError: a keyword of the wrong type.
        ValueError: a keyword outside its range.
        AttributeError: the assignment of a name that is nearly that of an option.
    """

    _HOLDERS: ClassVar[dict[str, str]] = dict.fromkeys(_OPTIONS, "options")

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
        teacher_logits: Tensor | None,  # (..., V)
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


class LinearKDLoss(_Loss):
    """Knowledge-distillation loss on hidden states: the keywords here, tensors in ``forward``.

    Equivalent to::

        def forward(*tensors, **named_tensors):
            return linear_kd_loss(*tensors, **named_tensors, **keywords)

    The keywords are those of :func:`fused_kd.linear_kd_loss`, where they are documented. The module
    has no parameters and no buffers: the heads stay where they are, in the models. The keywords are
    attributes, as those of :class:`KDLoss`.

    Raises:
        TypeError: a keyword of the wrong type.
        ValueError: a keyword outside its range.
        AttributeError: the assignment of a name that is nearly that of an option.
    """

    _HOLDERS: ClassVar[dict[str, str]] = {
        **dict.fromkeys(_OPTIONS - {"inplace"}, "options"),
        **dict.fromkeys(_CHUNKS, "chunks"),
    }

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
            f"{field.name}={getattr(self.chunks, field.name)!r}"
            for field in dataclasses.fields(ChunkOptions)
            if getattr(self.chunks, field.name) != field.default
        ]
        return ", ".join([_shown(self.options), *changed])


def _shown(options: KDOptions) -> str:
    return ", ".join(
        f"{field.name}={getattr(options, field.name)!r}"
        for field in dataclasses.fields(KDOptions)
        if field.name in _ALWAYS_SHOWN or getattr(options, field.name) != field.default
    )
