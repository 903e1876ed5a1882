"""Public reports about glue, over every adapter that needs no framework; numbers as N-08."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import failures
from support.distributed import MESH_CHECKS
from torch import Tensor
from torch import distributed as dist

from fused_kd import Head, KDLoss
from fused_kd.integrations import automodel, axolotl, distillkit, liger, model_optimizer, torchtune

N, V, H = 5, 7, 3


def of_probabilities(q: Tensor) -> dict[str, Tensor]:
    """Return Σ q (log q - log p) by each adapter that takes a teacher's probabilities."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(N, H, generator=draw), torch.randn(V, H, generator=draw)
    logits = hidden @ weight.T
    kl = liger.LigerKLDIVLoss(reduction="sum")
    kl_of_logs = liger.LigerKLDIVLoss(reduction="sum", log_target=True)
    top_k = torch.arange(V).expand(1, N, V), q.log()[None], torch.ones(1, N, V)
    return {
        "liger": liger.LigerFusedLinearKLDivLoss("sum")(hidden, weight, q),
        "liger, log p": kl(logits.log_softmax(-1), q),
        "liger, log p, log q": kl_of_logs(logits.log_softmax(-1), q.log()),
        "axolotl": axolotl.loss(logits[None], *top_k, num_items_in_batch=1),
        "formula": (torch.xlogy(q, q) - q * logits.log_softmax(-1)).sum(),
    }


def test_a_target_that_does_not_sum_to_1_keeps_its_mass_N_08() -> None:
    """pytorch#69230; the rows' masses are 0, a half, 1, nearly 1 and 3."""
    q = torch.randn(N, V, generator=torch.Generator().manual_seed(1)).softmax(-1)
    found = of_probabilities(q * torch.tensor([0.0, 0.5, 1.0, 0.999, 3.0])[:, None])
    for name, value in found.items():
        torch.testing.assert_close(value, found["formula"], rtol=1e-5, atol=1e-6, msg=name)


def test_a_negative_target_is_never_dropped_N_08() -> None:
    """pytorch#69230: torch's kl_div counts it as 0. Without values to look at it makes NaN."""
    q = torch.full((N, V), 1 / V)
    q[2, 3] = -1 / V
    tensors = torch.randn(N, H), torch.randn(V, H)
    calls: tuple[tuple[Any, tuple[Tensor, ...]], ...] = (
        (liger.LigerFusedLinearKLDivLoss(), (*tensors, q)),
        (liger.LigerKLDIVLoss(reduction="batchmean"), (torch.randn(N, V).log_softmax(-1), q)),
    )
    for loss, inputs in calls:
        with pytest.raises(ValueError, match=r"must hold probabilities.*got -0\.14"):
            loss(*inputs)
        assert torch.compile(loss, backend="eager")(*inputs).isnan()


def without_a_teacher() -> dict[str, list[Callable[[], Any]]]:
    """Return every adapter's calls without its teacher, by the name of what is missing."""
    s, h, w, y = torch.randn(N, V), torch.randn(N, H), torch.randn(V, H), torch.zeros(N).long()
    ids, mask = torch.zeros(1, N, 1).long(), torch.ones(1, N, 1)
    signal, outputs = SimpleNamespace(logits=None), SimpleNamespace(logits=s)
    return {
        "teacher": [
            lambda: KDLoss()(s, None, y),
            lambda: KDLoss()(Head(h, w), None, y),
        ],
        "teacher_logits": [
            lambda: automodel.KDLoss()(s, None, y),
            lambda: torchtune.ForwardKLLoss()(s, None, y),
            lambda: torchtune.ReverseKLLoss()(s, None, y),
            lambda: torchtune.SymmetricKLLoss()(s, None, y),
            lambda: torchtune.ForwardKLWithChunkedOutputLoss()([s], None, y),
            lambda: liger.LigerFusedCETVDLoss()(s, None, y),
        ],
        "logits_t": [
            lambda: model_optimizer.LogitsDistillationLoss()(s, None),
            lambda: model_optimizer.MFTLoss()(s, None, y),
        ],
        "signal": [
            lambda: distillkit.JSDLoss(1.0)(outputs, signal),
            lambda: distillkit.TVDLoss(1.0)(outputs, None),
        ],
        "target_logprobs": [
            lambda: axolotl.loss(s[None], ids, None, mask),
            lambda: axolotl.ChunkedTopKKDLoss()(s[None], ids, None, mask),
        ],
        "teacher_input": [
            lambda: liger.LigerFusedLinearJSDLoss()(h, w, None, w, y),
            lambda: liger.LigerFusedLinearJSD()(h, w, None, w, y),
        ],
        "teacher_weight": [lambda: liger.LigerFusedLinearJSDLoss()(h, w, h, None, y)],
        "target": [lambda: liger.LigerFusedLinearKLDivLoss()(h, w, None)],
        "log_p": [lambda: liger.LigerJSD()(s, None)],
        "y_true": [lambda: liger.LigerKLDIVLoss()(s, None)],
    }


def test_a_soft_term_without_a_teacher_is_refused_N_25() -> None:
    """atropos#456: the teacher's values were collected, and the loss was a cross-entropy alone."""
    for name, calls in without_a_teacher().items():
        for call in calls:
            with pytest.raises((TypeError, ValueError), match=rf"^({name}|the teacher must)"):
                call()


def test_a_label_beyond_the_vocabulary_is_refused_N_21() -> None:
    """torchtitan#4297: a loss of 0, and a gradient that was not. Shards wait for theirs."""
    s, t = torch.randn(N, V), torch.randn(N, V)
    identity = torch.eye(V)
    for label in (V, -5):
        y = torch.tensor([0, 1, label, -100, 3])
        for call in (
            lambda y=y: KDLoss()(s, t, y),
            lambda y=y: KDLoss()(Head(s, identity), Head(t, identity), y),
            lambda y=y: liger.LigerFusedLinearJSDLoss()(s, identity, t, identity, y),
            lambda y=y: liger.LigerFusedCETVDLoss()(s, t, y),
            lambda y=y: model_optimizer.MFTLoss()(s, t, y),
        ):
            with pytest.raises(ValueError, match=rf"must be in \[0, {V}\).*got {label} at .* 2"):
                call()


@pytest.mark.slow
@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"
)
def test_the_terms_weigh_the_same_whatever_the_tensor_parallelism_N_18(tmp_path: Path) -> None:
    """NeMo RL#2745: the soft term divided by the count of all ranks, the hard by its replicas'."""
    assert not (found := failures(MESH_CHECKS, 4, tmp_path)), "\n".join(found)
