"""TRL: the answers of its client for a teacher's server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...presets import TAILS
from ...sides import TopK
from .scored import Scored, in_place, without_sentinels


def from_trl(
    answer: Mapping[str, Any],
    prompt_lengths: Sequence[int],
    attention_mask: Tensor | None = None,
    *,
    tail: str = TAILS["trl"],
) -> TopK:
    """Return the answer of TRL's ``VLLMClient.get_sequence_logprobs`` as a teacher.

    Row j of a sequence scores its completion's token j, which is token ``prompt_length + j`` of the
    whole sequence, so it becomes row ``prompt_length + j - 1``. The client sends its `temperature`
    along, but vLLM ignores that for a prompt: the result is at temperature 1, and so must be a loss
    with the tail "bucket". With "renormalize" the loss changes the temperature exactly; TRL's own
    trainer compares the student at T with the teacher at 1.

    Args:
        answer: a mapping with ``logprobs`` and ``logprob_token_ids``, (B, completion, K) each, as
            lists of different lengths; padding is -inf and 0.
        prompt_lengths: as they were passed to the client, each at least 1.
        attention_mask: (B, S): nonzero at the tokens of prompt and completion, wherever the padding
            is. None: padding on the right, up to the longest sequence.
        tail: "bucket" (TRL's ``loss_add_tail=True``), "renormalize" (False) or "zero", see
            :mod:`fused_kd.teachers.servers`.

    Returns:
        A TopK at temperature 1, (B, S, K), on the device of `attention_mask`, else on the CPU; rows
        of the prompt, but the last, have no entries.

    Raises:
        TypeError: The answer is no mapping, or lacks a key.
        ValueError: Lengths or shapes do not fit; a value is not a log-probability; or with "bucket"
            a row's tail is below 1e-3.
    """
    keys = ("logprob_token_ids", "logprobs")
    if not isinstance(answer, Mapping) or not set(keys) <= answer.keys():
        got = sorted(map(str, answer)) if isinstance(answer, Mapping) else type(answer).__name__
        raise TypeError(
            f"answer must be a mapping with {keys[0]!r} and {keys[1]!r}; got {got}: pass what "
            "get_sequence_logprobs of TRL's VLLMClient returned"
        )
    token_ids, logprobs = (answer[key] for key in keys)
    if not len(token_ids) == len(logprobs) == len(prompt_lengths):
        raise ValueError(
            f"prompt_lengths must have one item for each sequence of the answer, {len(logprobs)}; "
            f"got {len(prompt_lengths)}"
        )
    rows = zip(token_ids, logprobs, map(int, prompt_lengths), strict=True)
    sequences = [_scored(i, *row) for i, row in enumerate(rows)]
    return in_place(sequences, True, attention_mask, tail)


def _scored(row: int, token_ids: Any, logprobs: Any, prompt_length: int) -> Scored:
    """Return the rows of one completion."""
    if prompt_length < 1:
        raise ValueError(
            f"prompt_lengths must be at least 1, since nothing scores a first token; got "
            f"{prompt_length} in row {row}"
        )
    ids, values = torch.as_tensor(token_ids), torch.as_tensor(logprobs, dtype=torch.float32)
    if len(ids) == 0:  # an empty completion: TRL has no K for it
        ids, values = ids.view(0, 0), values.view(0, 0)
    if ids.shape != values.shape or ids.dim() != 2:
        raise ValueError(
            "logprob_token_ids and logprobs must both be (completion, K) for each sequence; got "
            f"{tuple(ids.shape)} and {tuple(values.shape)} in row {row}"
        )
    return Scored(ids.long(), without_sentinels(values), prompt_length - 1)
