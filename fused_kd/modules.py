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
from .sides import Side, Teacher

#: Always shown by repr; the other options only if they differ from the default.
_ALWAYS_SHOWN = ("temperature", "hard_weight", "soft_weight", "divergence", "backend")
_KEYWORDS = frozenset(NAMES)


class KDLoss(nn.Module):
    """The distillation loss of :func:`fused_kd.kd_loss` as a module that keeps its keywords.

    ``KDLoss(**keywords)(student, teacher, labels)`` equals
    ``kd_loss(student, teacher, labels, **keywords)``. The module has no parameters and no buffers;
    a Head's tensors stay in the models. The keywords are attributes too: ``loss.temperature = 2.0``
    is checked like an argument of the constructor, and applies from the next call on.

    Args:
        {keywords}

    Raises:
        TypeError: A keyword has the wrong type, or is unknown.
        ValueError: A keyword is outside its range, or excludes another.
        AttributeError: An assigned name looks like a misspelt keyword.
    """

    options: KDOptions

    @shows_keywords
    def __init__(self, *, return_parts: bool = False, **keywords: Unpack[Keywords]) -> None:
        super().__init__()
        self.options = options_of("KDLoss", {"return_parts": return_parts, **keywords})

    @classmethod
    def like(cls, name: str, **keywords: Any) -> KDLoss:
        """Return the loss with another framework's defaults: see :mod:`fused_kd.presets`.

        These are its weights, divergence, factor c(T), reduction, temperature and label smoothing.

        Args:
            name: "automodel", "distillkit", "fla", "kdflow", "liger", "model_optimizer",
                "torchdistill", "torchtune" or "trl".
            keywords: arguments of the constructor, which override the framework's defaults; `beta`
                has the framework's meaning.

        Raises:
            TypeError: A keyword has the wrong type, or is unknown.
            ValueError: The framework is unknown, or a keyword is outside its range or excludes
                another.
        """
        return cls(**preset(name, keywords))

    def forward(
        self,
        student: Side,  # (..., V)
        teacher: Teacher | None,  # (..., V)
        labels: Tensor | None = None,  # (...)
        *,
        token_weight: Tensor | None = None,  # (...)
        num_items: float | Tensor | None = None,
        kept_rows: int | None = None,
    ) -> Tensor | KDLossParts:
        """Return the loss; arguments, result and errors are those of :func:`fused_kd.kd_loss`."""
        return kd_loss_with(
            self.options, student, teacher, labels, token_weight, num_items, kept_rows
        )

    def extra_repr(self) -> str:
        """Return the main keywords, and the others that differ from their default."""
        return ", ".join(
            f"{field.name}={getattr(self.options, field.name)!r}"
            for field in dataclasses.fields(KDOptions)
            if field.name in _ALWAYS_SHOWN or getattr(self.options, field.name) != field.default
        )

    def __getattr__(self, name: str) -> Any:
        """Return the value of a keyword, or what nn.Module has under this name.

        Raises:
            AttributeError: It is neither.
        """
        return getattr(self.options, name) if name in _KEYWORDS else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Check and set a keyword; any other name is set as in nn.Module.

        Raises:
            TypeError: The value of a keyword, or of `options`, has the wrong type.
            ValueError: The value of a keyword is outside its range, or excludes another.
            AttributeError: The name is no attribute of the loss but close to a keyword's.
        """
        if name in _KEYWORDS:
            name, value = "options", dataclasses.replace(self.options, **{name: value})
        elif name == "options" and not isinstance(value, KDOptions):
            raise TypeError(
                f"options must be a KDOptions; got {type(value).__name__}: set the keywords "
                "themselves, as in loss.temperature = 2.0"
            )
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
