"""Public reports of faults in other projects' glue: a test each, over every adapter.

P03 TRL#5731, P04 TRL#6629, P47, N-23 RLCSD#6 and fmchisel#23. P01, P02, P09, P49 and the shift of
labels are in the comparisons with the frameworks' own losses, and in real trainings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from needs import need
from support.losses import outcome, refused
from torch import Tensor, nn

need("transformers")
need("trl")
from fused_kd import KDLoss  # noqa: E402
from fused_kd.integrations import automodel, axolotl, liger, model_optimizer  # noqa: E402
from fused_kd.integrations.loop import shifted  # noqa: E402
from fused_kd.integrations.student_teacher import StudentTeacherLoss  # noqa: E402
from fused_kd.integrations.transformers import DistillationLoss  # noqa: E402
from fused_kd.integrations.trl import generalized_jsd_loss  # noqa: E402

N, V, T = 7, 19, 2.0
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def on_logits(fused_linear: nn.Module) -> Loss:
    """Return a loss of logits: hidden states under a head that is the identity."""
    return lambda s, t, y: fused_linear(
        s, torch.eye(V, dtype=s.dtype), t, torch.eye(V, dtype=t.dtype), y
    )


def _kl_of_probabilities(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    loss = liger.LigerFusedLinearKLDivLoss(temperature=T)
    return loss(s, torch.eye(V, dtype=s.dtype), (t / T).softmax(-1), y)


ONLY_SOFT = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0}


def logits(seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(N, V, dtype=torch.float64, generator=draw)


def _axolotl(loss: Any) -> Loss:
    """Return `loss` of a teacher whose top k are all entries, in float32."""

    def of_logits(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
        logs = t.log_softmax(-1)[None].float()
        ids, mask = torch.arange(V).expand_as(logs), (y != -100)[None, :, None].expand_as(logs)
        return loss(s[None], ids, logs, mask, num_items_in_batch=1)

    return of_logits


def _kl_of_log_probabilities(log_target: bool) -> Loss:
    loss = liger.LigerKLDIVLoss(log_target=log_target)
    return lambda s, t, y: loss(
        s.log_softmax(-1), t.log_softmax(-1) if log_target else t.softmax(-1)
    )


ONLY_SOFT = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0}
#: Every adapter, without a hard term.
ADAPTERS: dict[str, Loss] = {
    "liger fused linear jsd loss": on_logits(
        liger.LigerFusedLinearJSDLoss(**ONLY_SOFT, temperature=T)
    ),
    "liger fused linear jsd": on_logits(liger.LigerFusedLinearJSD(temperature=T)),
    "liger fused linear kl": _kl_of_probabilities,
    "liger jsd": lambda s, t, y: liger.LigerJSD()(s.log_softmax(-1), t.log_softmax(-1), y),
    "liger kl of probabilities": _kl_of_log_probabilities(False),
    "liger kl of log-probabilities": _kl_of_log_probabilities(True),
    "liger ce and tvd": lambda s, t, y: liger.LigerFusedCETVDLoss()(s, t, y)[1].sum(),
    "trl": lambda s, t, y: generalized_jsd_loss(s[None], t[None], y[None], temperature=T),
    "model optimizer": lambda s, t, y: model_optimizer.LogitsDistillationLoss(T)(s, t),
    "model optimizer, mft": lambda s, t, y: model_optimizer.MFTLoss(T, 0.0)(s, t, s.argmax(-1)),
    "automodel": automodel.KDLoss(temperature=T),
    "axolotl": _axolotl(axolotl.loss),
    "axolotl, chunks": _axolotl(axolotl.ChunkedTopKKDLoss(2)),
}
#: Or without those that ignore a row.
WITHOUT_LABELS = {"liger kl of probabilities", "liger kl of log-probabilities"}
WITHOUT_LABELS |= {"model optimizer", "model optimizer, mft"}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_teacher_that_is_one_token_off_is_seen_P03_N_23(name: str) -> None:
    s, y = logits(), torch.arange(N)
    y[-1] = -100
    same, gradient = outcome(ADAPTERS[name], [s], s.clone(), y)
    rolled, _ = outcome(ADAPTERS[name], [s], s.roll(1, 0), y)
    assert abs(same) < 1e-5
    assert gradient.abs().max() < 1e-6
    assert rolled - same > 0.1


@pytest.mark.parametrize("name", sorted(ADAPTERS.keys() - WITHOUT_LABELS))
def test_no_row_that_counts_P47(name: str) -> None:
    nothing = torch.full((N,), -100)
    value, gradient = outcome(ADAPTERS[name], [logits()], logits(seed=1), nothing)
    assert value == 0
    assert not gradient.any()


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [
        ("Gemma2", "final_logit_softcapping", 0.5),
        ("Cohere", "logit_scale", 0.25),
        ("Granite", "logits_scaling", 4.0),
    ],
)
def test_caps_and_scales_of_logits_are_never_dropped_P04(
    family: str, name: str, value: float
) -> None:
    student, teacher = (tiny.of(family, seed, **{name: value}) for seed in (0, 1))
    batch = tiny.padded(tiny.ragged(3))
    inputs, labels = tiny.split(batch)
    want = KDLoss()(student(**inputs).logits, teacher(**inputs).logits.detach(), shifted(labels))
    for kind in (StudentTeacherLoss, DistillationLoss):
        for heads in (False,) if family == "Gemma2" else tiny.BOTH:
            adapter = kind(student.train(), teacher, heads=heads)
            torch.testing.assert_close(tiny.loss_of(adapter, student, batch), want)
        if family == "Gemma2":
            for pair in ((student, tiny.llama(1)), (tiny.llama(0), teacher)):
                refused(ValueError, "soft-capping", kind, *pair, heads=True)
