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
        TypeError: labels that are no tensor of integers.
        ValueError: no labels are given.
    """
    if not labels:
        raise ValueError("labels must be given, of every micro-batch of the update; got none")
    for given in labels:
        if not isinstance(given, Tensor) or given.is_floating_point():
            found = given.dtype if isinstance(given, Tensor) else type(given).__name__
            raise TypeError(f"labels must be tensors of integers; got {found}")
    kept = torch.stack([(x != ignore_index).sum() for x in labels]).sum()
    ranks = 1
    if dist.is_available() and dist.is_initialized():
        ranks = dist.get_world_size(group)
        dist.all_reduce(kept, group=group)
    return kept.to(torch.float64) / ranks


def divide_gradients(parameters: Iterable[nn.Parameter], num_items: float | Tensor) -> None:
    """Makes the gradients of sums those of their mean, in place.

    To be called after the last backward of an update, before gradients are clipped.

    Args:
        parameters: those without a gradient are left alone; sharded ones are as good.
        num_items: a number, or 0-d of :func:`global_num_items`; if it is 0 the gradients become 0,
            whatever they were.

    Raises:
        TypeError: num_items is neither.
        ValueError: it is a tensor of more dimensions.
    """
    if not isinstance(num_items, (int, float, Tensor)):
        raise TypeError(
            f"num_items must be a number or a 0-d tensor; got {type(num_items).__name__}"
        )
    count = torch.as_tensor(num_items, dtype=torch.float64)
    if count.dim() != 0:
        raise ValueError(f"num_items must be a number or a 0-d tensor; got {tuple(count.shape)}")
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None:
            here = count.to(gradient.device)
            gradient.mul_(torch.where(here == 0, 0.0, 1.0 / here))
            gradient.masked_fill_(here == 0, 0.0)  # 0 times infinity is not 0
