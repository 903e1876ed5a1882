"""Other people's losses with our objective, composed as their documentation has it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import Case
from .linear_cases import LinearCase, Loss

#: What :func:`liger` can express.
LIGER_DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tvd")


def liger_why_not(case: Case) -> str | None:
    """Why Liger cannot take part, or None."""
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger_kernel is not installed"
    if case.divergence not in LIGER_DIVERGENCES:
        return f"it has no {case.divergence}"
    return None


def liger(case: Case) -> Callable[..., Tensor]:
    """Liger's cross-entropy and divergence kernels, weighted 0.5 each, with the T² they leave out.

    Its divergences take log-probabilities or, for "tvd", probabilities: the softmaxes before them
    are torch's. Its cross-entropy writes its gradient over the logits in the forward, so it goes
    last; its JSD is the reverse KL where beta is 1, and its KL divergence is the forward one.
    """
    from liger_kernel.transformers.cross_entropy import LigerCrossEntropyLoss
    from liger_kernel.transformers.jsd import LigerJSD
    from liger_kernel.transformers.kl_div import LigerKLDIVLoss
    from liger_kernel.transformers.tvd import LigerTVDLoss

    cross_entropy = LigerCrossEntropyLoss()
    divergence = {
        "forward_kl": lambda: LigerKLDIVLoss(reduction="batchmean", log_target=True),
        "reverse_kl": lambda: LigerJSD(beta=1.0),
        "jsd": lambda: LigerJSD(beta=0.5),
        "tvd": lambda: LigerTVDLoss(),
    }[case.divergence]()
    soften = F.softmax if case.divergence == "tvd" else F.log_softmax
    temperature = case.temperature

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        p, q = (soften(x.float() / temperature, -1) for x in (student, teacher))
        soft: Tensor = divergence(p, q)
        hard: Tensor = cross_entropy(student, labels)
        return 0.5 * hard + 0.5 * temperature**2 * soft

    return loss


#: Peers of the linear level.
LIGER_LINEAR, LIGER_LINEAR_COMPILED = "Liger chunked", "Liger chunked, compiled"
TORCH_LINEAR = "F.linear_cross_entropy, hard term alone"


def liger_linear_why_not() -> str | None:
    """Why Liger's chunked distillation cannot take part, or None."""
    try:
        import liger_kernel.chunked_loss  # noqa: F401
    except Exception as error:  # one that is installed may fail on a machine without triton
        return f"liger_kernel.chunked_loss cannot be imported: {type(error).__name__}: {error}"
    return None


def liger_linear(case: LinearCase, compiled: bool) -> Loss:
    """Liger's chunked JSD; at ``beta=0`` that is the forward KL.

    It divides both logits by T but has no T²: the soft weight carries it. Its mean is over the rows
    that are not ignored, its chunks have 1024 rows and more, and its softened softmaxes and weight
    gradient are in the dtype of the inputs.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss: Loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.5,
        weight_soft_loss=0.5 * case.temperature**2,
        beta=0.0,
        temperature=case.temperature,
        compiled=compiled,
    )
    return loss


def torch_linear_why_not() -> str | None:
    """Why torch's chunked cross-entropy cannot take part, or None."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__} has no F.linear_cross_entropy with chunks"
    return None


def torch_linear() -> Loss:
    """Its cross-entropy from hidden states, in chunks, with the weight of the hard term."""
    options = torch.nn.LinearCrossEntropyOptions()

    def loss(hidden: Tensor, weight: Tensor, teacher: Tensor, head: Tensor, y: Tensor) -> Tensor:
        value: Tensor = F.linear_cross_entropy(hidden, weight, y, options=options)
        return 0.5 * value

    return loss
