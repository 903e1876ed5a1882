"""Helpers for your own training loop: labels, heads, and the exact mean of an update.

DistributedDataParallel and FSDP2 average gradients over ranks, regardless of the number of tokens
that each of them kept. A loop over micro-batches that divides by their number does the same. The
intended loss is the mean over all kept tokens of the update. Either count these tokens first, and
pass the count to the loss::

    num_items = global_num_items(*labels_of_all_micro_batches)
    for batch, labels in ...:
        loss_fn(student(batch), teacher(batch), labels, num_items=num_items).backward()

or, if the loop yields one micro-batch at a time, compute sums and divide at the end::

    loss_fn(student(batch), teacher(batch), labels, num_items=1).backward()
    ...
    divide_gradients(student.parameters(), global_num_items(*labels_seen))

A causal language model's labels are those of the next token: :func:`shifted` makes them. For a
:class:`fused_kd.Head`, ``with headless(model)`` makes ``model(...).logits`` the hidden states, to
which ``head_of(model)`` is applied.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ._common.heads import head_of, headless
from ._common.labels import IGNORE_INDEX, shifted

__all__ = ["divide_gradients", "global_num_items", "head_of", "headless", "shifted"]


def global_num_items(
    *labels: Tensor, ignore_index: int = IGNORE_INDEX, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Return `num_items` of an update: the kept tokens of all ranks / the number of ranks.

    This is one all-reduce of one integer. Every rank must call it, including a rank that keeps no
    token (its loss is 0, and its backward runs like any other). The host does not wait for a GPU.

    Args:
        labels: (...), integers, as passed to the loss: those of every micro-batch of this rank, on
            one device, whose tensors the group can reduce (for NCCL: a GPU).
        ignore_index: that of the loss.
        group: the ranks that gradients are averaged over; None: all. Without an initialised
            process group: this process alone.

    Returns:
        0-d, float64, on the labels' device. A cast to 16 bits would round it: FSDP2's mixed
        precision casts the inputs of the outermost module, unless it is created with
        ``MixedPrecisionPolicy(..., cast_forward_inputs=False)``.

    Raises:
        TypeError: An argument is not a tensor of integers.
        ValueError: No labels are passed.
    """
    if not labels:
        raise ValueError("labels must be those of every micro-batch of the update; got none")
    for x in labels:
        if not isinstance(x, Tensor) or x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"labels must be tensors of integers; got {kind}")
    kept = torch.stack([(x != ignore_index).sum() for x in labels]).sum()
    ranks = 1
    if dist.is_available() and dist.is_initialized():
        ranks = dist.get_world_size(group)
        dist.all_reduce(kept, group=group)
    return kept.to(torch.float64) / ranks


def divide_gradients(parameters: Iterable[nn.Parameter], num_items: float | Tensor) -> None:
    """Divide the gradients of summed losses by `num_items`, in place.

    Call it after the last backward of an update, before gradients are clipped.

    Args:
        parameters: parameters, which may be sharded; those without a gradient are skipped.
        num_items: a number, or the 0-d tensor that :func:`global_num_items` returns. If it is 0
            the gradients become 0, even infinite ones.

    Raises:
        TypeError: `num_items` is neither a number nor a tensor.
        ValueError: `num_items` is a tensor that is not 0-d.
    """
    if not isinstance(num_items, (int, float, Tensor)):
        raise TypeError(
            f"num_items must be a number or a 0-d tensor; got {type(num_items).__name__}"
        )
    count = torch.as_tensor(num_items, dtype=torch.float64)
    if count.dim() != 0:
        raise ValueError(
            "num_items must be a number or a 0-d tensor; got a tensor of shape "
            f"{tuple(count.shape)}: pass its sum, or the result of global_num_items()"
        )
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None:
            divisor = count.to(gradient.device)
            gradient.mul_(torch.where(divisor == 0, 0.0, 1.0 / divisor))
            gradient.masked_fill_(divisor == 0, 0.0)  # 0 times infinity is not 0
