"""torchtune's losses on logits, whole and in the chunks that its recipes use.

They know no temperature: the logits are divided before, as a user must. Its forward KL is the soft
cross-entropy, whose gradient is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from ..cases import LOGITS, Case
from .base import Entrant, Loss, cannot_import, only
from .torch_native import with_cross_entropy

#: Their prefixes, and the default number of chunks.
KINDS, CHUNKS = {"forward_kl": "Forward", "reverse_kl": "Reverse"}, 8


def _soften(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1 else logits / temperature


def _whole(divergence: str, case: Case) -> Loss:
    from torchtune.modules import loss as losses

    kl, temperature = getattr(losses, f"{KINDS[divergence]}KLLoss")(), case.temperature

    def soft(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        softened = (_soften(x, temperature) for x in (student, teacher))
        result: Tensor = kl(*softened, labels)
        return temperature**2 * result

    return with_cross_entropy(soft)


def _chunked(divergence: str, case: Case) -> Loss:
    """One sequence; its recipes give the same chunks to its cross-entropy."""
    from torchtune.modules import loss as losses

    kl = getattr(losses, f"{KINDS[divergence]}KLWithChunkedOutputLoss")(CHUNKS)
    cross_entropy, temperature = losses.CEWithChunkedOutputLoss(CHUNKS), case.temperature

    def chunks(logits: Tensor) -> list[Tensor]:
        return list(logits[None].chunk(CHUNKS, dim=1))

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        both = chunks(student), chunks(teacher)
        softened = ([_soften(x, temperature) for x in model] for model in both)
        soft: Tensor = kl(*softened, labels[None])
        hard: Tensor = cross_entropy(both[0], labels[None])
        return 0.5 * hard + 0.5 * temperature**2 * soft

    return loss


def _why_not(divergence: str, case: Case) -> str | None:
    return only(case, divergence) or cannot_import("torchtune.modules.loss")


def _entrants(divergence: str) -> list[Entrant]:
    is_forward = divergence == "forward_kl"
    key, name = ("", "") if is_forward else ("-reverse", " reverse KL")
    known = {"compared": ("gradients",), "nearest": "the same without the teacher's entropy"}

    def entrant(key: str, title: str, build: Callable[[str, Case], Loss], m: float) -> Entrant:
        return Entrant(key, title, LOGITS, partial(build, divergence),
                       partial(_why_not, divergence), "torchtune", matrices=m,
                       **(known if is_forward else {}))  # type: ignore[arg-type]  # fmt: skip

    return [
        entrant(f"torchtune{key}", f"torchtune{name}", _whole, 9),
        entrant(f"torchtune{key}-chunked", f"torchtune{name}, {CHUNKS} chunks", _chunked, 6),
    ]


ENTRANTS = [entrant for divergence in KINDS for entrant in _entrants(divergence)]
