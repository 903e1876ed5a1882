"""What a backend of registered operators offers: the protocol of :mod:`fused_kd.backends`.

The operators are those of :mod:`fused_kd.ops`, which gives their shapes; a backend is a prefix of
their names.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_kd import ops  # noqa: F401  the schemas

from ..options import KDOptions


class Registered:
    """forward, forward_backward, backward and rescale through ``torch.ops.fused_kd.<prefix>*``."""

    def __init__(self, prefix: str) -> None:
        def operator(name: str) -> torch._ops.OpOverload:
            return getattr(torch.ops.fused_kd, prefix + name).default  # type: ignore[no-any-return]

        self._forward = operator("forward")
        self._forward_backward = operator("forward_backward")
        self._forward_backward_ = operator("forward_backward_")
        self._backward = operator("backward")
        self._backward_ = operator("backward_")
        self._rescale_ = operator("rescale_")
        self._scale_ = operator("scale_")

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None,
        w_hard: Tensor | None,
        w_soft: Tensor | None,
        options: KDOptions,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """hard (N,), soft (N,), stats: one visit of each row (two for jsd and tvd)."""
        rows = (student, teacher, labels, w_hard, w_soft)
        return self._forward(*rows, *_numbers(options))  # type: ignore[no-any-return]

    def forward_backward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None,
        w_hard: Tensor | None,
        w_soft: Tensor | None,
        options: KDOptions,
        inplace: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """hard, soft, stats and the gradient."""
        rows = (student, teacher, labels, w_hard, w_soft)
        if inplace:
            return *self._forward_backward_(*rows, *_numbers(options)), student
        return self._forward_backward(*rows, *_numbers(options))  # type: ignore[no-any-return]

    def backward(
        self,
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
            self._backward_(*rows, stats, *_numbers(options))
            return student
        return self._backward(*rows, stats, *_numbers(options))  # type: ignore[no-any-return]

    def rescale(
        self,
        grad: Tensor,
        scale: Tensor,
        student: Tensor | None,
        teacher: Tensor,
        labels: Tensor | None,
        w_hard: Tensor | None,
        w_soft: Tensor | None,
        stats: Tensor,
        options: KDOptions,
    ) -> None:
        """Multiplies a gradient of forward_backward by ``scale``, in its own memory.

        A power of two is exact, and float32 loses half a unit to arithmetic that lost more; a
        16-bit gradient would be rounded a second time: it is made anew unless the student is gone
        (in place). Only the operator looks at the scale, so that a GPU need not wait for it.
        """
        if student is None:
            self._scale_(grad, scale)
            return
        rows = (student, teacher, labels, w_hard, w_soft)
        self._rescale_(*rows, stats, *_numbers(options), scale, grad)


def _numbers(options: KDOptions) -> tuple[int, float, float, float, float]:
    return (
        options.divergence_code,
        options.temperature,
        options.beta,
        options.soft_factor,
        options.label_smoothing,
    )
