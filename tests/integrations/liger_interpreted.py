"""Compare Liger's own kernels with ours on CPU tensors, in a process that test_liger.py starts.

Directly: ``TRITON_INTERPRET=1 pytest tests/integrations/liger_interpreted.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from needs import need
from support.losses import outcome
from torch import Tensor

need("liger_kernel")
from liger_kernel import transformers as own  # noqa: E402
from liger_kernel.transformers import functional as own_functions  # noqa: E402

from fused_kd.integrations import liger  # noqa: E402
from fused_kd.integrations.liger import functional  # noqa: E402

N, V, H_S, H_T, T = 6, 31, 8, 5, 1.7
LABELS = torch.tensor([-100, 1, 2, 3, -100, 5])
LABELLED = pytest.mark.parametrize("labels", [LABELS, None], ids=["labels", "no labels"])
BETAS = pytest.mark.parametrize("beta", [0.0, 0.1, 1.0])
REDUCTIONS = pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])


def agree(
    first: Callable[..., Any], second: Callable[..., Any], leaves: Sequence[Tensor], *rest: Any
) -> None:
    """Assert that values and gradients with respect to `leaves` are equal up to rounding."""
    results = outcome(first, leaves, *rest), outcome(second, leaves, *rest)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def behind_log_softmax(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return `call` after a log_softmax, before which the gradients may differ (see LigerJSD)."""
    return lambda logits, *rest: call(logits.log_softmax(-1), *rest)


def probabilities() -> Tensor:
    """Return probabilities (N, V), some of them 0, and one row that sums to a half."""
    p = torch.randn(N, V)
    p[:, :5] = -torch.inf
    p = p.softmax(-1)
    p[2] /= 2
    return p


@BETAS
@LABELLED
def test_jsd(beta: float, labels: Tensor | None) -> None:
    calls = (behind_log_softmax(module.liger_jsd) for module in (functional, own_functions))
    agree(*calls, [torch.randn(N, V)], torch.randn(N, V).log_softmax(-1), labels, beta)


@BETAS
@LABELLED
def test_fused_linear_jsd(beta: float, labels: Tensor | None) -> None:
    student, teacher = ((torch.randn(N, h), torch.randn(V, h)) for h in (H_S, H_T))
    calls = (module.liger_fused_linear_jsd for module in (functional, own_functions))
    agree(*calls, student, *teacher, labels, beta, -100, T)


@REDUCTIONS
@LABELLED
def test_fused_linear_kl_div_P32(reduction: str, labels: Tensor | None) -> None:
    """Compare on a temperature for the student alone, and a target that need not sum to 1."""
    student, target = (torch.randn(N, H_S), torch.randn(V, H_S)), probabilities()
    before = target.clone()
    calls = (module.liger_fused_linear_kl_div for module in (functional, own_functions))
    agree(*calls, student, target, labels, reduction, -100, T)
    assert torch.equal(target, before)


def test_cross_entropy_and_tvd() -> None:
    tensors = torch.randn(N, V), LABELS
    agree(liger.LigerFusedCETVDLoss(), own.LigerFusedCETVDLoss(), [torch.randn(N, V)], *tensors)
