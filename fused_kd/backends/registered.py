"""The functions of a backend that calls registered operators: cpu, cuda and triton.

The operators are those of :mod:`fused_kd.ops`, which documents their shapes. A backend is
identified by the prefix of their names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_kd import ops  # noqa: F401  the schemas

from ..classes import Classes
from ..divergences import CODES
from ..options import Formula
from .reference import refuse_inplace_with_out


class Functions(NamedTuple):
    """The functions of :class:`fused_kd.backends.Backend` except `why_not`.

    Plain functions, since a compiler's trace does not follow bound methods.
    """

    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    forward_backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    backward: Callable[..., Tensor]
    rescale: Callable[..., None]
    multiply: Callable[..., None]
    measure: Callable[..., tuple[Tensor, Tensor]]
    measure_support: Callable[..., tuple[Tensor, Tensor]]


def registered(prefix: str) -> Functions:
    """Return the functions of a backend, which call operators ``torch.ops.fused_kd.<prefix>*``.

    An operator raises RuntimeError for tensors that do not fit each other.

    Args:
        prefix: of :data:`fused_kd.ops.PREFIXES`.

    Raises:
        AttributeError: No operators have this prefix.
    """

    def operator(name: str) -> Any:
        return getattr(torch.ops.fused_kd, prefix + name).default

    make_forward, make_both = operator("forward"), operator("forward_backward")
    make_both_, make_both_into = operator("forward_backward_"), operator("forward_backward_into")
    make_backward, make_backward_ = operator("backward"), operator("backward_")
    rescale_, scale_ = operator("rescale_"), operator("scale_")

    def forward(
        student: Tensor,
        teacher: Tensor | Classes,
        labels: Tensor | None,
        w_hard: Tensor | None,
        w_soft: Tensor | None,
        formula: Formula,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the unweighted hard and soft (N,) and stats (N, STATS), as Backend.forward."""
        rows = (student, *_teacher(teacher), labels, w_hard, w_soft)
        return make_forward(*rows, *_numbers(formula))  # type: ignore[no-any-return]

    def forward_backward(
        student: Tensor,
        teacher: Tensor | Classes,
        labels: Tensor | None,
        w_hard: Tensor | None,
        w_soft: Tensor | None,
        formula: Formula,
        inplace: bool = False,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return hard, soft, stats and the gradient (B, S, V): new, in `out` or over the student.

        Raises:
            ValueError: `inplace` and `out` are both set.
        """
        rows = (student, *_teacher(teacher), labels, w_hard, w_soft)
        if out is not None:
            refuse_inplace_with_out(inplace)
            return *make_both_into(*rows, *_numbers(formula), out), out
        if inplace:
            return *make_both_(*rows, *_numbers(formula)), student
        return make_both(*rows, *_numbers(formula))  # type: ignore[no-any-return]

    def backward(
        student: Tensor,
        teacher: Tensor | Classes,
        labels: Tensor | None,
        w_hard: Tensor | None,
        w_soft: Tensor | None,
        stats: Tensor,
        formula: Formula,
        inplace: bool = False,
    ) -> Tensor:
        """Return the gradient (B, S, V) with the stats of an earlier forward; new, or in place."""
        rows = (student, *_teacher(teacher), labels, w_hard, w_soft)
        if inplace:
            make_backward_(*rows, stats, *_numbers(formula))
            return student
        return make_backward(*rows, stats, *_numbers(formula))  # type: ignore[no-any-return]

    def rescale(
        grad: Tensor,
        scale: Tensor,
        student: Tensor,
        teacher: Tensor | Classes,
        labels: Tensor | None,
        w_hard: Tensor | None,
        w_soft: Tensor | None,
        stats: Tensor,
        formula: Formula,
    ) -> None:
        """Overwrite the gradient that forward_backward returned by `scale` times it.

        It is multiplied if the scale is a power of two, which is exact, or the gradient float32,
        which then loses half a unit. A 16-bit gradient would be rounded a second time and is
        recomputed instead, from the logits, so it may not be in their memory. The operator reads
        the scale on the device: the host does not synchronize.
        """
        rows = (student, *_teacher(teacher), labels, w_hard, w_soft)
        rescale_(*rows, stats, *_numbers(formula), scale, grad)

    def multiply(grad: Tensor, scale: Tensor) -> None:
        """Multiply a gradient by `scale` in place, rounding it again; 0 stays 0."""
        scale_(grad, scale)

    of_rows = (forward, forward_backward, backward, rescale, multiply)
    # these operators have the arguments of Backend.measure and Backend.measure_support
    return Functions(*of_rows, operator("measure"), operator("measure_support"))


def _teacher(teacher: Tensor | Classes) -> tuple[Tensor, Tensor | None]:
    return teacher if isinstance(teacher, Classes) else (teacher, None)


def _numbers(formula: Formula) -> tuple[int, Tensor, float, bool, float]:
    return (
        CODES[formula.divergence],
        formula.temperature,
        formula.beta,
        formula.soft_scale == "t2",
        formula.label_smoothing,
    )
