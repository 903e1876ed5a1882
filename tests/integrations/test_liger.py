"""Compare with the installed Liger: all signatures, the chunked loss, Triton kernels.

The kernels run interpreted, in another process (liger_interpreted.py), since TRITON_INTERPRET is
read when a kernel is decorated.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from needs import need
from support.heads import H_S, H_T
from support.losses import outcome, parameters
from torch import Tensor

need("liger_kernel")
from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss as LigersOwn  # noqa: E402

from fused_kd import Head, KDLoss  # noqa: E402
from fused_kd.integrations import liger  # noqa: E402
from fused_kd.integrations.liger import functional  # noqa: E402

V = 131
MODULES = {
    "LigerFusedLinearJSDLoss": "chunked_loss.jsd_loss",
    "LigerFusedLinearJSD": "transformers.fused_linear_jsd",
    "LigerFusedLinearKLDivLoss": "transformers.fused_linear_kl_div",
    "LigerJSD": "transformers.jsd",
    "LigerKLDIVLoss": "transformers.kl_div",
    "LigerFusedCETVDLoss": "transformers.fused_ce_tvd",
}


def inputs(*leading: int, bias: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """Return the student's states, weight and bias, and the teacher's, with labels before bias."""
    labels = torch.randint(V, leading)
    labels.view(-1)[::4] = -100
    student = [torch.randn(*leading, H_S), 0.4 * torch.randn(V, H_S)]
    others = [torch.randn(*leading, H_T), 0.4 * torch.randn(V, H_T), labels]
    if bias:
        student.append(torch.randn(V))
        others.append(torch.randn(V))
    return student, others


def check(leaves: list[Tensor], others: list[Tensor], **options: Any) -> None:
    def loss_of(kind: Any, hidden: Tensor, weight: Tensor, *bias: Tensor) -> Any:
        loss = kind(compiled=False, **options)
        return loss(hidden, weight, *others[:3], *bias, *others[3:])

    kinds = LigersOwn, liger.LigerFusedLinearJSDLoss
    own, ours = (outcome(partial(loss_of, kind), leaves) for kind in kinds)
    torch.testing.assert_close(ours, own, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 0.9, 1])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_every_beta_and_temperature_P09(beta: float, temperature: float) -> None:
    check(*inputs(21), beta=beta, temperature=temperature)


@pytest.mark.parametrize("leading", [(21,), (3, 7)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk_size", [4, 1024])
def test_shapes_biases_chunks(leading: tuple[int, ...], bias: bool, chunk_size: int) -> None:
    check(*inputs(*leading, bias=bias), beta=0.3, chunk_size=chunk_size)


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.0, 1.0), (1.0, 0.0), (0.3, 0.9)])
@pytest.mark.parametrize("parts", [False, True])
def test_weights_and_parts(weights: tuple[float, float], parts: bool) -> None:
    """Compare the parts in the order loss, soft, hard, even those of weight 0."""
    hard, soft = weights
    check(*inputs(21), weight_hard_loss=hard, weight_soft_loss=soft, return_soft_hard_loss=parts)


def test_another_ignore_index() -> None:
    leaves, (*teacher, labels) = inputs(21)
    check(leaves, [*teacher, torch.where(labels == -100, 7, labels)], ignore_index=7)


def test_the_preset_is_the_class() -> None:
    student, (*teacher, labels) = inputs(21)
    options = {"beta": 0.2, "temperature": 1.7}
    own = LigersOwn(compiled=False, **options)(*student, *teacher, labels)
    ours = KDLoss.like("liger", **options)(Head(*student), Head(*teacher), labels)
    torch.testing.assert_close(ours, own)


@pytest.mark.parametrize("name", MODULES)
def test_the_signatures_are_ligers(name: str) -> None:
    module = importlib.import_module(f"liger_kernel.{MODULES[name]}")
    own, ours = getattr(module, name), getattr(liger, name)
    for method in ("__init__", "forward"):
        assert parameters(getattr(ours, method)) == parameters(getattr(own, method)), method


def test_the_signatures_of_the_functions() -> None:
    own = importlib.import_module("liger_kernel.transformers.functional")
    names = ("jsd", "kl_div", "fused_linear_jsd", "fused_linear_kl_div")
    for name in map("liger_{}".format, names):
        assert parameters(getattr(functional, name)) == parameters(getattr(own, name)), name


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_ligers_own_kernels() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("liger_interpreted.py"))],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
