"""The exact mean where an update's tokens are spread over ranks and micro-batches.

DistributedDataParallel and FSDP2 average gradients over ranks, however many tokens each of them
kept; so does a loop over micro-batches that divides by their number. What is wanted is the mean
over all kept tokens of the update. Either count them first and give the count to the loss::

    num_items = global_num_items(*labels_of_all_micro_batches)
    for batch, labels in ...:
        loss_fn(student(batch), teacher(batch), labels, num_items=num_items).backward()

or, where the loop hands out one micro-batch at a time, give it sums and divide at the end::

    loss_fn(student(batch), teacher(batch), labels, num_items=1).backward()
    ...
    divide_gradients(student.parameters(), global_num_items(*labels_seen))
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch import distributed as dist

from .heads import IGNORED


def global_num_items(
    *labels: Tensor, ignore_index: int = IGNORED, group: dist.ProcessGroup | None = None
) -> Tensor:
    """The `num_items` of an update: its kept tokens on all ranks, divided by the number of ranks.

    One all-reduce of one integer, which every rank has to come to, also one that keeps no token
    (its loss is 0, and its backward runs as any other's). The host does not wait for a GPU.

    Args:
        labels: (...), integers, as the loss gets them: those of every micro-batch of this rank.
        ignore_index: as the loss's.
        group: the ranks that gradients are averaged over; None: all. Without an initialised
            process group: this process alone.

    Returns:
        0-d, float64, on the labels' device. It does not survive a cast to 16 bits: FSDP2's mixed
        precision casts what the outermost module is called with, unless told not to
        (``MixedPrecisionPolicy(..., cast_forward_inputs=False)``).

    Raises:
        ValueError: no labels are given.
    """
    if not labels:
        raise ValueError("labels must be given, of every micro-batch of the update; got none")
    kept = torch.stack([(x != ignore_index).sum() for x in labels]).sum()
    ranks = 1
    if dist.is_available() and dist.is_initialized():
        ranks = dist.get_world_size(group)
        dist.all_reduce(kept, group=group)
    return kept.to(torch.float64) / ranks


def divide_gradients(parameters: Iterable[nn.Parameter], num_items: Tensor) -> None:
    """Makes the gradients of sums those of their mean, in place.

    To be called after the last backward of an update, before gradients are clipped.

    Args:
        parameters: those without a gradient are left alone; sharded ones are as good.
        num_items: 0-d, of :func:`global_num_items`; if it is 0 the gradients become 0.
    """
    factor = torch.where(num_items == 0, 0.0, 1.0 / num_items)
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(factor)
