"""Top-k teachers for tests: of inputs that have dense ones, drawn ones, and the golden numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_kd import TopK
from fused_kd.divergences import TABLE
from fused_kd.sides import TAILS
from fused_kd.testing import Inputs

#: Pairs of tail and divergence that are allowed.
PAIRS = [
    (tail, name)
    for tail in TAILS
    for name, entry in TABLE.items()
    if not entry.of_logits
    and not (tail == "zero" and entry.needs_mass)
    and not (tail == "sampled" and not entry.is_linear)
]


def with_topk(inputs: Inputs, k: int, tail: str = "bucket", temperature: float = 1.0) -> Inputs:
    """Return inputs whose teacher's logits are replaced by a TopK of k entries.

    For "sampled" the k entries are drawn, and k must not be 0.
    """
    assert isinstance(inputs.teacher, Tensor)
    if tail == "sampled":
        return inputs._replace(teacher=drawn(inputs.teacher.float(), k, temperature))
    topk = TopK.from_logits(inputs.teacher.float(), k, temperature)
    return inputs._replace(teacher=topk._replace(tail=tail))


def drawn(logits: Tensor, k: int, temperature: float = 1.0, seed: int = 0) -> TopK:
    """Return a "sampled" teacher of k draws, with replacement, from each row of logits (N, V)."""
    generator = torch.Generator().manual_seed(seed)
    ids = (logits / temperature).softmax(-1).multinomial(k, True, generator=generator)
    counts = torch.full(ids.shape, 1 / k).log()
    return TopK(ids, counts, tail="sampled", temperature=temperature)
