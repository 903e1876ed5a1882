"""Peers' losses of a top-k teacher: 0.5 of a cross-entropy and 0.5 of a forward KL, at T = 1.

The loss of an installed package is called. DistillKit, NeMo-RL and the training code of Megatron-LM
are not on the package index: what their sources compute (August 2026) is restated here in plain
torch, with the same conversions and passes over the vocabulary.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_kd import TopK

from ..cases import Case
from .base import RENORMALIZE, ZERO, Loss, WhyNot, load, needs, on_topk
from .peers import cross_entropy, halves

AXOLOTL = "axolotl:axolotl/integrations/kd/topk_logprob/forward_kl.py"
SWIFT = "ms-swift:swift/rlhf_trainers/gkd_loss.py"
TRL = "trl.experimental.server_distillation.server_distillation_trainer"
#: The least tail mass of DistillKit and Megatron-LM.
EPS = 1e-8
_RENORMALIZE: Any = {"tail": RENORMALIZE, "nearest": "both sides renormalized on the top k"}
_ZERO: Any = {"tail": ZERO, "nearest": "the teacher renormalized on the top k, nothing outside"}


def _at_one(module: str = "torch") -> WhyNot:
    """Return the `why_not` of a forward KL at temperature 1 that needs a module."""
    is_missing = needs(module, "forward_kl")
    other = "it is measured at T = 1 only"
    return lambda case: is_missing(case) or (None if case.temperature == 1 else other)


@on_topk("trl-server", "TRL server distillation", _at_one(TRL))
def _trl(case: Case) -> Loss:
    """Return the loss of TRL's trainer that gets log-probabilities from a server."""
    trainer = load(TRL).ServerDistillationTrainer
    own = SimpleNamespace(
        loss_add_tail=True, _reduce_divergence_loss=trainer._reduce_divergence_loss
    )

    def soft(student: Tensor, teacher: TopK, labels: Tensor) -> Tensor:
        answer = {
            "topk_logprobs": teacher.logprobs[None],
            "topk_token_ids": teacher.token_ids[None],
        }
        log_p = F.log_softmax(student / case.temperature, -1)[None]  # as in its compute_loss
        return trainer._compute_server_forward_kl_loss(own, answer, log_p, labels[None])

    return halves(cross_entropy, soft, case)


@on_topk("axolotl", "axolotl", _at_one(AXOLOTL), **_ZERO)
def _axolotl(case: Case) -> Loss:
    """Return axolotl's loss of chunks of logits, of which the teacher's mass is normalized.

    Its trainer computes another from hidden states, in chunks of 1024 rows.
    """
    kl = load(AXOLOTL).ChunkedTopKKDLoss()

    def soft(student: Tensor, teacher: TopK, labels: Tensor) -> Tensor:
        ids, log_q = teacher.token_ids[None], teacher.logprobs.log_softmax(-1)[None]
        return kl(student[None], ids, log_q, torch.ones_like(ids), len(labels))

    return halves(cross_entropy, soft, case)


@on_topk("ms-swift", "ms-swift", _at_one(SWIFT), **_RENORMALIZE)
def _swift(case: Case) -> Loss:
    """Return ms-swift's loss, which copies the logits of the rows that have a label."""
    swift = load(SWIFT)

    def soft(student: Tensor, teacher: TopK, labels: Tensor) -> Tensor:
        entries = {"topk_logprobs": teacher.logprobs, "topk_indices": teacher.token_ids}
        total, count = swift.gkd_loss(student, swift.TeacherOutput(**entries), labels, 0.0, 1.0)
        return total / count

    return halves(cross_entropy, soft, case)


def _restated(key: str, title: str, **fields: Any) -> Any:
    """Return a decorator that adds a function of student and teacher as a peer's soft half."""

    def add(kl: Any) -> Any:
        def build(case: Case) -> Loss:
            soft = lambda student, teacher, labels: kl(student, teacher)  # noqa: E731
            return halves(cross_entropy, soft, case)

        return on_topk(key, f"{title} (restated)", _at_one(), **fields)(build)

    return add


@_restated("distillkit", "DistillKit")
def _distillkit(student: Tensor, teacher: TopK) -> Tensor:
    """Return the mean KL with DistillKit's "symmetric uniform" tail.

    After distillkit/lossfuncs/kl.py: log-probabilities and products are in the logits' dtype, the
    log-sum-exp and the masses of both tails in float32.
    """
    dtype = student.dtype
    normalizer = student.to(torch.float32).logsumexp(-1, keepdim=True).to(dtype)
    log_p = student.gather(-1, teacher.token_ids) - normalizer
    log_q = teacher.logprobs.to(dtype)
    q = log_q.exp()
    inside = (q * (log_q - log_p)).sum(-1)
    masses = q.float().sum(-1), log_p.float().exp().sum(-1)
    tail_q, tail_p = (torch.log1p(-mass.clamp(EPS, 1 - EPS)) for mass in masses)
    return (inside + tail_q.exp() * (tail_q - tail_p)).mean()


@_restated("megatron-lm", "Megatron-LM")
def _megatron(student: Tensor, teacher: TopK) -> Tensor:
    """Return the mean KL with Megatron-LM's ghost token.

    After topk_kl_div in megatron/training/distillation/cached_logits_loss.py: all in float32.
    """
    z = student.float()
    largest = z.amax(-1, keepdim=True).detach()
    z = z - largest if z is student else z.sub_(largest)  # theirs overwrites float32 logits too
    log_p = (z - z.exp().sum(-1, keepdim=True).log()).gather(-1, teacher.token_ids)
    log_q = teacher.logprobs.float()
    ghosts = ((1 - x.exp().sum(-1, keepdim=True)).clamp(min=EPS).log() for x in (log_p, log_q))
    log_p, log_q = (torch.cat(pair, -1) for pair in zip((log_p, log_q), ghosts, strict=True))
    return (log_q.exp() * (log_q - log_p)).sum(-1).mean()


@_restated("nemo-rl", "NeMo-RL", **_RENORMALIZE)
def _nemo_rl(student: Tensor, teacher: TopK) -> Tensor:
    """Return the mean KL of NeMo-RL with its default, zero_outside_topk=False.

    After nemo_rl/distributed/model_utils.py and nemo_rl/algorithms/loss/loss_functions.py, whose
    default kl_type mixes this forward KL with the reverse one.
    """
    log_p = student.float().gather(-1, teacher.token_ids).log_softmax(-1)
    log_q = teacher.logprobs.float().log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1).mean()
