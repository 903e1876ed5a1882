"""What the converters of servers' answers share: the scored rows of sequences, put in place."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...checks import check_topk_values, masses, may_read_values
from ...sides import TopK

#: Log-probabilities up to this one are absent: vLLM's HTTP server sends it instead of -inf, which
#: JSON does not have. As a probability it is 0 in any dtype.
ABSENT = -9999.0
#: Ids that no vocabulary has; larger ones do not fit into int32.
NO_VOCABULARY = 2**31


class Scored(NamedTuple):
    """The rows of one sequence that a server has scored.

    Row j scores token ``begin + j + 1`` of the sequence, so it belongs to row ``begin + j`` of the
    logits. The last row scores the last token, whose own row of logits is not scored.
    """

    token_ids: Tensor  # (rows, K), int64
    logprobs: Tensor  # (rows, K), float32; -inf: absent
    begin: int

    @property
    def length(self) -> int:
        """Return the number of tokens of the sequence."""
        return self.begin + len(self.token_ids) + 1


def scored(rows: Iterable[tuple[list[int], list[float]]], begin: int = 0) -> Scored:
    """Return the ids and log-probabilities of each row, padded to the longest row."""
    listed = list(rows)
    counts = torch.tensor([len(ids) for ids, _ in listed], dtype=torch.int64)
    width = int(counts.max()) if listed else 0
    kept = torch.arange(width) < counts[:, None]
    token_ids = torch.zeros(len(listed), width, dtype=torch.int64)
    logprobs = torch.full((len(listed), width), -math.inf)
    token_ids[kept] = torch.tensor([x for ids, _ in listed for x in ids], dtype=torch.int64)
    logprobs[kept] = torch.tensor([x for _, values in listed for x in values])
    return Scored(token_ids, without_sentinels(logprobs), begin)


def without_sentinels(logprobs: Tensor) -> Tensor:
    """Return log-probabilities with -inf instead of ABSENT and less."""
    return logprobs.masked_fill(logprobs <= ABSENT, -math.inf)


def in_place(
    sequences: Sequence[Scored], is_batch: bool, attention_mask: Tensor | None, tail: str
) -> TopK:
    """Return a TopK whose rows are aligned with the logits of the sequences.

    Args:
        sequences: one for each row of the batch.
        is_batch: whether the result has a batch dimension; without, there is one sequence.
        attention_mask: (B, S), or (S,) without a batch: nonzero at the tokens of each sequence,
            wherever the padding is. None: padding on the right, up to the longest sequence.
        tail: as in :class:`fused_kd.TopK`.

    Returns:
        A TopK at temperature 1, (B, S, K) or (S, K), on the device of `attention_mask`, else on the
        CPU; ids int64, log-probabilities float32.

    Raises:
        ValueError: The mask has another shape, or another number of tokens than a sequence; or a
            value does not fit, see :class:`fused_kd.TopK`.
    """
    places = _places(sequences, is_batch, attention_mask)
    length = max((len(place) for place in places), default=0)
    width = max((x.token_ids.shape[-1] for x in sequences), default=0)
    if attention_mask is not None:
        length = attention_mask.shape[-1]
    token_ids = torch.zeros(len(sequences), length, width, dtype=torch.int64)
    logprobs = torch.full((len(sequences), length, width), -math.inf)
    for row, (x, place) in enumerate(zip(sequences, places, strict=True)):
        at = place[x.begin : x.length - 1]
        token_ids[row, at, : x.token_ids.shape[-1]] = x.token_ids
        logprobs[row, at, : x.logprobs.shape[-1]] = x.logprobs
    topk = TopK(token_ids, logprobs, tail=tail)
    checked(topk)
    topk = topk if is_batch else topk.rows(0)
    return topk if attention_mask is None else topk.to(attention_mask.device)


def checked(topk: TopK) -> TopK:
    """Return a TopK whose values the loss accepts, for any vocabulary; raises as the loss does.

    Values are not read on a GPU (unless FUSED_KD_DEBUG=1) or under ``torch.compile``.
    """
    if may_read_values(topk.token_ids) and may_read_values(topk.logprobs):
        check_topk_values(topk, NO_VOCABULARY)
    return topk


def with_tail(topk: TopK, floor: float = 1e-5) -> TopK:
    """Return a TopK whose tail is 1 - Σ exp(logprobs), but at least `floor`, with "bucket".

    The loss refuses to compute a tail below 1e-3, since it is mostly the rounding of the
    log-probabilities. That of float32 moves the sum by up to about 1e-6, so with a floor above that
    the tail is wrong by at most the floor, in rows whose tail is smaller. So is the gradient; the
    divergence is by some ten times as much, and "reverse_kl" by more. Use it for a server's answer
    if some rows are certain and others are not; a tail that was measured is better.

    Args:
        topk: float32 or float64 log-probabilities, normalised over the whole vocabulary.
        floor: the smallest mass of the tail, positive.

    Returns:
        The same entries with ``tail="bucket"`` and `tail_logprob` in their dtype. The masses of a
        row with the floor are divided by their sum. A row without entries has a tail of mass 1.

    Raises:
        TypeError: The log-probabilities are 16-bit.
        ValueError: `floor` is not in (0, 1), or the probabilities of a row have a sum above 1.
    """
    dtype = topk.logprobs.dtype
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(
            "topk.logprobs must be float32 or float64, since 1 minus the sum of others is mostly "
            f"rounding; got {dtype}: measure the tail (TopK.from_logits does)"
        )
    if not 0 < floor < 1:
        raise ValueError(f"floor must be in (0, 1); got {floor}")
    mass, slack = masses(topk)
    if may_read_values(mass) and mass.numel() > 0 and mass.max().item() > 1 + slack:
        raise ValueError(
            "topk.logprobs must hold probabilities whose sum is at most 1 in each row; got "
            f"{mass.max().item():.6g}: logits, or padding with 0.0, are no log-probabilities"
        )
    tail = (1.0 - mass).clamp(min=floor)
    total = (mass + tail).clamp(min=1.0).log()  # 0 unless the floor was used
    return topk._replace(
        logprobs=(topk.logprobs - total[..., None]).to(dtype),
        tail_logprob=(tail.log() - total).to(dtype),
        tail="bucket",
    )


def _places(
    sequences: Sequence[Scored], is_batch: bool, attention_mask: Tensor | None
) -> list[Tensor]:
    """Return the positions of each sequence's tokens in its row of the batch."""
    if attention_mask is None:
        return [torch.arange(x.length) for x in sequences]
    shape = tuple(attention_mask.shape)
    if attention_mask.dim() != 1 + is_batch or (is_batch and shape[0] != len(sequences)):
        expected = f"({len(sequences)}, S), one row for each answer" if is_batch else "(S,)"
        raise ValueError(f"attention_mask must have shape {expected}; got {shape}")
    rows = attention_mask.cpu() if is_batch else attention_mask.cpu()[None]
    places = [row.nonzero().flatten() for row in rows]
    for row, (x, place) in enumerate(zip(sequences, places, strict=True)):
        if len(place) != x.length:
            raise ValueError(
                f"attention_mask must have one token for each that the server scored, {x.length} "
                f"in answer {row}; got {len(place)}: send the same token ids to the server that "
                "the student gets, not text, which the server may tokenize otherwise"
            )
    return places
