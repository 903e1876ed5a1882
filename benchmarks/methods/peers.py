"""Peers' losses, each with 0.5 of a cross-entropy and 0.5 T² of a divergence.

With heads, the hard half is the peer's own cross-entropy from hidden states; a peer without a
divergence computes that half alone.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fused_kd import Head
from fused_kd.sides import Side

from ..cases import Case
from .base import Loss, logits_of, needs, on_heads, on_logits

#: The beta of Liger's and TRL's JSDs: they are the forward KL at 0 and the reverse one at 1.
BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}
#: torchtune's default number of chunks; vocabulary entries in a tile of TRL's SFT trainer.
CHUNKS, TILE = 8, 32768
LIGER, LIGER_CHUNKED = "liger_kernel.transformers.", "liger_kernel.chunked_loss"
LIGER_JSD, LIGER_KL = LIGER + "fused_linear_jsd", LIGER + "fused_linear_kl_div"
_OPTIONS = "torch.nn.modules.linear_cross_entropy_options"
MODELOPT, TUNE = "modelopt.torch.distill.losses", "torchtune.modules.loss"
_KL = {"forward_kl": "ForwardKL", "reverse_kl": "ReverseKL"}
_SOFT: Any = {"compared": ("gradients",), "nearest": "the same without the teacher's entropy"}
_HARD: Any = {"computes": lambda case: {"hard_weight": 0.5, "soft_weight": 0.0}}
_HARD["nearest"] = "the cross-entropy alone"


def _from(module: str, name: str, *arguments: Any, **keywords: Any) -> Any:
    """Import a module that may be absent; return an instance of its class `name`."""
    return getattr(import_module(module), name)(*arguments, **keywords)


def halves(hard: Loss, soft: Loss, case: Case) -> Loss:
    """Return a loss: 0.5 of the hard half plus 0.5 T² of the soft one.

    The soft one is first: Liger's cross-entropy overwrites the logits by their gradient.
    """

    def loss(student: Side, teacher: Side, labels: Tensor) -> Tensor:
        divergence = soft(student, teacher, labels)
        return 0.5 * hard(student, labels) + 0.5 * case.temperature**2 * divergence

    return loss


def cross_entropy(student: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy as transformers computes it, after a conversion to float32."""
    return F.cross_entropy(student.float(), labels)


@on_logits("liger", "Liger", needs(LIGER + "cross_entropy", *BETA, "tvd", gpu=True))
def _liger(case: Case) -> Loss:
    """Return Liger's loss of log-probabilities ("tvd": probabilities), after torch's softmax."""
    module, name, keywords = {
        "forward_kl": ("kl_div", "LigerKLDIVLoss", {"reduction": "batchmean", "log_target": True}),
        "reverse_kl": ("jsd", "LigerJSD", {"beta": 1.0}),
        "jsd": ("jsd", "LigerJSD", {"beta": 0.5}),
        "tvd": ("tvd", "LigerTVDLoss", {}),
    }[case.divergence]
    divergence = _from(LIGER + module, name, **keywords)
    soften = F.softmax if case.divergence == "tvd" else F.log_softmax

    def soft(*sides_and_labels: Tensor) -> Tensor:
        return divergence(*(soften(x.float() / case.temperature, -1) for x in sides_and_labels[:2]))

    return halves(_from(LIGER + "cross_entropy", "LigerCrossEntropyLoss"), soft, case)


@on_logits(
    "liger-ce-tvd",
    "Liger fused CE + TVD",
    needs(LIGER + "fused_ce_tvd", "tvd", gpu=True),
    nearest="the same at temperature 1",
    computes=lambda case: {"temperature": 1.0, "divergence": case.divergence},
)
def _liger_tvd(case: Case) -> Loss:
    """Return Liger's loss that computes both terms of a row in one kernel, at temperature 1."""
    both = _from(LIGER + "fused_ce_tvd", "LigerFusedCETVDLoss")
    return lambda *sides_and_labels: 0.5 * sum(both(*sides_and_labels)).mean()


@on_logits("trl-gkd", "TRL GKD", needs("trl.experimental.gkd", *BETA))
def _trl(case: Case) -> Loss:
    """Return TRL's loss; with labels its "batchmean" divides by the rows that are not ignored."""
    jsd = import_module("trl.experimental.gkd").GKDTrainer.generalized_jsd_loss
    beta, t = BETA[case.divergence], case.temperature
    soft = partial(jsd, reduction="batchmean", beta=beta, temperature=t)
    return halves(cross_entropy, soft, case)


def _soften(logits: Tensor, case: Case) -> Tensor:
    """Divide by the temperature, as a user of torchtune must: its losses have none."""
    return logits if case.temperature == 1 else logits / case.temperature


@on_logits("torchtune-reverse", "torchtune reverse KL", needs(TUNE, "reverse_kl"))
@on_logits("torchtune", "torchtune", needs(TUNE, "forward_kl"), **_SOFT)
def _torchtune(case: Case) -> Loss:
    """Return torchtune's loss; its forward KL is a soft cross-entropy, with the same gradient."""
    kl = _from(TUNE, f"{_KL[case.divergence]}Loss")

    def soft(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return kl(_soften(student, case), _soften(teacher, case), labels)

    return halves(cross_entropy, soft, case)


@on_logits("torchtune-reverse-chunked", "torchtune reverse KL, 8 chunks", needs(TUNE, "reverse_kl"))
@on_logits("torchtune-chunked", "torchtune, 8 chunks", needs(TUNE, "forward_kl"), **_SOFT)
def _torchtune_chunked(case: Case) -> Loss:
    """Return torchtune's loss of chunks, which its recipes pass to its cross-entropy, too."""
    kl = _from(TUNE, f"{_KL[case.divergence]}WithChunkedOutputLoss", CHUNKS)
    cross_entropy = _from(TUNE, "CEWithChunkedOutputLoss", CHUNKS)

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        chunks = [list(logits[None].chunk(CHUNKS, dim=1)) for logits in (student, teacher)]
        softened = ([_soften(x, case) for x in model] for model in chunks)
        hard = cross_entropy(chunks[0], labels[None])
        return 0.5 * hard + 0.5 * case.temperature**2 * kl(*softened, labels[None])

    return loss


@on_logits("modelopt", "NVIDIA Model Optimizer", needs(MODELOPT, "forward_kl"))
def _modelopt(case: Case) -> Loss:
    """Return modelopt's loss, T² included; its default reduction divides by N·V, this one by N."""
    soft = _from(MODELOPT, "LogitsDistillationLoss", case.temperature, reduction="batchmean")
    return lambda student, teacher, labels: (
        0.5 * cross_entropy(student, labels) + 0.5 * soft(student, teacher)
    )


def _of_tensors(loss: Loss) -> Loss:
    return lambda student, teacher, labels: loss(*student[:2], *teacher[:2], labels)


def _liger_chunked(case: Case, compiled: bool = False) -> Loss:
    """Return Liger's loss that has softmaxes and the weight's gradient in the inputs' dtype."""
    weights, beta = (0.5, 0.5 * case.temperature**2), BETA[case.divergence]
    keywords = {"temperature": case.temperature, "compiled": compiled}
    loss = _from(LIGER_CHUNKED, "LigerFusedLinearJSDLoss", *weights, beta, **keywords)
    return _of_tensors(loss)


_CHUNKED, _COMPILED = needs(LIGER_CHUNKED, *BETA), partial(_liger_chunked, compiled=True)
on_heads("liger-chunked", "Liger chunked", _CHUNKED)(_liger_chunked)
on_heads("liger-chunked-compiled", "Liger chunked, compiled", _CHUNKED, compiles=True)(_COMPILED)


def _liger_cross_entropy() -> Loss:
    """Return Liger's cross-entropy from hidden states, which also works in chunks."""
    loss = _from(LIGER + "fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyLoss")
    return lambda student, labels: loss(student.weight, student.hidden, labels)


@on_heads("liger-fused-jsd", "Liger fused linear JSD", needs(LIGER_JSD, *BETA, gpu=True))
def _liger_jsd(case: Case) -> Loss:
    beta, t = BETA[case.divergence], case.temperature
    soft = _from(LIGER_JSD, "LigerFusedLinearJSD", beta, temperature=t)
    return halves(_liger_cross_entropy(), _of_tensors(soft), case)


@on_heads("liger-fused-kl", "Liger fused linear KL", needs(LIGER_KL, "forward_kl", gpu=True))
def _liger_kl(case: Case) -> Loss:
    """Return Liger's KL from the teacher's probabilities, which torch's softmax computes first."""
    divergence = _from(LIGER_KL, "LigerFusedLinearKLDivLoss", temperature=case.temperature)

    def soft(student: Head, teacher: Head, labels: Tensor) -> Tensor:
        target = F.softmax(logits_of(teacher).float() / case.temperature, -1)
        return divergence(*student[:2], target, labels)

    return halves(_liger_cross_entropy(), soft, case)


@on_heads("trl-chunked", "TRL chunked", needs("trl.kernels.chunked_divergence", *BETA))
def _trl_chunked(case: Case) -> Loss:
    """Return TRL's loss; the hard half is the tiled log-probability of its SFT trainer."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    keywords = {"beta": BETA[case.divergence], "temperature": case.temperature}

    def hard(student: Head, labels: Tensor) -> Tensor:
        options = None, labels, 1.0, TILE, None, 1.0, ("log_probs",)
        return -ChunkedLogProbFunction.apply(*student[:2], *options)[0].mean()

    def soft(student: Head, teacher: Head, labels: Tensor) -> Tensor:
        (x, w, *_), (y, u, *_) = student, teacher
        return _chunked_divergence_loss(x, y, w, u, labels != -100, **keywords)[0]

    return halves(hard, soft, case)


@on_heads("fla", "Flash Linear Attention", needs("fla.modules", "forward_kl", gpu=True))
def _fla(case: Case) -> Loss:
    """Return fla's loss, which has no temperature: hidden states over T give logits over T."""
    kl, t = _from("fla.modules", "FusedKLDivLoss"), case.temperature
    cross_entropy = _from("fla.modules", "FusedLinearCrossEntropyLoss")
    return halves(
        lambda student, labels: cross_entropy(student.hidden, labels, student.weight),
        lambda student, teacher, labels: kl(
            student.hidden / t, teacher.hidden / t, student.weight, teacher.weight
        ),
        case,
    )


@on_heads("torch-linear-ce", "F.linear_cross_entropy", needs(_OPTIONS), **_HARD)
def _torch_ce(case: Case) -> Loss:
    """Return torch's cross-entropy in chunks of rows, with its gradients made in the forward."""
    loss = partial(F.linear_cross_entropy, options=_from(_OPTIONS, "LinearCrossEntropyOptions"))
    return lambda student, teacher, labels: 0.5 * loss(*student[:2], labels)


def _no_cut_ce(case: Case) -> str | None:
    is_fp32 = case.device == "cuda" and case.dtype == "fp32"
    return "its kernels have no float32" if is_fp32 else needs("cut_cross_entropy")(case)


@on_heads("cut-cross-entropy", "Cut Cross-Entropy", _no_cut_ce, compiles=True, **_HARD)
def _cut_ce(case: Case) -> Loss:
    """Return Cut Cross-Entropy's kernels on a GPU, its ``torch.compile`` version on a CPU."""
    loss = import_module("cut_cross_entropy").linear_cross_entropy
    implementation = "cce" if case.device == "cuda" else "torch_compile"
    return lambda student, teacher, labels: 0.5 * loss(*student[:2], labels, impl=implementation)
