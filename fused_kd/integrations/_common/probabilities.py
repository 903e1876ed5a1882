"""Teachers given as probabilities, and the reductions of :class:`torch.nn.KLDivLoss`.

A row of explicit probabilities is a·q̂: its mass a, which rounding alone moves from 1, and a
distribution q̂. Then Σ a·q̂ log(a·q̂ / p) = a·KL(q̂ ‖ p) + a log a: the loss of a row of weight a, and
a constant. So rows need not sum to 1, and those of mass 0 are skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ...functional import KDLossParts
from ...sides import TopK, arithmetic_dtype
from .arguments import check_not_negative
from .parts import as_tensor

#: Number of rows whose exponentials are made at a time.
ROWS = 64


def kl_from(
    probabilities: Tensor,  # (..., V)
    kept: Tensor | None,  # (...), bool; None: all rows
    reduction: str,
    loss: Callable[..., Tensor | KDLossParts],
    name: str,
) -> Tensor:
    """Return Σ q log(q/p) over the rows that count, divided by the :func:`denominator`.

    Args:
        probabilities: q; any dtype of logits.
        kept: which rows count.
        reduction: "batchmean", "mean" or "sum", see :func:`denominator`.
        loss: called with the logits of q̂ (float32, or float64 for float64 probabilities, in a new
            tensor that it may overwrite), `token_weight` and `num_items`; returns
            Σ token_weight·KL(q̂ ‖ p) / num_items. Its errors are not caught.
        name: what messages call the probabilities.

    Raises:
        ValueError: The reduction is another one, `kept` has another leading shape, or an entry of a
            kept row is negative.
    """
    dtype = arithmetic_dtype(probabilities)
    mass = probabilities.sum(-1, dtype=dtype)
    if kept is not None:
        if kept.shape != mass.shape:
            raise ValueError(
                "labels must have the leading shape of the probabilities, "
                f"{tuple(mass.shape)}; got {tuple(kept.shape)}"
            )
        mass = torch.where(kept, mass, 0.0)
    check_not_negative(name, probabilities, kept)
    divisor = denominator(reduction, mass.numel(), kept, probabilities.shape[-1])
    logs = probabilities.to(dtype, copy=True).log_()
    return kl_of_mass(logs, mass, divisor, loss)


def kl_of_mass(
    logs: Tensor | TopK,  # (..., V)
    mass: Tensor,  # (...)
    divisor: float | Tensor,
    loss: Callable[..., Tensor | KDLossParts],
) -> Tensor:
    """Return Σ a·q̂ log(a·q̂ / p) / divisor of masses a and logits of q̂; `loss` as in kl_from.

    `loss` gets `logs` itself: if it overwrites them, the caller's tensor changes. They may also be
    a TopK whose tail is "zero".
    """
    divergence = as_tensor(loss(logs, token_weight=mass, num_items=divisor))
    return divergence + torch.xlogy(mass, mass).sum() / divisor


def mass_of(logs: Tensor) -> Tensor:
    """Return Σ exp(logs) of every row, (...)."""
    rows, dtype = logs.reshape(-1, logs.shape[-1]), arithmetic_dtype(logs)
    sums = [block.to(dtype).exp().sum(-1) for (block,) in blocks(rows)]
    return torch.cat(sums).view(logs.shape[:-1])


def blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield ROWS rows of each tensor at a time; under ``torch.compile``, all rows at once.

    They are views; the tensors must have equal lengths. A compiler fuses whole tensors, and would
    compile a loop again for every length.
    """
    size = max(len(tensors[0]), 1) if torch.compiler.is_compiling() else ROWS
    yield from zip(*(torch.split(x, size) for x in tensors), strict=True)


def denominator(reduction: str, rows: int, kept: Tensor | None, vocabulary: int) -> int | Tensor:
    """Return the divisor of the sum over the rows; at least 1, so that the mean of no rows is 0.

    Args:
        reduction: "batchmean" (the rows that count), "mean" (V times them) or "sum" (1).
        rows: number of rows, used without `kept`.
        kept: which rows count; None: all.
        vocabulary: V.

    Raises:
        ValueError: The reduction is another one.
    """
    check_reduction(reduction)
    count = max(rows, 1) if kept is None else kept.sum().clamp(min=1)
    return {"batchmean": count, "mean": count * vocabulary, "sum": 1}[reduction]


def check_reduction(reduction: str) -> None:
    """Raise ValueError if the reduction is not one of "batchmean", "mean" and "sum"."""
    if reduction not in ("batchmean", "mean", "sum"):
        raise ValueError(
            f"reduction must be one of 'batchmean', 'mean', 'sum'; got {reduction!r}: for the loss "
            "of each row use fused_kd.KDLoss(reduction='none')"
        )
