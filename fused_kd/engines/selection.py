"""Which rows are computed, and how those of a chunk are read and written."""

from __future__ import annotations

import torch
from torch import Tensor


class Selection:
    """The rows that are computed: all of them, or those of an index.

    On a CPU, rows without a weight are left out. On a GPU the host would have to synchronise to
    find these rows: it leaves rows out only if `kept_rows` bounds the number of the others.

    Args:
        rows: the number of all rows, N.
        w_hard: the weights of H, (N,); None: the term is off.
        w_soft: the weights of S, likewise. Without either, no row is computed.
        kept_rows: an upper bound of the rows with a weight, or None; used on a GPU only. If there
            are more, the last ones are left out.
    """

    def __init__(
        self, rows: int, w_hard: Tensor | None, w_soft: Tensor | None, kept_rows: int | None
    ) -> None:
        self.all = self.count = rows  # of all, and of the computed rows
        self.index: Tensor | None = None  # the computed rows; None: all, or none if count is 0
        self.dropped: Tensor | None = None  # the rows that the index leaves out
        self.mask: Tensor | None = None  # bool (N,): rows with a weight, if all are computed
        weights = [w for w in (w_hard, w_soft) if w is not None]
        if not weights:
            self.count = 0
            return
        has_weight = (torch.stack(weights) != 0).any(0)
        if _host_can_read(has_weight):
            if not bool(has_weight.all()):
                self.index = has_weight.nonzero().squeeze(1)
                self.dropped = (~has_weight).nonzero().squeeze(1)
        else:
            self.mask = has_weight
            if kept_rows is not None:
                order = torch.argsort((~has_weight).byte(), stable=True)
                self.index, self.dropped = order[:kept_rows], order[kept_rows:]
        if self.index is not None:
            self.count = self.index.shape[0]

    @property
    def gathers(self) -> bool:
        """Return True if the rows of a chunk are copied even if they are contiguous."""
        return self.index is not None or self.mask is not None

    def at(self, part: slice) -> slice | Tensor:
        """Return the rows at these positions among the computed ones: a slice, or indices."""
        return part if self.index is None else self.index[part]


def _host_can_read(x: Tensor) -> bool:
    return x.device.type == "cpu"


def take(x: Tensor, rows: slice | Tensor) -> Tensor:
    """Return these rows of x (..., K) as (C, K), last stride 1: a view if possible, else a copy.

    `rows` counts in the flattened leading dimensions; a slice has start and stop, but no step.

    Indices are computed on the device from Python numbers. A tensor built on the host would be
    copied to the device, which blocks the host and which a CUDA graph refuses.
    """
    folded = _folded(x)
    if folded is not None:
        part = folded[rows]
        return part if part.stride(-1) == 1 else part.contiguous()
    return x[_leading_index(x, rows)].contiguous()


def put(x: Tensor, rows: slice | Tensor, values: Tensor | float) -> None:
    """Overwrite these rows of x (..., K), as in :func:`take`, by values (C, K) or a number.

    Values are converted to the dtype of x.
    """
    if not isinstance(values, Tensor):  # filled on the device: nothing is copied from the host
        values = x.new_full((), values)
    folded = _folded(x)
    if folded is not None:
        folded[rows] = values
    else:
        x[_leading_index(x, rows)] = values


def is_scattered(x: Tensor) -> bool:
    """Return True if :func:`take` copies rows of x even if they are consecutive."""
    folded = _folded(x)
    return folded is None or folded.stride(-1) != 1


def _leading_index(x: Tensor, rows: slice | Tensor) -> tuple[Tensor, ...]:
    """Return the index of each row in every leading dimension of x, for advanced indexing."""
    if isinstance(rows, slice):
        rows = torch.arange(rows.start, rows.stop, device=x.device)
    index: list[Tensor] = []
    for size in reversed(x.shape[1:-1]):
        index.append(rows % size)
        rows = rows // size
    return (rows, *reversed(index))


def _folded(x: Tensor) -> Tensor | None:
    """Return x (..., K) as a view (N, K); None if the leading dimensions do not fold into one."""
    try:
        return x.view(-1, x.shape[-1])
    except RuntimeError:
        return None
