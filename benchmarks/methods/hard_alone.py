"""Cross-entropies from hidden states, without a teacher: torch's and Apple's Cut Cross-Entropy."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..cases import HEADS, Case
from .base import Loss, Method, cannot_import


def _torch(case: Case) -> Loss:
    """Return torch's, in chunks of rows; its gradients are computed in the forward."""
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda hidden, weight, teacher, head, labels: (
        0.5 * F.linear_cross_entropy(hidden, weight, labels, options=options)
    )


def _torch_why_not(case: Case) -> str | None:
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    return f"torch {torch.__version__} has none in chunks"


def _cut(case: Case) -> Loss:
    """Return its kernels on a GPU, on a CPU the ``torch.compile`` of its own composition."""
    from cut_cross_entropy import linear_cross_entropy

    implementation = "cce" if case.device == "cuda" else "torch_compile"
    return lambda hidden, weight, teacher, head, labels: (
        0.5 * linear_cross_entropy(hidden, weight, labels, impl=implementation)
    )


def _cut_why_not(case: Case) -> str | None:
    if case.device == "cuda" and case.dtype == "fp32":
        return "its kernels have no float32"
    return cannot_import("cut_cross_entropy")


_CCE = "cut-cross-entropy"
_HALF: dict[str, Any] = {
    "computes": lambda case: {"hard_weight": 0.5, "soft_weight": 0.0},
    "nearest": "the cross-entropy alone",
    "matrices": 1.5,
}
METHODS = [
    Method("torch-linear-ce", "F.linear_cross_entropy", HEADS, _torch, _torch_why_not, **_HALF),
    Method(
        _CCE, "Cut Cross-Entropy", HEADS, _cut, _cut_why_not, package=_CCE, compiles=True, **_HALF
    ),
]
