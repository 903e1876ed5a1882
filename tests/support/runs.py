"""Simulated runs: two losses of held-out sequences at 20 evaluations, and verdicts on them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_kd.objectives import ConvergenceMonitor

DELTA, LOOKS, SEQUENCES, TOKENS = 0.01, 20, 50, 100.0


def flat(look: int) -> float:
    return 3.0


def falling(by: float) -> Callable[[int], float]:
    """Return a loss that falls by this number of δ in half a run."""
    return lambda look: 3.0 - by * DELTA * look / (LOOKS / 2)


def losses_of(
    means: tuple[Callable[[int], float], ...],
    seed: int,
    sequence: float = 0.005,
    common: float = 0.0,
    heavy: bool = False,
) -> Tensor:
    """Return the sums of the tokens' losses (LOOKS, 2, SEQUENCES).

    Args:
        means: the loss a token of both objectives at each evaluation.
        seed: of the noise.
        sequence: standard deviation of a sequence's loss a token from one evaluation to the next.
        common: that of AR(1) noise with coefficient 0.7, the same for all sequences.
        heavy: some sequences have ten times the noise of others.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    level, drift, looks = 0.5 * normal(2, SEQUENCES), common * normal(2), []
    scale = (torch.rand(SEQUENCES, generator=generator) + 0.01).rsqrt() if heavy else 1.0
    for look in range(LOOKS):
        if look > 0:
            drift = 0.7 * drift + math.sqrt(1 - 0.7**2) * common * normal(2)
        mean = torch.tensor([f(look) for f in means], dtype=torch.float64) + drift
        looks.append(mean[:, None] + level + sequence * scale * normal(2, SEQUENCES))
    return TOKENS * torch.stack(looks)


def verdicts_of(losses: Tensor, **settings: Any) -> list[str]:
    """Return the verdicts on the pair at all evaluations."""
    monitor = ConvergenceMonitor(DELTA, DELTA, **settings)
    tokens = torch.full((losses.shape[-1],), TOKENS)
    return [monitor.update(hard=h, soft=s, tokens=tokens).pair for h, s in losses]


def shares(runs: int, *means: Callable[[int], float], **noise: Any) -> Counter[str]:
    """Return the share of runs in which a verdict is given at any evaluation."""
    seen: Counter[str] = Counter()
    for seed in range(runs):
        seen.update(set(verdicts_of(losses_of(means, seed, **noise))))
    return Counter({pair: count / runs for pair, count in seen.items()})
