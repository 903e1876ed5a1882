"""Make a batch of samples with TopKs, which a DataLoader's default cannot stack."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import default_collate

from ..sides import TopK


def collate(samples: Sequence[Any], length: int | None = None, name: str = "") -> Any:
    """Return a batch: the ``collate_fn`` of a DataLoader whose samples have TopKs.

    Entries of mappings and tuples are collated each on its own. Sequences of different lengths are
    padded at the end: TopKs (n, K) by rows without entries, whose soft term is 0; tensors and lists
    of numbers (n,) by 0, or -100 if they are called "labels". A TopK with fewer than the largest K
    gets entries of log-probability -inf. ``torch.utils.data.default_collate`` stacks the rest.

    Args:
        samples: at least one, all alike.
        length: of padded sequences, if all are shorter.
        name: what the samples are called in the batch.

    Raises:
        ValueError: TopKs differ in tail or temperature, or only some have a tail_logprob.
    """
    first = samples[0]
    if isinstance(first, TopK):
        return _stacked(samples, length or 0)
    if isinstance(first, Mapping):
        return {key: collate([x[key] for x in samples], length, key) for key in first}
    if isinstance(first, tuple):
        return tuple(collate(x, length) for x in zip(*samples, strict=True))
    rows = [torch.tensor(x) if _is_list_of_numbers(x) else x for x in samples]
    if not all(isinstance(x, Tensor) and x.dim() == 1 for x in rows):
        return default_collate(list(samples))
    value = -100 if name == "labels" else 0
    batch = pad_sequence(rows, True, value)
    return pad(batch, (0, max(0, (length or 0) - batch.shape[1])), value=value)


def widened(topk: TopK, rows: int, k: int) -> TopK:
    """Return a TopK (n, K) as one of more rows and entries, (rows, k), which are absent.

    In a row without entries the tail has all mass.
    """
    below, right = rows - topk.logprobs.shape[0], k - topk.logprobs.shape[1]
    tail = topk.tail_logprob
    return topk._replace(
        token_ids=pad(topk.token_ids, (0, right, 0, below)),
        logprobs=pad(topk.logprobs, (0, right, 0, below), value=-math.inf),
        tail_logprob=None if tail is None else pad(tail, (0, below)),
    )


def _stacked(topks: Sequence[TopK], length: int) -> TopK:
    """Return TopKs (n, K) of different n and K as one (B, n, K)."""
    kinds = {(x.tail, x.temperature, x.tail_logprob is None) for x in topks}
    if len(kinds) > 1:
        raise ValueError(
            "the TopKs of a batch must have the same tail and temperature, and all or none of them "
            f"a tail_logprob; got (tail, temperature, tail_logprob is None) in {sorted(kinds)}"
        )
    rows, k = (max(x.logprobs.shape[i] for x in topks) for i in (0, 1))
    parts = [widened(x, max(rows, length), k) for x in topks]
    tails = [x.tail_logprob for x in parts if x.tail_logprob is not None]
    return parts[0]._replace(
        token_ids=torch.stack([x.token_ids for x in parts]),
        logprobs=torch.stack([x.logprobs for x in parts]),
        tail_logprob=torch.stack(tails) if tails else None,
    )


def _is_list_of_numbers(x: Any) -> bool:
    return isinstance(x, list) and all(isinstance(y, int | float) for y in x)
