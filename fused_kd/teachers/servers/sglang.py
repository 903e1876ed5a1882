"""SGLang: the top log-probabilities of an input."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ...sides import TopK
from .scored import Scored, in_place, scored

_ASK = (
    "pass answer['meta_info']['input_top_logprobs'] of a request with return_logprob=True, "
    "top_logprobs_num=K and logprob_start_len=0"
)


def from_sglang(
    input_top_logprobs: Sequence[Any],
    attention_mask: Tensor | None = None,
    *,
    start: int | Sequence[int] = 0,
    tail: str = "bucket",
) -> TopK:
    """Return SGLang's ``input_top_logprobs`` as a teacher.

    Ask for them with ``input_ids``, ``return_logprob=True``, ``top_logprobs_num=K`` and
    ``logprob_start_len=0``; by default SGLang scores no token of the input. It ignores the
    temperature of the request here: the result is at temperature 1, and so must be a loss with the
    tail "bucket". Entry i of an answer scores token ``start + i`` of the input; the first is None,
    whatever `start` is. Entry i becomes row ``start + i - 1``. Unlike vLLM's, entries do not have
    the input's own token if it is not among the K most likely ones.

    Args:
        input_top_logprobs: of one input: a list of None and of lists of
            ``[logprob, token id, text]``. Or of a batch: a list of those.
        attention_mask: (B, S), or (S,) for one input: nonzero at the tokens that were sent,
            wherever the padding is. None: padding on the right, up to the longest input.
        start: ``logprob_start_len`` of the request; of a batch, one or a list.
        tail: "bucket", "renormalize" or "zero", see :mod:`fused_kd.teachers.servers`.

    Returns:
        A TopK at temperature 1, (B, S, K) or (S, K) for one input, on the device of
        `attention_mask`, else on the CPU; rows before `start` have no entries. A logprob of null,
        which the server sends instead of -inf, is absent.

    Raises:
        TypeError: The answer is no list.
        ValueError: The answer has no log-probabilities, or an entry is malformed or only null (the
            teacher's logits are NaN); the mask does not fit; a value is not a log-probability; or
            with "bucket" a row's tail is below 1e-3.
    """
    if not isinstance(input_top_logprobs, (list, tuple)):
        got = type(input_top_logprobs).__name__
        raise TypeError(f"input_top_logprobs must be a list; got {got}: {_ASK}")
    is_batch = _is_batch(input_top_logprobs)
    answers = input_top_logprobs if is_batch else [input_top_logprobs]
    starts = [start] * len(answers) if isinstance(start, int) else list(start)
    if len(starts) != len(answers):
        raise ValueError(
            f"start must have one item for each answer, {len(answers)}; got {len(starts)}"
        )
    sequences = [_scored(*pair) for pair in zip(answers, starts, strict=True)]
    return in_place(sequences, is_batch, attention_mask, tail)


def _is_batch(answers: Sequence[Any]) -> bool:
    """Return whether these are the answers of several inputs: lists that begin with None."""
    first = answers[0] if answers else None
    return isinstance(first, (list, tuple)) and (not first or first[0] is None)


def _scored(answer: Sequence[Any], start: int) -> Scored:
    """Return the rows of one input."""
    if start < 0:
        raise ValueError(f"start must be at least 0, as logprob_start_len; got {start}")
    if not isinstance(answer, (list, tuple)) or not answer or answer[0]:
        raise ValueError(
            "the first entry of input_top_logprobs must be None, since it scores nothing; got "
            f"{str(answer)[:60]!r}: {_ASK}"
        )
    if len(answer) > 1 and not any(answer):
        raise ValueError(
            "input_top_logprobs must have entries after the first; got None in all positions: "
            f"{_ASK}"
        )
    rows = [_entries(entry or (), i) for i, entry in enumerate(answer) if i > 0]
    return scored(rows, start)


def _entries(entry: Sequence[Any], position: int) -> tuple[list[int], list[float]]:
    """Return ids and log-probabilities of an entry."""
    try:
        pairs = [(int(token), -math.inf if x is None else float(x)) for x, token, *_ in entry]
    except (TypeError, ValueError):
        raise ValueError(
            "an entry of input_top_logprobs must be a list of [logprob, token id, text]; got "
            f"{str(dict(entry) if isinstance(entry, Mapping) else entry)[:60]!r} at position "
            f"{position}: {_ASK}"
        ) from None
    if pairs and all(value == -math.inf for _, value in pairs):
        raise ValueError(
            f"an entry of input_top_logprobs must have a number; got only null at position "
            f"{position}, as SGLang sends if the teacher's logits are NaN: look at the teacher"
        )
    return [token for token, _ in pairs], [value for _, value in pairs]
