"""KDLoss: the loss as an nn.Module that keeps its keywords."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from .functional import KDLossParts, kd_loss_with
from .options import (
    NAMES,
    KDOptions,
    Keywords,
    did_you_mean,
    documented,
    options_of,
    shows_keywords,
)
from .presets import keywords as preset
from .sides import Side

#: Always shown by repr; the other options only where they differ from the default.
_ALWAYS_SHOWN = ("temperature", "hard_weight", "soft_weight", "divergence", "backend")
_KEYWORDS = frozenset(NAMES)


class KDLoss(nn.Module):
    """Knowledge-distillation loss: the keywords here, the sides and labels in ``forward``.

    Equivalent to::

        def forward(student, teacher, labels=None, **tensors):
            return kd_loss(student, teacher, labels, **tensors, **keywords)

    The module has no parameters and no buffers: heads stay in the models. The keywords are
    attributes too: ``loss.temperature = 2.0`` is checked as the constructor checks it, and counts
    from the next call on.

    Args:
        {keywords}

    Raises:
        TypeError: A keyword of the wrong type, or an unknown one.
        ValueError: A keyword outside its range.
        AttributeError: The assignment of a name that is nearly that of a keyword.
    """

    options: KDOptions

    @shows_keywords
    def __init__(self, *, return_parts: bool = False, **keywords: Unpack[Keywords]) -> None:
        super().__init__()
        self.options = options_of("KDLoss", {"return_parts": return_parts, **keywords})

    @classmethod
    def like(cls, name: str, **keywords: Any) -> KDLoss:
        """Return the loss with the conventions of another framework: see :mod:`fused_kd.presets`.

        Args:
            name: "automodel", "distillkit", "fla", "kdflow", "liger", "model_optimizer",
                "torchdistill", "torchtune" or "trl".
            keywords: of the constructor, instead of the framework's; `beta` as it means it.

        Raises:
            TypeError: A keyword of the wrong type.
            ValueError: No such framework, or a keyword outside its range.
        """
        return cls(**preset(name, keywords))

    def forward(
        self,
        student: Side,  # (..., V)
        teacher: Side | None,  # (..., V)
        labels: Tensor | None = None,  # (...)
        *,
        token_weight: Tensor | None = None,  # (...)
        num_items: float | Tensor | None = None,
        kept_rows: int | None = None,
    ) -> Tensor | KDLossParts:
        """Return the loss, as :func:`fused_kd.kd_loss` does."""
        return kd_loss_with(
            self.options, student, teacher, labels, token_weight, num_items, kept_rows
        )

    def extra_repr(self) -> str:
        """Return the main options, and the others that are not the default."""
        return ", ".join(
            f"{field.name}={getattr(self.options, field.name)!r}"
            for field in dataclasses.fields(KDOptions)
            if field.name in _ALWAYS_SHOWN or getattr(self.options, field.name) != field.default
        )

    def __getattr__(self, name: str) -> Any:
        """Return the value of a keyword; all else is nn.Module's."""
        return getattr(self.options, name) if name in _KEYWORDS else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Check and replace a keyword; all else is nn.Module's.

        Raises:
            TypeError, ValueError: A value that the constructor would refuse.
            AttributeError: A public name that this loss does not have, close to that of a keyword.
        """
        if name in _KEYWORDS:
            name, value = "options", dataclasses.replace(self.options, **{name: value})
        elif name == "options" and not isinstance(value, KDOptions):
            raise TypeError(f"options must be a KDOptions; got {type(value).__name__}")
        else:
            self._refuse_misspelt(name)
        super().__setattr__(name, value)

    def _refuse_misspelt(self, name: str) -> None:
        is_known = name == "options" or name in vars(self) or hasattr(type(self), name)
        if is_known or name.startswith("_") or torch.compiler.is_compiling():
            return
        if hint := did_you_mean(name, cutoff=0.8):
            raise AttributeError(f"{type(self).__name__} has no option {name!r}{hint}")


KDLoss.__doc__ = documented(KDLoss.__doc__)
