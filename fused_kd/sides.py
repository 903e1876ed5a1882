"""What a side of the loss may be: logits, which are a tensor, or a Head."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Head(NamedTuple):
    """A side given by hidden states and the lm_head, so that its logits are never stored whole.

    It represents the logits ``scale * F.linear(hidden, weight, bias)``, (..., V); the loss computes
    them for one chunk of rows at a time. As a NamedTuple of tensors it passes through
    ``torch.compile``, DDP, FSDP and activation checkpointing. The constructor checks nothing; the
    loss does. Of a student's head, hidden, weight and bias get gradients if they require grad.

    Args:
        hidden: (..., H), float32, bfloat16, float16 or float64: the input of the lm_head; 1-D is a
            single row.
        weight: (V, H): the weight of the lm_head, or of a tied embedding; in the dtype of `hidden`,
            unless autocast is on.
        bias: (V,), of any of these dtypes; or None.
        scale: a factor of the logits, bias included; a Python number, not 0 (Cohere's
            ``logit_scale``, the inverse of Granite's ``logits_scaling``).
        softcap: must be None; a soft-capped head is not supported yet.
    """

    hidden: Tensor  # (..., H)
    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0
    softcap: float | None = None

    def to(self, *args: Any, **kwargs: Any) -> Head:
        """Return a head whose three tensors are moved or cast, as by :meth:`torch.Tensor.to`.

        Tensors that have this device and dtype already are shared; this head is not modified.
        """
        bias = None if self.bias is None else self.bias.to(*args, **kwargs)
        hidden, weight = self.hidden.to(*args, **kwargs), self.weight.to(*args, **kwargs)
        return self._replace(hidden=hidden, weight=weight, bias=bias)

    def rows(self, index: Any) -> Head:
        """Return the same head with the hidden states ``hidden[index]``.

        Any index of a tensor's leading dimensions; a view or a copy, as by torch.
        """
        return self._replace(hidden=self.hidden[index])


#: A side as a caller passes it.
Side = Tensor | Head
#: A side as the engines take it: logits and two None; hidden states, weight and bias; three None.
Tensors = tuple[Tensor | None, Tensor | None, Tensor | None]


def tensors_of(side: Side | None) -> Tensors:
    """Return logits, None, None; of a Head hidden states, weight and bias; of None three None.

    A Head's scale is left out.
    """
    if isinstance(side, Head):
        return side[:3]
    return side, None, None


def rows_tensor(side: Side) -> Tensor:
    """Return logits, or a Head's hidden states: the tensor whose leading dimensions are rows."""
    return side.hidden if isinstance(side, Head) else side


def row_shape(side: Side) -> torch.Size:
    """Return the leading shape (...) of a side, which is the shape of the labels."""
    return rows_tensor(side).shape[:-1]


def vocabulary(side: Side) -> int:
    """Return V, the number of entries of a row of logits."""
    return side.weight.shape[0] if isinstance(side, Head) else side.shape[-1]


def row_count(shape: torch.Size) -> int:
    """Return the number of rows of a leading shape.

    ``shape.numel()`` would specialise a symbolic size in a trace.
    """
    return math.prod(shape)


def arithmetic_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return float64 if any tensor is float64, else float32; None is skipped."""
    is_double = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if is_double else torch.float32


def autocast_dtype(head: Head) -> torch.dtype | None:
    """Return the dtype that autocast rounds a head's hidden states and weight to.

    None if autocast is off for their device, and if one of the two is float64.
    """
    device = head.hidden.device.type
    if torch.float64 in (head.hidden.dtype, head.weight.dtype):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def operand_dtype(head: Head) -> torch.dtype:
    """Return the dtype that a head's hidden states and weight are rounded to before the product.

    It is autocast's, or that of the hidden states.
    """
    return autocast_dtype(head) or head.hidden.dtype
