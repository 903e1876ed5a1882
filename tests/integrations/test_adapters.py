"""Public reports of faults in other projects' glue: a test each, over every adapter.

P01 axolotl, P02 axolotl#3660, P03 TRL#5731, P04 TRL#6629, P49 FLA, N-23 RLCSD#6 and fmchisel#23;
and the shift of labels. P09, TRL#3043 (β), is in the comparisons with the frameworks' own losses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from needs import need
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
#: Every adapter that has a soft term, without a hard one.
SOFT: dict[str, Loss] = {
    "liger fused linear jsd loss": on_logits(
        liger.LigerFusedLinearJSDLoss(**ONLY_SOFT, temperature=T)
    ),
    "liger fused linear jsd": on_logits(liger.LigerFusedLinearJSD(temperature=T)),
    "liger fused linear kl": _kl_of_probabilities,
    "liger jsd": lambda s, t, y: liger.LigerJSD()(s.log_softmax(-1), t.log_softmax(-1), y),
    "trl": lambda s, t, y: generalized_jsd_loss(s[None], t[None], y[None], temperature=T),
    "model optimizer": lambda s, t, y: model_optimizer.LogitsDistillationLoss(T)(s, t),
    "automodel": automodel.KDLoss(temperature=T),
}
EVERY = pytest.mark.parametrize("name", SOFT)


def logits(rows: int = N, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(rows, V, dtype=torch.float64, generator=draw)


def value_and_gradient(loss: Loss, s: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    leaf = s.clone().requires_grad_()
    value = loss(leaf, t, y)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


@EVERY
def test_equal_models_have_nothing_to_learn_P03(name: str) -> None:
    s, y = logits(), torch.arange(N)
    value, gradient = value_and_gradient(SOFT[name], s, s.clone(), y)
    assert abs(value) < 1e-6
    assert gradient.abs().max() < 1e-12


def _axolotl(loss: Any) -> Loss:
    """Return `loss` of a teacher whose top k are all entries, in float32."""

    def found(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
        logs = t.log_softmax(-1)[None].float()
        ids, mask = torch.arange(V).expand_as(logs), (y != -100)[None, :, None].expand_as(logs)
        return loss(s[None], ids, logs, mask, num_items_in_batch=1)

    return found


def _kl_of_log_probabilities(log_target: bool) -> Loss:
    loss = liger.LigerKLDIVLoss(log_target=log_target)
    return lambda s, t, y: loss(
        s.log_softmax(-1), t.log_softmax(-1) if log_target else t.softmax(-1)
    )


#: All adapters.
ADAPTERS: dict[str, Loss] = {
    **SOFT,
    "liger kl of probabilities": _kl_of_log_probabilities(False),
    "liger kl of log-probabilities": _kl_of_log_probabilities(True),
    "liger ce and tvd": lambda s, t, y: liger.LigerFusedCETVDLoss()(s, t, y)[1].sum(),
    "axolotl": _axolotl(axolotl.loss),
    "axolotl, chunks": _axolotl(axolotl.ChunkedTopKKDLoss(2)),
    "model optimizer, mft": lambda s, t, y: model_optimizer.MFTLoss(T, 0.0)(s, t, s.argmax(-1)),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_teacher_that_is_one_token_off_is_seen_N_23(name: str) -> None:
    s, y = logits(), torch.arange(N)
    y[-1] = -100
    same, rolled = (ADAPTERS[name](s, t, y).item() for t in (s.clone(), s.roll(1, 0)))
    assert abs(same) < 1e-5
    assert rolled - same > 0.1


@EVERY
def test_rows_that_do_not_count_change_nothing_P49(name: str) -> None:
    # Model Optimizer has no labels, and divides by all rows, also here
    s, t, y = logits(), logits(seed=1), torch.arange(N)
    want = value_and_gradient(SOFT[name], s, t, y)
    longer = [torch.cat([x, logits(3, seed=2)]) for x in (s, t)]
    got = value_and_gradient(SOFT[name], *longer, F.pad(y, (0, 3), value=-100))
    if name == "model optimizer":
        longer[0][N:] = longer[1][N:]  # rows that lose nothing
        value = value_and_gradient(SOFT[name], *longer, y)[0]
        torch.testing.assert_close(value, want[0] * N / (N + 3))
        return
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1][:N], want[1])
    assert not got[1][N:].any()


@EVERY
def test_the_gradient_is_that_of_the_value_P01(name: str) -> None:
    s, t, y = logits(), logits(seed=1), torch.arange(N)
    direction, step = logits(seed=2), 1e-5
    _, gradient = value_and_gradient(SOFT[name], s, t, y)
    ahead, behind = (SOFT[name](s + h * direction, t, y) for h in (step, -step))
    slope = (ahead - behind) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-9)


def hugging_face(
    student: nn.Module, teacher: nn.Module, batch: Any, heads: bool, **options: Any
) -> list[Tensor]:
    """Return the loss of a batch by the adapters that shift its labels."""
    (batch, labels), loss = tiny.split(batch), KDLoss(**options)
    with_trainer = DistillationLoss(student.train(), teacher, loss, heads=heads)
    found = with_trainer(student(**batch), labels)
    with_trainer.remove()
    return [found, StudentTeacherLoss(student, teacher, loss, heads=heads)(labels=labels, **batch)]


@pytest.mark.parametrize("heads", tiny.BOTH)
def test_each_token_learns_the_next_one(heads: bool) -> None:
    # shifted here by slices; the first token of a row is no label
    student, teacher = tiny.llama(0), tiny.llama(1)
    batch = tiny.padded(tiny.ragged(3))
    changed = {**batch, "labels": batch["labels"].clone()}
    changed["labels"][:, 0] = 5
    s, t = (
        model(batch["input_ids"], batch["attention_mask"]).logits for model in (student, teacher)
    )
    labels = batch["labels"][:, 1:]
    p, q = (x[:, :-1][labels != -100].double().log_softmax(-1) for x in (s, t))
    hard = -p.gather(-1, labels[labels != -100][:, None]).mean()
    want = 0.5 * hard + 0.5 * (q.exp() * (q - p)).sum(-1).mean()
    for given in (batch, changed):
        for found in hugging_face(student, teacher, given, heads):
            torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=0)


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
    for heads in (False,) if family == "Gemma2" else tiny.BOTH:
        for found in hugging_face(student, teacher, batch, heads):
            torch.testing.assert_close(found, want)
    if family == "Gemma2":
        for pair in ((student, tiny.llama(1)), (tiny.llama(0), teacher)):
            for kind in (DistillationLoss, StudentTeacherLoss):
                with pytest.raises(ValueError, match="soft-capping"):
                    kind(*pair, heads=True)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.25, 0.0), (0.5, 0.5)])
def test_the_hard_term_has_its_gradient_P02(weights: tuple[float, float]) -> None:
    hard, soft = weights
    s, t, y = logits(), logits(seed=1), torch.arange(N)
    want = value_and_gradient(lambda s, t, y: hard * F.cross_entropy(s, y), s, t, y)[1]
    if soft:
        both = SOFT["liger fused linear jsd loss"]
        want = want + soft * value_and_gradient(both, s, t, y)[1]
    loss = liger.LigerFusedLinearJSDLoss(hard, soft, temperature=T)
    torch.testing.assert_close(value_and_gradient(on_logits(loss), s, t, y)[1], want)
    student, teacher = tiny.llama(0), tiny.llama(1)
    batch = tiny.padded(tiny.ragged(3))
    weighted = {"hard_weight": hard, "soft_weight": 0.0}
    for heads in (False, True):
        for found in hugging_face(student, teacher, batch, heads, **weighted):
            got = torch.autograd.grad(found, student.lm_head.weight)[0]
            own = hard * student(**batch).loss
            torch.testing.assert_close(
                got, torch.autograd.grad(own, student.lm_head.weight)[0], rtol=1e-4, atol=1e-7
            )
