"""verl: the teacher's tensors of its distillation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...presets import TAILS
from ...sides import TopK
from .scored import checked


def from_verl(
    teacher_ids: Tensor,  # (B, S, K) or (N, K)
    teacher_logprobs: Tensor,
    attention_mask: Tensor | None = None,  # (B, S) or (N,)
    *,
    tail: str = TAILS["verl"],
) -> TopK:
    """Return verl's ``teacher_ids`` and ``teacher_logprobs`` as a teacher.

    Row i scores the token after token i, so no row moves. The last row of each sequence, and every
    row that verl pads, has the log-probability 0.0 in all its entries, which reads as probability 1
    for each. With K > 1 no teacher has such a row, so it becomes absent. With K = 1 it may be the
    row of a certain teacher, so `attention_mask` must tell. verl asks at temperature 1.

    Args:
        teacher_ids: (B, S, K), int32 or int64; or a nested (jagged) tensor of it.
        teacher_logprobs: the same shape, float32. A nested one becomes (1, N, K), the rows of all
            sequences one after the other, as verl's logits of them are (1, N, V).
        attention_mask: (B, S), nonzero at the tokens; a row counts if the next one is a token too.
            It must be given if K = 1, unless the tensors are nested.
        tail: "zero" (verl's objective but for a factor of each row, see
            :func:`fused_kd.integrations.verl.forward_kl_topk`), "bucket" or "renormalize", see
            :mod:`fused_kd.teachers.servers`.

    Returns:
        A TopK at temperature 1, (B, S, K) or (1, N, K), on the device of the tensors.

    Raises:
        TypeError: One of the tensors is nested, and the other is not.
        ValueError: The shapes do not fit; `attention_mask` is missing, or given for nested tensors;
            a value is not a log-probability; or with "bucket" a row's tail is below 1e-3.
    """
    if teacher_ids.is_nested != teacher_logprobs.is_nested:
        raise TypeError(
            "teacher_ids and teacher_logprobs must both be nested, or both not; got "
            f"is_nested={teacher_ids.is_nested} and {teacher_logprobs.is_nested}"
        )
    is_padding = None
    if teacher_ids.is_nested:
        if attention_mask is not None:
            raise ValueError(
                "attention_mask must be None for nested tensors, which have no padding; got a mask"
            )
        jagged: Any = teacher_logprobs
        last = jagged.offsets()[1:] - 1  # of each sequence: verl adds a row
        teacher_ids, teacher_logprobs = (x.values()[None] for x in (teacher_ids, teacher_logprobs))
        is_padding = torch.zeros_like(teacher_ids[..., 0], dtype=torch.bool)
        is_padding[:, last] = True
    if teacher_ids.shape != teacher_logprobs.shape or teacher_ids.dim() < 2:
        raise ValueError(
            "teacher_ids and teacher_logprobs must have the same shape (..., K); got "
            f"{tuple(teacher_ids.shape)} and {tuple(teacher_logprobs.shape)}"
        )
    if attention_mask is not None:
        if attention_mask.shape != teacher_ids.shape[:-1]:
            raise ValueError(
                "attention_mask must have the leading shape of teacher_ids, "
                f"{tuple(teacher_ids.shape[:-1])}; got {tuple(attention_mask.shape)}"
            )
        is_token = attention_mask != 0
        is_padding = ~is_token | ~torch.nn.functional.pad(is_token[..., 1:], (0, 1))
    if is_padding is None and teacher_ids.shape[-1] == 1:
        raise ValueError(
            "attention_mask must be given for K = 1, where verl's padding of 0.0 cannot be told "
            "from probability 1; got None"
        )
    if teacher_ids.shape[-1] > 1:
        zeros = (teacher_logprobs == 0).all(-1)
        is_padding = zeros if is_padding is None else zeros | is_padding
    assert is_padding is not None
    logprobs = teacher_logprobs.masked_fill(is_padding[..., None], -math.inf)
    return checked(TopK(teacher_ids, logprobs, tail=tail))
