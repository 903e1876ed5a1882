"""TRL's losses: of its GKD trainer on logits, and of its distillation trainer on hidden states.

Both have the forward KL at beta 0 and the reverse one at beta 1, and no T².
"""

from __future__ import annotations

from torch import Tensor

from ..cases import HEADS, LOGITS, Case
from .base import Entrant, Loss, cannot_import, only
from .torch_native import with_cross_entropy

BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}
#: Entries of the vocabulary at a time in the log-probabilities of its fine-tuning trainer.
TILE = 32768


def _logits(case: Case) -> Loss:
    """With labels its "batchmean" is over the rows that are not ignored."""
    from trl.experimental.gkd import GKDTrainer

    beta, temperature = BETA[case.divergence], case.temperature

    def soft(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        result: Tensor = GKDTrainer.generalized_jsd_loss(
            student, teacher, labels, beta=beta, temperature=temperature, reduction="batchmean"
        )
        return temperature**2 * result

    return with_cross_entropy(soft)


def _heads(case: Case) -> Loss:
    """The hard half is the tiled log-probability of its fine-tuning trainer."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    beta, temperature = BETA[case.divergence], case.temperature

    def loss(
        hidden: Tensor, weight: Tensor, teacher: Tensor, head: Tensor, labels: Tensor
    ) -> Tensor:
        log_probabilities, *_ = ChunkedLogProbFunction.apply(
            hidden, weight, None, labels, 1.0, TILE, None, 1.0, ("log_probs",)
        )
        soft, *_ = _chunked_divergence_loss(
            student_hidden_states=hidden, student_lm_head_weight=weight,
            teacher_hidden_states=teacher, teacher_lm_head_weight=head,
            completion_mask=labels != -100, beta=beta, temperature=temperature,
        )  # fmt: skip
        result: Tensor = -0.5 * log_probabilities.mean() + 0.5 * temperature**2 * soft
        return result

    return loss


def _has(module: str, case: Case) -> str | None:
    return only(case, *BETA) or cannot_import(module)


ENTRANTS = [
    Entrant("trl-gkd", "TRL GKD", LOGITS, _logits,
            lambda case: _has("trl.experimental.gkd", case), "trl", matrices=9),
    Entrant("trl-chunked", "TRL chunked", HEADS, _heads,
            lambda case: _has("trl.kernels.chunked_divergence", case), "trl", most_rows=4096,
            matrices=4),
]  # fmt: skip
