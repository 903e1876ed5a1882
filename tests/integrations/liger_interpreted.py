"""Liger's own kernels alongside ours on CPU tensors; test_liger.py runs this in its own process.

By hand: ``TRITON_INTERPRET=1 pytest tests/integrations/liger_interpreted.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from needs import need
from torch import Tensor

need("liger_kernel")
from liger_kernel.transformers import LigerFusedCETVDLoss  # noqa: E402
from liger_kernel.transformers import functional as own  # noqa: E402

from fused_kd.integrations import liger  # noqa: E402
from fused_kd.integrations.liger import functional as ours  # noqa: E402

N, V, H_S, H_T, T = 6, 31, 8, 5, 1.7
LABELS = torch.tensor([-100, 1, 2, 3, -100, 5])


def agree(
    first: Callable[..., Any], second: Callable[..., Any], leaves: Sequence[Tensor], *rest: Any
) -> None:
    """Compare values and gradients, under upstream gradients that are not 1."""
    found = []
    for call in (first, second):
        inputs = [x.clone().requires_grad_() for x in leaves]
        result = call(*inputs, *rest)
        outputs = result if isinstance(result, tuple) else (result,)
        upstream = [torch.arange(1, x.numel() + 1).view(x.shape).to(x) for x in outputs]
        found.append([*outputs, *torch.autograd.grad(outputs, inputs, upstream)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def behind_log_softmax(call: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    """Return `call` of logits: see LigerJSD on what differs before the log_softmax."""
    return lambda logits, *rest: call(logits.log_softmax(-1), *rest, **options)


@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0])
def test_jsd(beta: float) -> None:
    first, second = (behind_log_softmax(f.liger_jsd, beta=beta) for f in (ours, own))
    agree(first, second, [torch.randn(N, V)], torch.randn(N, V).log_softmax(-1), LABELS)


def test_fused_linear_jsd() -> None:
    student, teacher = ((torch.randn(N, h), torch.randn(V, h)) for h in (H_S, H_T))
    functions = (ours.liger_fused_linear_jsd, own.liger_fused_linear_jsd)
    agree(*functions, student, *teacher, LABELS, 0.3, -100, T)


def test_fused_linear_kl_div() -> None:
    student, target = (torch.randn(N, H_S), torch.randn(V, H_S)), torch.randn(N, V).softmax(-1)
    target[2] /= 2
    functions = (ours.liger_fused_linear_kl_div, own.liger_fused_linear_kl_div)
    agree(*functions, student, target, LABELS, "batchmean", -100, T)


def test_cross_entropy_and_tvd() -> None:
    tensors = torch.randn(N, V), LABELS
    agree(liger.LigerFusedCETVDLoss(), LigerFusedCETVDLoss(), [torch.randn(N, V)], *tensors)
