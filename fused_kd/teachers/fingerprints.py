"""Whether training data, its tokenizer and a cache belong together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

#: The text fingerprint of no sequence.
NO_TEXT = hashlib.sha256().hexdigest()


def fingerprint(tokenizer: object) -> str | None:
    """Return a hash of a tokenizer's vocabulary: of all tokens and their ids.

    How texts are cut into tokens is not part of it, since the ids of the training data are compared
    with those of the cache.

    Args:
        tokenizer: an object with ``get_vocab()``, as in transformers and tokenizers; a mapping of
            tokens to ids; a fingerprint, or None, which are returned.

    Raises:
        TypeError: It is something else.
    """
    if tokenizer is None or isinstance(tokenizer, str):
        return tokenizer
    vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else tokenizer
    if not isinstance(vocabulary, Mapping):
        raise TypeError(
            "tokenizer must have get_vocab(), or be a mapping of tokens to ids or a fingerprint; "
            f"got {type(tokenizer).__name__}"
        )
    pairs = sorted((int(i), str(token)) for token, i in vocabulary.items())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def text_fingerprint(texts: Iterable[Any]) -> str:
    """Return a hash of sequences of token ids in their order, as manifest.json has it.

    Args:
        texts: token ids (n,), or samples with "input_ids".
    """
    text = NO_TEXT
    for x in texts:
        text = extended(text, ids_of(x))
    return text


def extended(text: str, token_ids: Tensor) -> str:
    """Return the text fingerprint with one more sequence (n,)."""
    return hashlib.sha256(bytes.fromhex(text) + token_ids.long().numpy().tobytes()).hexdigest()


def ids_of(text: Any) -> Tensor:
    """Return the token ids (n,), int64, of a sequence or of a sample's "input_ids"."""
    ids = text["input_ids"] if isinstance(text, Mapping) else text
    return torch.as_tensor(ids, dtype=torch.int64, device="cpu").flatten()


def check_ids(number: int, given: Tensor, stored: Tensor) -> None:
    """Check that sequence `number` of the training data is that of the cache.

    Raises:
        ValueError: It is not; the message says where they differ.
    """
    if torch.equal(given, stored):
        return
    what = f"{len(given)} tokens instead of {len(stored)}"
    for i, (ours, theirs) in enumerate(zip(given.tolist(), stored.tolist(), strict=False)):
        if ours != theirs:
            what = f"token {ours} at position {i} instead of {theirs}"
            break
    raise ValueError(
        "the training data must be the texts that the cache was written from, in this order; "
        f"sequence {number} has {what}: use the same data, tokenizer and truncation"
    )
