"""Bugs that others reported in glue code, tested on every adapter that needs no framework.

N-08 and P47 are numbers of reports. P01, P02, P09, P49 and the shift of labels are tested in the
comparisons with the frameworks' own losses, and in real trainings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import ADAPTERS, LABELLED
from support.distributed import MESH_CHECKS
from support.losses import outcome, refused
from support.processes import failures
from torch import Tensor
from torch import distributed as dist

from fused_kd import Head, KDLoss
from fused_kd.integrations import axolotl, liger, model_optimizer

N, V, H = 5, 7, 3


def logits(seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(N, V, dtype=torch.float64, generator=draw)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_teacher_that_is_one_token_off_is_seen_N_23(name: str) -> None:
    # RLCSD#6 and fmchisel#23; and P03, TRL#5731: equal models have no loss
    s, y = logits(0), torch.arange(N)
    y[-1] = -100
    same, gradient = outcome(ADAPTERS[name], [s], s.clone(), y)
    rolled, _ = outcome(ADAPTERS[name], [s], s.roll(1, 0), y)
    assert abs(same) < 1e-5
    assert gradient.abs().max() < 1e-6
    assert rolled - same > 0.1


@pytest.mark.parametrize("name", LABELLED)
def test_no_row_that_counts_P47(name: str) -> None:
    value, gradient = outcome(ADAPTERS[name], [logits(0)], logits(1), torch.full((N,), -100))
    assert value == 0
    assert not gradient.any()


def of_probabilities(q: Tensor) -> dict[str, Tensor]:
    """Return Σ q (log q - log p) by each adapter that takes probabilities q, and by the formula."""
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
    # pytorch#69230; the rows' masses are 0, a half, 1, nearly 1 and 3
    q = torch.randn(N, V, generator=torch.Generator().manual_seed(1)).softmax(-1)
    losses = of_probabilities(q * torch.tensor([0.0, 0.5, 1.0, 0.999, 3.0])[:, None])
    for name, value in losses.items():
        torch.testing.assert_close(value, losses["formula"], rtol=1e-5, atol=1e-6, msg=name)


def test_a_negative_target_is_never_dropped_N_08() -> None:
    # pytorch#69230: torch's kl_div counts it as 0. A compiled loss reads no values: NaN
    q = torch.full((N, V), 1 / V)
    q[2, 3] = -1 / V
    tensors = torch.randn(N, H), torch.randn(V, H)
    calls: tuple[tuple[Any, tuple[Tensor, ...]], ...] = (
        (liger.LigerFusedLinearKLDivLoss(), (*tensors, q)),
        (liger.LigerKLDIVLoss(reduction="batchmean"), (torch.randn(N, V).log_softmax(-1), q)),
    )
    for loss, inputs in calls:
        refused(ValueError, r"must hold probabilities.*got -0\.14", loss, *inputs)
        assert torch.compile(loss, backend="eager")(*inputs).isnan()


def test_a_soft_term_without_a_teacher_is_refused_N_25() -> None:
    # atropos#456: the teacher's values were collected, and the loss was a cross-entropy alone. The
    # adapters are in test_adapter_messages.py
    s, y = torch.randn(N, V), torch.arange(N)
    for student in (s, Head(s, torch.eye(V))):
        refused(ValueError, "^teacher must be given when soft_weight", KDLoss(), student, None, y)


def test_a_label_beyond_the_vocabulary_is_refused_N_21() -> None:
    # torchtitan#4297: a loss of 0, and a gradient that was not
    s, t = torch.randn(N, V), torch.randn(N, V)
    identity = torch.eye(V)
    for label in (V, -5):
        y = torch.tensor([0, 1, label, -100, 3])
        message = rf"must be in \[0, {V}\).*got {label} at .* 2"
        for loss, sides in (
            (KDLoss(), (s, t)),
            (KDLoss(), (Head(s, identity), Head(t, identity))),
            (liger.LigerFusedLinearJSDLoss(), (s, identity, t, identity)),
            (liger.LigerFusedCETVDLoss(), (s, t)),
            (model_optimizer.MFTLoss(), (s, t)),
        ):
            refused(ValueError, message, loss, *sides, y)


@pytest.mark.slow
@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"
)
def test_the_terms_weigh_the_same_with_tensor_parallelism_N_18(tmp_path: Path) -> None:
    # NeMo RL#2745: the soft term was divided by all ranks, the hard term by its replicas only
    assert not (failed := failures(MESH_CHECKS, 4, tmp_path)), "\n".join(failed)
