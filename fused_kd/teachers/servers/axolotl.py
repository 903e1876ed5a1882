"""axolotl: the columns of its data sets for distillation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...classes import merged
from ...presets import TAILS
from ...sides import TopK
from .scored import checked, without_sentinels


def from_axolotl(
    target_token_ids: Tensor,  # (B, S, K)
    target_logprobs: Tensor,  # (B, S, K)
    target_mask: Tensor,  # (B, S, K)
    *,
    temperature: float = 1.0,
    is_late: bool = False,
    tail: str = TAILS["axolotl"],
) -> TopK:
    """Return axolotl's ``target_token_ids``, ``target_logprobs`` and ``target_mask`` as a teacher.

    An entry whose mask is 0 is absent, and so is one of -9999 or less (axolotl pads with -1e9 and
    -inf). Entries of the same token in a row are merged: their masses are added.

    **Late rows.** axolotl 0.19 compares row i with the student's row i, which predicts token i + 1.
    The rows of its offline data sets (``axolotl.integrations.kd.chat_template``), and those that
    its collator gets from an SGLang server, score token i itself: they are one position late, and
    need ``is_late=True``. Those that its collator gets from a vLLM server are in place.
    :func:`fused_kd.teachers.formats.from_axolotl` reads a sample of a data set.

    Args:
        target_token_ids: (..., S, K), int64; any value where the mask is 0.
        target_logprobs: (..., S, K), of a floating dtype.
        target_mask: (..., S, K), nonzero for an entry.
        temperature: at which the log-probabilities are: ``kd_temperature`` for a data set, whose
            columns axolotl has softened; 1 for a server's, which ignores the temperature.
        is_late: whether row i scores token i: all rows then move one position earlier, and the last
            one has no entries.
        tail: "renormalize" (what axolotl's trainer computes with ``kd_normalize_topk``) or "zero".
            "bucket" is only for columns that axolotl has not renormalized
            (``kd_normalize_topk: false``), see :mod:`fused_kd.teachers.servers`.

    Returns:
        A TopK, (..., S, K), on the device of the tensors; the log-probabilities have the columns'
        dtype, but at least float32.

    Raises:
        ValueError: The shapes differ; a value is not a log-probability; or with "bucket" a row's
            tail is below 1e-3.
    """
    if not target_token_ids.shape == target_logprobs.shape == target_mask.shape:
        raise ValueError(
            "target_token_ids, target_logprobs and target_mask must have the same shape "
            f"(..., S, K); got {tuple(target_token_ids.shape)}, {tuple(target_logprobs.shape)} and "
            f"{tuple(target_mask.shape)}"
        )
    dtype = torch.promote_types(target_logprobs.dtype, torch.float32)
    logprobs = without_sentinels(target_logprobs.to(dtype)).masked_fill(target_mask == 0, -math.inf)
    token_ids = target_token_ids
    if is_late:
        token_ids, logprobs = _earlier(token_ids, 0), _earlier(logprobs, -math.inf)
    logprobs = merged(token_ids, logprobs)
    return checked(TopK(token_ids, logprobs, tail=tail, temperature=temperature))


def _earlier(x: Tensor, fill: float) -> Tensor:
    """Return (..., S, K) with each row moved one position earlier; the last becomes `fill`."""
    moved = torch.full_like(x, fill)
    moved[..., :-1, :] = x[..., 1:, :]
    return moved
