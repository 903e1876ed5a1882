"""axolotl's loss of a top-k teacher by its signature (``axolotl.integrations.kd``).

Import :func:`loss` and :class:`ChunkedTopKKDLoss` from here, not from
``axolotl.integrations.kd.topk_logprob.forward_kl``; the tests compare both. The columns become a
:class:`fused_kd.TopK`, see :func:`fused_kd.teachers.servers.from_axolotl`; nothing of the size of
the vocabulary is made for the teacher.
"""

from __future__ import annotations

import math
from functools import partial
from numbers import Real

import torch
from torch import Tensor, nn

from .. import KDLoss
from ..checks import check_dense, may_read_values
from ..teachers.servers import from_axolotl
from ._common.arguments import named
from ._common.probabilities import kl_of_mass

#: Our names → axolotl's.
_NAMES = {
    "temperature": "kd_temperature",
    "num_items": "num_items_in_batch",
    "teacher.logprobs": "target_logprobs",
    "teacher.token_ids": "target_token_ids",
    "token_weight": "exp(target_logprobs)",
}


@named(**_NAMES)
def loss(
    student_logits: Tensor,  # (B, S, V)
    target_token_ids: Tensor,  # (B, S_t, K), S_t <= S
    target_logprobs: Tensor,  # (B, S_t, K)
    target_mask: Tensor,  # (B, S_t, K)
    num_items_in_batch: float | Tensor = -1,
    kd_temperature: float = 1.0,
) -> Tensor:
    """Return Σ q (log q - log p) over the entries of the mask.

    p is the student's softmax at T; q = exp(target_logprobs) is neither softened nor normalized.
    There is no factor T². If a token has several entries in a row, its q is their sum. Positions
    of the student from S_t on do not count.

    Returns:
        0-d: the sum, divided by `num_items_in_batch`, or if that is not positive by the number of
        entries (not of tokens), as in axolotl. Without entries it is 0; axolotl's is NaN.

    Raises:
        TypeError: An argument is no tensor, or has the wrong dtype.
        ValueError: Shapes or numbers do not fit; `target_logprobs` require grad; or, unless the
            tensors are on a GPU or compiled, a log-probability in the mask is NaN or +inf, or a
            token in the mask is outside the vocabulary. One of -inf is that of an absent entry.
    """
    _check(student_logits, target_token_ids, target_logprobs, target_mask)
    kept = target_mask.to(torch.bool)
    _check_tokens(target_token_ids.where(kept, 0), student_logits.shape[-1])
    forward_kl = _forward_kl(kd_temperature)
    teacher = from_axolotl(
        target_token_ids, target_logprobs, target_mask, temperature=kd_temperature, tail="zero"
    )
    divisor = _divisor(target_mask, num_items_in_batch)
    student = student_logits[:, : target_token_ids.shape[1]]
    mass = teacher.logprobs.exp().sum(-1)
    divergence = kl_of_mass(teacher, mass, divisor, partial(forward_kl, student))
    # 0 if all tokens differ: Σ q log q of the entries, and of their sums
    own = _negative_entropy(target_logprobs.float().masked_fill(~kept, -math.inf))
    return divergence + (own - _negative_entropy(teacher.logprobs)) / divisor


class ChunkedTopKKDLoss(nn.Module):
    """The :func:`loss` as a module.

    Args:
        num_output_chunks: not used, since no tensor of the size of the logits is made.
        kd_temperature: temperature of the student's softmax.

    Raises:
        TypeError: The temperature is no number.
        ValueError: The temperature is not positive and finite.
    """

    @named(**_NAMES)
    def __init__(self, num_output_chunks: int = 8, kd_temperature: float = 1.0) -> None:
        super().__init__()
        self.num_output_chunks = num_output_chunks
        self.kd_temperature = kd_temperature
        _forward_kl(kd_temperature)  # refuses what is out of range

    def forward(
        self,
        student_logits: Tensor,  # (B, S, V)
        target_token_ids: Tensor,  # (B, S_t, K)
        target_logprobs: Tensor,  # (B, S_t, K)
        target_mask: Tensor,  # (B, S_t, K)
        num_items_in_batch: float | Tensor = -1,
    ) -> Tensor:
        """Return the loss, 0-d; arguments, result and errors are those of :func:`loss`."""
        columns = target_token_ids, target_logprobs, target_mask
        return loss(student_logits, *columns, num_items_in_batch, self.kd_temperature)


def _negative_entropy(logprobs: Tensor) -> Tensor:
    """Return Σ q log q of all entries, 0-d."""
    q = logprobs.exp()
    return torch.xlogy(q, q).sum()


def _forward_kl(temperature: float) -> KDLoss:
    """Return the forward KL without the factor T²."""
    return KDLoss(hard_weight=0.0, soft_weight=1.0, soft_scale="none", temperature=temperature)


def _divisor(mask: Tensor, num_items: float | Tensor) -> float | Tensor:
    """Return `num_items`, or if it is not positive the number of nonzero entries of the mask.

    That number is taken as at least 1. A tensor is moved to the mask's device.
    Raises as _check_count().
    """
    _check_count(num_items)
    entries = mask.to(torch.bool).sum().clamp(min=1)
    if isinstance(num_items, Tensor):
        return torch.where(num_items.to(mask.device) <= 0, entries, num_items.to(mask.device))
    return num_items if num_items > 0 else entries


def _check_count(num_items: float | Tensor) -> None:
    """Refuse a num_items_in_batch that is not one finite number.

    Raises:
        TypeError: `num_items` is neither a number nor a tensor.
        ValueError: `num_items` is a tensor that is not 0-d; or it is not finite (of a tensor on a
            GPU without FUSED_KD_DEBUG=1, or under ``torch.compile``, that is not checked).
    """
    if not isinstance(num_items, (Real, Tensor)):
        raise TypeError(
            f"num_items_in_batch must be a number or a 0-d tensor; got {type(num_items).__name__}"
        )
    if isinstance(num_items, Tensor):
        if num_items.dim() != 0:
            raise ValueError(
                "num_items_in_batch must be a number or a 0-d tensor; got a tensor of shape "
                f"{tuple(num_items.shape)}"
            )
        if not may_read_values(num_items):
            return
    if not -math.inf < num_items < math.inf:
        raise ValueError(
            f"num_items_in_batch must be finite; got {float(num_items)}: pass -1 to count entries"
        )


def _check_tokens(tokens: Tensor, vocabulary: int) -> None:
    """Refuse tokens outside the vocabulary.

    Values are not read on a GPU (unless FUSED_KD_DEBUG=1) or under ``torch.compile``.

    Raises:
        ValueError: A token is negative, or not below `vocabulary`.
    """
    if tokens.numel() == 0 or not may_read_values(tokens):
        return
    low, high = (int(bound) for bound in torch.aminmax(tokens))
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"target_token_ids must be in [0, {vocabulary}), the student's vocabulary; got "
            f"{low if low < 0 else high}: set target_mask to 0 for an entry that is padding"
        )


def _check(student_logits: Tensor, ids: Tensor, logprobs: Tensor, mask: Tensor) -> None:
    """Refuse tensors whose shapes or dtypes do not fit together; raises as :func:`loss`."""
    for name, x, axes in (
        ("student_logits", student_logits, "(B, S, V)"),
        ("target_token_ids", ids, "(B, S_t, K)"),
    ):
        check_dense(name, x)
        if x.dim() != 3:
            raise ValueError(f"{name} must be {axes}; got shape {tuple(x.shape)}")
    for name, x in (("target_logprobs", logprobs), ("target_mask", mask)):
        check_dense(name, x)
        if x.shape != ids.shape:
            raise ValueError(
                f"{name} must have the shape of target_token_ids, {tuple(ids.shape)}; got "
                f"{tuple(x.shape)}"
            )
    if ids.dtype != torch.int64:
        raise TypeError(
            f"target_token_ids must be int64; got {ids.dtype}: pass target_token_ids.long()"
        )
    batch, length = student_logits.shape[:2]
    if ids.shape[0] != batch or ids.shape[1] > length:
        raise ValueError(
            f"target_token_ids must have the batch size of student_logits, {batch}, and at most "
            f"their length, {length}; got shape {tuple(ids.shape)}"
        )
