"""A tokenizer of transformers for text that is tokens already: its words are their numbers."""

from __future__ import annotations

from typing import Any

import tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast


def tokenizer(config: Any) -> PreTrainedTokenizerFast:
    """ "17 4" is (17, 4), for a model of that configuration."""
    entries = {str(number): number for number in range(config.vocab_size)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(entries, unk_token="0"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    eos = str(config.eos_token_id)
    return PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="0", eos_token=eos, pad_token=eos, padding_side="left"
    )


def written(ids: Tensor) -> str:
    """Of one row, (S,)."""
    return " ".join(map(str, ids.tolist()))
