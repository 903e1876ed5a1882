"""vLLM: the log-probabilities of a prompt, its top k or those of given tokens."""

from __future__ import annotations

import base64
import binascii
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...sides import TopK
from .scored import Scored, in_place, scored, without_sentinels

_ASK = (
    "pass the list as the server returned it, for instance "
    "[choice['prompt_logprobs'] for choice in answer['choices']]"
)


def from_vllm(
    prompt_logprobs: Sequence[Any],
    attention_mask: Tensor | None = None,
    *,
    input_ids: Tensor | None = None,
    k: int | None = None,
    tail: str = "bucket",
) -> TopK:
    """Return vLLM's ``prompt_logprobs`` as a teacher.

    Ask for them with ``prompt_logprobs=K`` and token ids as the prompt, of a server that was
    started with ``--max-logprobs`` of at least K (20 by default). vLLM ignores the temperature of
    the request here: the result is at temperature 1, and so must be a loss with the tail "bucket".
    Entry i of an answer scores token i of the prompt, so the first is None, and entry i becomes row
    i - 1. The first id of an entry is the prompt's own token, even if it is not among the K most
    likely ones; so there are up to K + 1. ``prompt_logprobs=-1`` asks for the whole vocabulary,
    whose tail is "renormalize".

    Args:
        prompt_logprobs: of one prompt: a list, or vLLM's FlatLogprobs, of None and of mappings from
            a token id to a ``Logprob``, or to its JSON object. Or of a batch: a list of those.
        attention_mask: (B, S), or (S,) for one prompt: nonzero at the tokens that were sent,
            wherever the padding is. None: padding on the right, up to the longest prompt.
        input_ids: shaped like `attention_mask`, or without it like the result's rows: the tokens
            that were sent. If given, each entry must have its own.
        k: keep the k most likely entries; None: all that were returned, the prompt's own token
            included.
        tail: "bucket", "renormalize" or "zero", see :mod:`fused_kd.teachers.servers`.

    Returns:
        A TopK at temperature 1, (B, S, K') or (S, K') for one prompt, on the device of
        `attention_mask`, else on the CPU. -9999, which the server sends instead of -inf, is absent.

    Raises:
        TypeError: The answer is no list.
        ValueError: The answer has no log-probabilities, or an entry is malformed; the mask or
            `input_ids` does not fit; a value is not a log-probability (the server runs with
            ``--logprobs-mode raw_logits``); or with "bucket" a row's tail is below 1e-3.
    """
    if isinstance(prompt_logprobs, (str, Mapping)) or not isinstance(prompt_logprobs, Sequence):
        got = type(prompt_logprobs).__name__
        raise TypeError(f"prompt_logprobs must be a list; got {got}: {_ASK}")
    is_batch = len(prompt_logprobs) > 0 and not _is_entry(prompt_logprobs[0])
    answers = prompt_logprobs if is_batch else [prompt_logprobs]
    sent = _sent(input_ids, attention_mask, is_batch, len(answers))
    sequences = [_top_of(*pair, k) for pair in zip(answers, sent, strict=True)]
    return in_place(sequences, is_batch, attention_mask, tail)


def from_vllm_token_ids(
    logprobs: Any,
    token_ids: Any,
    attention_mask: Tensor | None = None,
    *,
    start: int | Sequence[int] = 0,
    tail: str = "bucket",
) -> TopK:
    """Return vLLM's log-probabilities of given tokens (``prompt_logprob_token_ids``) as a teacher.

    Row i scores token ``start + i + 1`` of the prompt, so it becomes row ``start + i``. The result
    is at temperature 1, as that of :func:`from_vllm`. Ask ``/inference/v1/generate`` of a server
    that was started with ``--enable-scale-out``; vLLM 0.32 scores given tokens on GPUs only. If
    they are the student's own most likely ones, the teacher's mass outside is large: use "bucket".

    Args:
        logprobs: ``prompt_token_id_logprobs`` of one answer: base64 of an ``.npy`` file, or an
            array, (rows, K), float32. Or of a batch: a list of those.
        token_ids: (rows, K), as they were sent: an array, tensor or lists, shorter ones padded with
            -1, whose log-probability is -inf. Of a batch, a list of those.
        attention_mask: as in :func:`from_vllm`.
        start: ``prompt_logprob_start``; of a batch, one or a list.
        tail: as in :func:`from_vllm`.

    Returns:
        A TopK as from :func:`from_vllm`; the rows before `start` have no entries.

    Raises:
        TypeError: `logprobs` is neither text nor an array.
        ValueError: `logprobs` is no ``.npy`` file; the shapes do not fit; or as from_vllm.
    """
    is_batch = isinstance(logprobs, (list, tuple))
    if not is_batch:
        logprobs, token_ids = [logprobs], [token_ids]
    starts = [start] * len(logprobs) if isinstance(start, int) else list(start)
    if not len(logprobs) == len(token_ids) == len(starts):
        raise ValueError(
            "token_ids and start must have one item for each answer of logprobs, "
            f"{len(logprobs)}; got {len(token_ids)} and {len(starts)}"
        )
    pairs = zip(logprobs, token_ids, starts, strict=True)
    sequences = [_of_given(*pair) for pair in pairs]
    return in_place(sequences, is_batch, attention_mask, tail)


def _is_entry(x: Any) -> bool:
    """Return whether this is an entry of a prompt's log-probabilities, not a list of them."""
    return x is None or isinstance(x, Mapping)


def _sent(
    input_ids: Tensor | None, attention_mask: Tensor | None, is_batch: bool, count: int
) -> list[list[int] | None]:
    """Return the tokens that were sent in each prompt; None if they are not known."""
    if input_ids is None:
        return [None] * count
    shape = tuple(input_ids.shape)
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"input_ids must have the shape of attention_mask, {tuple(attention_mask.shape)}; got "
            f"{shape}"
        )
    if len(shape) != 1 + is_batch or (is_batch and shape[0] != count):
        expected = f"({count}, S), one row for each answer" if is_batch else "(S,)"
        raise ValueError(f"input_ids must have shape {expected}; got {shape}")
    rows = input_ids if is_batch else input_ids[None]
    if attention_mask is None:
        return list(rows.tolist())
    kept = (attention_mask if is_batch else attention_mask[None]) != 0
    return [row[mask].tolist() for row, mask in zip(rows, kept, strict=True)]


def _top_of(answer: Any, sent: list[int] | None, k: int | None) -> Scored:
    """Return the rows of one prompt, whose tokens must be `sent` if that is known."""
    if not isinstance(answer, Sequence) or not all(_is_entry(entry) for entry in answer):
        raise ValueError(
            "prompt_logprobs of a prompt must be a list of None and of mappings from a token id; "
            f"got {str(answer)[:60]!r}: {_ASK}; an answer has them if asked with prompt_logprobs=K"
        )
    if len(answer) == 0 or answer[0]:
        got = "an empty list" if len(answer) == 0 else f"one with {len(answer[0])} entries"
        raise ValueError(
            "the first entry of prompt_logprobs must be None, since nothing precedes the first "
            f"token; got {got}: {_ASK}"
        )
    if len(answer) > 1 and not any(answer):
        raise ValueError(
            "prompt_logprobs must have entries after the first; got None in all positions: ask "
            "with prompt_logprobs=K"
        )
    rows = []
    for i, entry in enumerate(answer):
        if i == 0:
            continue
        rows.append(_entries(entry or {}, i, k))
        if sent is not None and i < len(sent) and not _has(entry or {}, sent[i]):
            raise ValueError(
                "each entry of prompt_logprobs must have the prompt's own token of input_ids; got "
                f"none for token {sent[i]} at position {i}: send token ids to the server, not "
                "text, which it may tokenize otherwise"
            )
    return scored(rows)


def _has(entry: Mapping[Any, Any], token: int) -> bool:
    """Return whether an entry has a token, by an int or, in JSON, by a string."""
    return token in entry or str(token) in entry


def _entries(
    entry: Mapping[Any, Any], position: int, k: int | None
) -> tuple[list[int], list[float]]:
    """Return ids and log-probabilities of an entry, or of its k largest ones."""
    try:
        pairs = [(int(token), _number(value)) for token, value in entry.items()]
    except (KeyError, AttributeError, TypeError, ValueError):
        raise ValueError(
            "an entry of prompt_logprobs must map token ids to objects with a logprob; got "
            f"{str(dict(entry))[:60]!r} at position {position}: {_ASK}"
        ) from None
    if k is not None:
        pairs = sorted(pairs, key=lambda pair: -pair[1])[:k]  # stable: ties as vLLM ordered them
    return [token for token, _ in pairs], [value for _, value in pairs]


def _number(value: Any) -> float:
    """Return the log-probability of a Logprob or its JSON object."""
    return float(value["logprob"] if isinstance(value, Mapping) else value.logprob)


def _of_given(logprobs: Any, token_ids: Any, start: int) -> Scored:
    """Return the rows of one prompt, of the tokens that were sent."""
    values = torch.from_numpy(_array(logprobs)).float()
    ids = _matrix(token_ids)
    if values.dim() != 2 or values.shape != ids.shape:
        raise ValueError(
            "logprobs must be (rows, K), as token_ids are; got "
            f"{tuple(values.shape)} and {tuple(ids.shape)}: pass the ids that were sent"
        )
    if start < 0:
        raise ValueError(f"start must be at least 0, as prompt_logprob_start; got {start}")
    values = values.masked_fill(ids < 0, -math.inf)
    return Scored(ids.clamp(min=0), without_sentinels(values), start)


def _array(x: Any) -> np.ndarray[Any, Any]:
    """Return the array of an ``.npy`` file in base64, or an array as it is."""
    if isinstance(x, np.ndarray):
        return x
    if not isinstance(x, (str, bytes)):
        raise TypeError(
            "logprobs must be base64 text of an .npy file, or a numpy array; got "
            f"{type(x).__name__}: pass prompt_token_id_logprobs of the answer"
        )
    try:
        file = io.BytesIO(base64.b64decode(x, validate=True))
        return np.asarray(np.load(file, allow_pickle=False))
    except (binascii.Error, ValueError, EOFError) as error:
        raise ValueError(
            f"logprobs must be base64 text of an .npy file; got {str(x)[:24]!r} ({error}): pass "
            "prompt_token_id_logprobs of the answer"
        ) from None


def _matrix(token_ids: Any) -> Tensor:
    """Return ids (rows, K), int64; lists are padded with -1."""
    if isinstance(token_ids, (Tensor, np.ndarray)):
        return torch.as_tensor(token_ids).cpu().to(torch.int64)
    width = max((len(row) for row in token_ids), default=0)
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in token_ids]).long()
