"""A causal language model of plain torch with the interface of those of transformers."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

VOCABULARY = 61


class Block(nn.Module):
    """A residual layer: x + tanh(linear(x))."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.inner = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(x))


class SmallLM(nn.Module):
    """A model of an embedding, two blocks, a norm and an lm_head.

    `seed` determines the weights, and is set as torch's global one. `tied`: lm_head has the
    embedding's weight and no bias. `checkpointed`: the backward computes the blocks again.
    """

    def __init__(
        self, seed: int, hidden: int = 16, tied: bool = False, checkpointed: bool = False
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCABULARY, hidden)
        self.blocks = nn.ModuleList(Block(hidden) for _ in range(2))
        self.norm = nn.LayerNorm(hidden)
        self.lm_head = nn.Linear(hidden, VOCABULARY, bias=not tied)
        if tied:
            self.lm_head.weight = self.embed.weight
        self.checkpointed = checkpointed

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return SimpleNamespace(logits=self.lm_head(self.norm(x)))
