"""Other people's losses with our objective, composed as their documentation has it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from .cases import Case

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
