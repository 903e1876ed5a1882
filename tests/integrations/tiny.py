"""Tiny causal language models of transformers, and ragged batches for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 97


def llama(seed: int, layers: int = 1, hidden: int = 16, **changes: Any) -> nn.Module:
    """A LlamaForCausalLM; the same seed, the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return build(LlamaForCausalLM, LlamaConfig, seed, num_hidden_layers=layers,
                 hidden_size=hidden, **changes)  # fmt: skip


def build(model: Any, config: Any, seed: int, **changes: Any) -> nn.Module:
    """Any decoder, small; logits of a size that softmaxes notice."""
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(seed)
    made: nn.Module = model(config(**{**sizes, **changes})).eval()
    with torch.no_grad():
        made.get_output_embeddings().weight.normal_(std=0.5)
    return made


def ragged(count: int = 16, seed: int = 0) -> list[dict[str, Tensor]]:
    """Sequences of 3 to 12 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 13, (count,), generator=generator).tolist()
    rows = [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in lengths]
    return [{"input_ids": row, "labels": row} for row in rows]


def padded(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A collator: ids padded with 0, labels with -100."""
    pad = nn.utils.rnn.pad_sequence
    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": pad(ids, batch_first=True),
        "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad([row["labels"] for row in rows], batch_first=True, padding_value=-100),
    }


def largest_difference(first: nn.Module, second: nn.Module) -> float:
    """Of any weight."""
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)
