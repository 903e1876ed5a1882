"""What a backend of registered operators offers: the protocol of :mod:`fused_kd.backends`.

The operators are those of :mod:`fused_kd.ops`, which gives their shapes; a backend is a prefix of
their names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_kd import ops  # noqa: F401  the schemas

from ..options import KDOptions
from .reference import refuse_inplace_with_out


class Functions(NamedTuple):
    """Plain functions, since a compiler's trace does not follow bound methods."""

    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    forward_backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    backward: Callable[..., Tensor]
    rescale: Callable[..., None]


def registered(prefix: str) -> Functions:
    """The functions of a backend whose operators are ``torch.ops.fused_kd.<prefix>*``."""

    def operator(name: str) -> Any:
        return getattr(torch.ops.fused_kd, prefix + name).default

    make_forward, make_both = operator("forward"), operator("forward_backward")
    make_both_, make_both_into = operator("forward_backward_"), operator("forward_backward_into")
    make_backward, make_backward_ = operator("backward"), operator("backward_")
    rescale_, scale_ = operator("rescale_"), operator("scale_")

    def forward(*rows_and_options: Any) -> tuple[Tensor, Tensor, Tensor]:
        """hard (N,), soft (N,), stats: one visit of each row (two for jsd and tvd)."""
        *rows, options = rows_and_options
        return make_forward(*rows, *_numbers(options))  # type: ignore[no-any-return]

    def forward_backward(
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None,
        w_hard: Tensor | None,
        w_soft: Tensor | None,
        options: KDOptions,
        inplace: bool = False,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """hard, soft, stats and the gradient."""
        rows = (student, teacher, labels, w_hard, w_soft)
        if out is not None:
            refuse_inplace_with_out(inplace)
            return *make_both_into(*rows, *_numbers(options), out), out
        if inplace:
            return *make_both_(*rows, *_numbers(options)), student
        return make_both(*rows, *_numbers(options))  # type: ignore[no-any-return]

    def backward(
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None,
        w_hard: Tensor | None,
        w_soft: Tensor | None,
        stats: Tensor,
        options: KDOptions,
        inplace: bool = False,
    ) -> Tensor:
        """The gradient (B, S, V) from the statistics of an earlier forward."""
        rows = (student, teacher, labels, w_hard, w_soft)
        if inplace:
            make_backward_(*rows, stats, *_numbers(options))
            return student
        return make_backward(*rows, stats, *_numbers(options))  # type: ignore[no-any-return]

    def rescale(
        grad: Tensor, scale: Tensor, student: Tensor | None, *rest_stats_and_options: Any
    ) -> None:
        """Multiplies a gradient of forward_backward by ``scale``, in its own memory.

        A power of two is exact, and float32 loses half a unit to arithmetic that lost more; a
        16-bit gradient would be rounded a second time: it is made anew unless the student is gone
        (in place). Only the operator looks at the scale, so that a GPU need not wait for it.
        """
        *rest_and_stats, options = rest_stats_and_options
        if student is None:
            scale_(grad, scale)
        else:
            rescale_(student, *rest_and_stats, *_numbers(options), scale, grad)

    return Functions(forward, forward_backward, backward, rescale)


def _numbers(options: KDOptions) -> tuple[int, float, float, float, float]:
    return (
        options.divergence_code,
        options.temperature,
        options.beta,
        options.soft_factor,
        options.label_smoothing,
    )
