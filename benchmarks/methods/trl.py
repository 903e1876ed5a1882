"""TRL's losses: of its GKD trainer on logits, and of its distillation trainer on hidden states.

Both have the forward KL at beta 0 and the reverse one at beta 1, and no T².
"""

from __future__ import annotations

from ..cases import HEADS, LOGITS, Case
from .base import Loss, Method, needs, with_cross_entropy

BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}
#: Entries of the vocabulary at a time in the log-probabilities of its fine-tuning trainer.
TILE = 32768


def _logits(case: Case) -> Loss:
    """Return its loss, whose "batchmean" with labels is over the rows that are not ignored."""
    from trl.experimental.gkd import GKDTrainer

    keywords = {"beta": BETA[case.divergence], "temperature": case.temperature}
    return with_cross_entropy(
        lambda student, teacher, labels: (
            case.temperature**2
            * GKDTrainer.generalized_jsd_loss(
                student, teacher, labels, reduction="batchmean", **keywords
            )
        )
    )


def _heads(case: Case) -> Loss:
    """Return its loss; the hard half is the tiled log-probability of its fine-tuning trainer."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    keywords = {"beta": BETA[case.divergence], "temperature": case.temperature}

    def loss(hidden, weight, teacher, head, labels):
        log_probabilities, *_ = ChunkedLogProbFunction.apply(
            hidden, weight, None, labels, 1.0, TILE, None, 1.0, ("log_probs",)
        )
        soft, *_ = _chunked_divergence_loss(
            hidden, teacher, weight, head, labels != -100, **keywords
        )
        return -0.5 * log_probabilities.mean() + 0.5 * case.temperature**2 * soft

    return loss


_LOGITS, _CHUNKED = "trl.experimental.gkd", "trl.kernels.chunked_divergence"
METHODS = [
    Method("trl-gkd", "TRL GKD", LOGITS, _logits, needs(_LOGITS, *BETA), "trl", matrices=9),
    Method(
        "trl-chunked",
        "TRL chunked",
        HEADS,
        _heads,
        needs(_CHUNKED, *BETA),
        "trl",
        most_rows=4096,
        matrices=4,
    ),
]
