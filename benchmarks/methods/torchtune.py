"""torchtune's losses on logits, whole and in the chunks that its recipes use.

They have no temperature: the logits are divided before, as a user must. Its forward KL is the soft
cross-entropy, whose gradient is the same.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from ..cases import LOGITS, Case
from .base import Loss, Method, needs, with_cross_entropy

#: The default number of chunks.
CHUNKS = 8


def _soften(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1 else logits / temperature


def _whole(case: Case, prefix: str) -> Loss:
    from torchtune.modules import loss as losses

    kl, t = getattr(losses, f"{prefix}KLLoss")(), case.temperature
    return with_cross_entropy(
        lambda student, teacher, labels: t**2 * kl(_soften(student, t), _soften(teacher, t), labels)
    )


def _chunked(case: Case, prefix: str) -> Loss:
    """Return its loss of one sequence; its recipes pass the same chunks to its cross-entropy."""
    from torchtune.modules import loss as losses

    kl = getattr(losses, f"{prefix}KLWithChunkedOutputLoss")(CHUNKS)
    cross_entropy, t = losses.CEWithChunkedOutputLoss(CHUNKS), case.temperature

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        chunks = [list(logits[None].chunk(CHUNKS, dim=1)) for logits in (student, teacher)]
        softened = ([_soften(x, t) for x in model] for model in chunks)
        hard = cross_entropy(chunks[0], labels[None])
        return 0.5 * hard + 0.5 * t**2 * kl(*softened, labels[None])

    return loss


def _methods(prefix: str, divergence: str, key: str, name: str, **more: Any) -> list[Method]:
    why_not, package = needs("torchtune.modules.loss", divergence), "torchtune"
    whole, chunked = partial(_whole, prefix=prefix), partial(_chunked, prefix=prefix)
    return [
        Method(key, name, LOGITS, whole, why_not, package, matrices=9, **more),
        Method(
            f"{key}-chunked",
            f"{name}, {CHUNKS} chunks",
            LOGITS,
            chunked,
            why_not,
            package,
            matrices=6,
            **more,
        ),
    ]


_NEAREST = {"compared": ("gradients",), "nearest": "the same without the teacher's entropy"}
METHODS = [
    *_methods("Forward", "forward_kl", "torchtune", "torchtune", **_NEAREST),
    *_methods("Reverse", "reverse_kl", "torchtune-reverse", "torchtune reverse KL"),
]
