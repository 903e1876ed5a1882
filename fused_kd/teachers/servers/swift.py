"""ms-swift: the teacher's tensors of its GKD trainer."""

from __future__ import annotations

from torch import Tensor

from ...presets import TAILS
from ...sides import TopK
from .scored import checked


def from_swift(
    topk_indices: Tensor,  # (B, S, K)
    topk_logprobs: Tensor,  # (B, S, K)
    *,
    tail: str = TAILS["swift"],
) -> TopK:
    """Return ms-swift's ``topk_indices`` and ``topk_logprobs`` as a teacher.

    Row i scores the token after token i, so no row moves; ms-swift's labels are shifted likewise.
    Rows that the teacher's server did not score are -inf, and count here; ms-swift leaves them out
    of the mean, so its loss is larger: give them the label -100 for the same number. A server's
    values are at temperature 1, and with "renormalize" the loss changes that exactly, as ms-swift
    does. A local teacher's values are logits: they need "renormalize" or "zero".

    Args:
        topk_indices: (..., K), int64; 0 where `topk_logprobs` is -inf.
        topk_logprobs: (..., K), float32.
        tail: "renormalize" (ms-swift's objective), "bucket" or "zero", see
            :mod:`fused_kd.teachers.servers`.

    Returns:
        A TopK at temperature 1 with these tensors.

    Raises:
        ValueError: The shapes differ; a value is not a log-probability; or with "bucket" a row's
            tail is below 1e-3.
    """
    if topk_indices.shape != topk_logprobs.shape or topk_indices.dim() < 2:
        raise ValueError(
            "topk_indices and topk_logprobs must have the same shape (..., K); got "
            f"{tuple(topk_indices.shape)} and {tuple(topk_logprobs.shape)}"
        )
    return checked(TopK(topk_indices, topk_logprobs, tail=tail))
