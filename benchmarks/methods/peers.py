"""Peers' losses, weighted 0.5 each with the T² that their divergences leave out.

On logits, and on hidden states and lm_heads, whose hard half is the peer's own cross-entropy from
hidden states; those without a teacher are of that half alone.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cases import Case
from .base import Loss, needs, on_heads, on_logits

#: Liger's JSDs and TRL's are the forward KL at beta 0 and the reverse one at beta 1.
BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}
#: The default number of chunks of torchtune; entries of the vocabulary at a time in the
#: log-probabilities of TRL's fine-tuning trainer.
CHUNKS, TILE = 8, 32768
_CHUNKED = needs("liger_kernel.chunked_loss", *BETA)
_KL = {"forward_kl": "Forward", "reverse_kl": "Reverse"}
_LIGER, _TUNE = "liger_kernel.transformers.", "torchtune.modules.loss"
_AT_ONE: Any = {
    "computes": lambda case: {"temperature": 1.0, "divergence": case.divergence},
    "nearest": "the same at temperature 1",
}
_SOFT: Any = {"compared": ("gradients",), "nearest": "the same without the teacher's entropy"}
_HARD: Any = {
    "computes": lambda case: {"hard_weight": 0.5, "soft_weight": 0.0},
    "nearest": "the cross-entropy alone",
}


def _with_cross_entropy(soft: Loss) -> Loss:
    """Add half the cross-entropy to half a peer's divergence on logits, T² included.

    It is the cross-entropy of transformers, which converts the logits to float32 first.
    """
    return lambda student, teacher, labels: (
        0.5 * F.cross_entropy(student.float(), labels) + 0.5 * soft(student, teacher, labels)
    )


@on_logits("liger", "Liger", needs(_LIGER + "cross_entropy", *BETA, "tvd", gpu=True))
def _liger(case: Case) -> Loss:
    """Return its losses of log-probabilities ("tvd": probabilities), after torch's softmax.

    Its cross-entropy writes its gradient over the logits in the forward, so it goes last.
    """
    from liger_kernel.transformers.cross_entropy import LigerCrossEntropyLoss
    from liger_kernel.transformers.jsd import LigerJSD
    from liger_kernel.transformers.kl_div import LigerKLDIVLoss
    from liger_kernel.transformers.tvd import LigerTVDLoss

    divergence = {
        "forward_kl": lambda: LigerKLDIVLoss(reduction="batchmean", log_target=True),
        "reverse_kl": lambda: LigerJSD(beta=1.0),
        "jsd": lambda: LigerJSD(beta=0.5),
        "tvd": lambda: LigerTVDLoss(),
    }[case.divergence]()
    soften = F.softmax if case.divergence == "tvd" else F.log_softmax
    cross_entropy, t = LigerCrossEntropyLoss(), case.temperature

    def loss(student, teacher, labels):
        soft = divergence(*(soften(x.float() / t, -1) for x in (student, teacher)))
        return 0.5 * cross_entropy(student, labels) + 0.5 * t**2 * soft

    return loss


@on_logits(
    "liger-ce-tvd",
    "Liger fused CE + TVD",
    needs(_LIGER + "fused_ce_tvd", "tvd", gpu=True),
    **_AT_ONE,
)
def _liger_tvd(case: Case) -> Loss:
    """Return both terms of a row in one kernel, so at one temperature."""
    from liger_kernel.transformers.fused_ce_tvd import LigerFusedCETVDLoss

    both = LigerFusedCETVDLoss()
    return lambda *logits_and_labels: 0.5 * sum(both(*logits_and_labels)).mean()


@on_logits("trl-gkd", "TRL GKD", needs("trl.experimental.gkd", *BETA))
def _trl(case: Case) -> Loss:
    """Return its loss, whose "batchmean" with labels is over the rows that are not ignored."""
    from trl.experimental.gkd import GKDTrainer

    beta, t = BETA[case.divergence], case.temperature
    jsd = partial(GKDTrainer.generalized_jsd_loss, reduction="batchmean", beta=beta, temperature=t)
    return _with_cross_entropy(lambda *tensors: t**2 * jsd(*tensors))


@on_logits("torchtune-reverse", "torchtune reverse KL", needs(_TUNE, "reverse_kl"))
@on_logits("torchtune", "torchtune", needs(_TUNE, "forward_kl"), **_SOFT)
def _torchtune(case: Case) -> Loss:
    """Return its loss; it has no temperature: the logits are divided before, as a user must.

    Its forward KL is the soft cross-entropy, whose gradient is the same.
    """
    from torchtune.modules import loss as losses

    kl, t = getattr(losses, _KL[case.divergence] + "KLLoss")(), case.temperature
    return _with_cross_entropy(
        lambda student, teacher, labels: t**2 * kl(_soften(student, t), _soften(teacher, t), labels)
    )


@on_logits(
    "torchtune-reverse-chunked", "torchtune reverse KL, 8 chunks", needs(_TUNE, "reverse_kl")
)
@on_logits("torchtune-chunked", "torchtune, 8 chunks", needs(_TUNE, "forward_kl"), **_SOFT)
def _torchtune_chunked(case: Case) -> Loss:
    """Return its loss of one sequence; its recipes pass the same chunks to its cross-entropy."""
    from torchtune.modules import loss as losses

    kl = getattr(losses, _KL[case.divergence] + "KLWithChunkedOutputLoss")(CHUNKS)
    cross_entropy, t = losses.CEWithChunkedOutputLoss(CHUNKS), case.temperature

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        chunks = [list(logits[None].chunk(CHUNKS, dim=1)) for logits in (student, teacher)]
        softened = ([_soften(x, t) for x in model] for model in chunks)
        hard = cross_entropy(chunks[0], labels[None])
        return 0.5 * hard + 0.5 * t**2 * kl(*softened, labels[None])

    return loss


def _soften(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1 else logits / temperature


@on_logits(
    "modelopt", "NVIDIA Model Optimizer", needs("modelopt.torch.distill.losses", "forward_kl")
)
def _modelopt(case: Case) -> Loss:
    """Return its loss, T² included; its default reduction divides by N·V, "batchmean" by rows."""
    from modelopt.torch.distill.losses import LogitsDistillationLoss

    divergence = LogitsDistillationLoss(case.temperature, reduction="batchmean")
    return _with_cross_entropy(lambda student, teacher, labels: divergence(student, teacher))


@on_heads("liger-chunked", "Liger chunked", _CHUNKED)
def _liger_chunked(case: Case, compiled: bool = False) -> Loss:
    """Return its loss whose softened softmaxes and weight gradient are in the inputs' dtype."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    t, beta = case.temperature, BETA[case.divergence]
    return LigerFusedLinearJSDLoss(0.5, 0.5 * t**2, beta, temperature=t, compiled=compiled)


@on_heads("liger-chunked-compiled", "Liger chunked, compiled", _CHUNKED, compiles=True)
def _liger_chunked_compiled(case: Case) -> Loss:
    return _liger_chunked(case, compiled=True)


@on_heads(
    "liger-fused-jsd", "Liger fused linear JSD", needs(_LIGER + "fused_linear_jsd", *BETA, gpu=True)
)
def _liger_jsd(case: Case) -> Loss:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    divergence = LigerFusedLinearJSD(BETA[case.divergence], temperature=case.temperature)
    return _with_liger_cross_entropy(divergence, case)


@on_heads(
    "liger-fused-kl",
    "Liger fused linear KL",
    needs(_LIGER + "fused_linear_kl_div", "forward_kl", gpu=True),
)
def _liger_kl(case: Case) -> Loss:
    """Return its KL of the teacher's probabilities: torch's softmax of whole logits before it."""
    from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss

    divergence = LigerFusedLinearKLDivLoss(temperature=case.temperature)

    def soft(hidden, weight, teacher, head, labels):
        with torch.no_grad():
            target = F.softmax(F.linear(teacher, head).float() / case.temperature, -1)
        return divergence(hidden, weight, target, labels)

    return _with_liger_cross_entropy(soft, case)


def _with_liger_cross_entropy(soft: Loss, case: Case) -> Loss:
    """Add its cross-entropy from hidden states, which also works in chunks."""
    from liger_kernel.transformers import fused_linear_cross_entropy as module

    cross_entropy, factor = module.LigerFusedLinearCrossEntropyLoss(), case.temperature**2

    def loss(*tensors: Tensor) -> Tensor:
        hidden, weight, _, _, labels = tensors
        return 0.5 * cross_entropy(weight, hidden, labels) + 0.5 * factor * soft(*tensors)

    return loss


@on_heads("trl-chunked", "TRL chunked", needs("trl.kernels.chunked_divergence", *BETA))
def _trl_chunked(case: Case) -> Loss:
    """Return its loss; the hard half is the tiled log-probability of its fine-tuning trainer."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    keywords = {"beta": BETA[case.divergence], "temperature": case.temperature}

    def loss(hidden, weight, teacher, head, labels):
        log_probabilities, *_ = ChunkedLogProbFunction.apply(
            hidden, weight, None, labels, 1.0, TILE, None, 1.0, ("log_probs",)
        )
        mask = labels != -100
        soft, *_ = _chunked_divergence_loss(hidden, teacher, weight, head, mask, **keywords)
        return -0.5 * log_probabilities.mean() + 0.5 * case.temperature**2 * soft

    return loss


@on_heads("fla", "Flash Linear Attention", needs("fla.modules", "forward_kl", gpu=True))
def _fla(case: Case) -> Loss:
    """Return its loss; it has no temperature, so hidden states over T give logits over T."""
    from fla.modules import FusedKLDivLoss, FusedLinearCrossEntropyLoss

    divergence, cross_entropy = FusedKLDivLoss(), FusedLinearCrossEntropyLoss()
    t = case.temperature

    def loss(hidden, weight, teacher, head, labels):
        soft = divergence(hidden / t, teacher / t, weight, head)
        return 0.5 * cross_entropy(hidden, labels, weight) + 0.5 * t**2 * soft

    return loss


def _no_torch_ce(case: Case) -> str | None:
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    return f"torch {torch.__version__} has none in chunks"


@on_heads("torch-linear-ce", "F.linear_cross_entropy", _no_torch_ce, **_HARD)
def _torch_ce(case: Case) -> Loss:
    """Return torch's cross-entropy in chunks of rows; its gradients are computed in the forward."""
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda hidden, weight, teacher, head, labels: (
        0.5 * F.linear_cross_entropy(hidden, weight, labels, options=options)
    )


def _no_cut_ce(case: Case) -> str | None:
    if case.device == "cuda" and case.dtype == "fp32":
        return "its kernels have no float32"
    return needs("cut_cross_entropy")(case)


@on_heads("cut-cross-entropy", "Cut Cross-Entropy", _no_cut_ce, compiles=True, **_HARD)
def _cut_ce(case: Case) -> Loss:
    """Return its kernels on a GPU, on a CPU the ``torch.compile`` of its own composition."""
    from cut_cross_entropy import linear_cross_entropy

    implementation = "cce" if case.device == "cuda" else "torch_compile"
    return lambda hidden, weight, teacher, head, labels: (
        0.5 * linear_cross_entropy(hidden, weight, labels, impl=implementation)
    )
