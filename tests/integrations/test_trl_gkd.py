"""TRL's GKDTrainer, and its loss alone: numbers, views, memory, autocast, refusals."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from needs import need
from support.losses import refused
from torch import Tensor, nn
from trl_training import BETAS, V, same, trained, trainer_of

need("trl")
from trl.experimental.gkd import GKDTrainer  # noqa: E402

from fused_kd import Head, KDLoss  # noqa: E402
from fused_kd.integrations.trl import generalized_jsd_loss, restore, use_fused_kd  # noqa: E402
from fused_kd.integrations.trl.trainers import models_of  # noqa: E402
from fused_kd.testing import cpu_peak  # noqa: E402

CAPPED = {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}
gkd = partial(trainer_of, "gkd")


# ------------------------------------------------------------------------------ the loss alone


def logits(batch: int = 3, length: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    student = torch.randn(batch, length, V, requires_grad=True)
    labels = torch.randint(V - 2, (batch, length - 1))
    labels[0, :4] = -100
    labels[1] = -100
    return student, torch.randn(batch, length, V), labels


def check(student: Tensor, *views: Tensor, **options: Any) -> None:
    """Assert that our loss and TRL's of `views` have equal values and gradients by `student`."""
    results = []
    for loss in (generalized_jsd_loss, GKDTrainer.generalized_jsd_loss):
        value = loss(*views, **options)
        results.append((value, *torch.autograd.grad(value, student, retain_graph=True)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("beta", BETAS)
def test_same_numbers(beta: float, temperature: float) -> None:
    student, teacher, targets = logits()
    denominators = [("batchmean", None), ("mean", None), ("sum", None), ("sum", 5)]
    denominators += [("batchmean", torch.tensor(7))]
    slices = itertools.cycle((slice(0, -1), slice(1, None)))
    cases = zip(denominators, slices, strict=False)
    for ((reduction, items), part), labels in itertools.product(cases, (targets, None)):
        options = {"labels": labels, "beta": beta, "temperature": temperature}
        options |= {"reduction": reduction, "num_items_in_batch": items}
        check(student, student[:, part], teacher[:, part], **options)


def test_no_token_counts() -> None:
    student, teacher, labels = logits()
    for reduction in ("batchmean", "mean", "sum"):  # TRL's "mean" is NaN
        nothing = {"labels": torch.full_like(labels, -100), "reduction": reduction}
        loss = generalized_jsd_loss(student[:, :-1], teacher[:, :-1], **nothing)
        assert loss == 0
        assert not torch.autograd.grad(loss, student)[0].count_nonzero()


def test_views_that_are_no_slices() -> None:
    student, teacher, labels = logits()
    two = torch.cat([student, student])
    for s, t in (
        (student[:, :-1], teacher[:, 1:]),  # slices that differ
        (student[:, :-1], teacher[:, :-1].clone()),
        (two[:3, :-1], teacher[:, :-1]),
        (student.transpose(0, 1)[:-1].transpose(0, 1), teacher[:, :-1]),
        (student[:, ::2][:, :3].repeat(1, 2, 1), teacher[:, :-1]),
        (student[:, :-1, 1:-1], teacher[:, :-1, 2:]),
    ):
        check(student, s, t, labels=labels, beta=0.3)
    detached = student.detach()[:, :-1].requires_grad_()
    value = generalized_jsd_loss(detached, teacher[:, :-1], labels)
    assert torch.autograd.grad(value, detached)[0].count_nonzero()


@pytest.mark.parametrize(("inplace", "gradients"), [(False, 1), (True, 0)])
def test_a_slice_has_no_gradient_of_its_own(inplace: bool, gradients: int) -> None:
    shape = (2, 65, 4096)
    student = torch.randn(shape, requires_grad=True) * 1.0
    teacher, labels = torch.randn(shape), torch.randint(4096, (2, 64))

    def loss_and_gradient() -> object:
        loss = generalized_jsd_loss(student[:, :-1], teacher[:, :-1], labels, inplace=inplace)
        return torch.autograd.grad(loss, student)

    assert cpu_peak(loss_and_gradient).highest < (gradients + 0.1) * student.nbytes


def test_what_the_loss_refuses() -> None:
    student, teacher, labels = logits()
    sides = student[:, :-1], teacher[:, :-1], labels
    message = r"reduction must be one of.*got 'none'"
    refused(ValueError, message, generalized_jsd_loss, *sides, reduction="none")
    message = r"^num_items_in_batch must be positive .*; got -1"
    refused(ValueError, message, generalized_jsd_loss, *sides, num_items_in_batch=-1)


# ------------------------------------------------------------------------------ the trainer


def test_soft_capped_logits(tmp_path: Path) -> None:
    make = partial(gkd, tmp_path, "Gemma2", {**CAPPED, "attn_implementation": "eager"})
    same(trained(use_fused_kd(make())), trained(make()))
    refused(ValueError, "soft-capping", use_fused_kd, make(), heads=True)


def test_products_of_heads_run_under_the_trainers_autocast(tmp_path: Path) -> None:
    trainer = use_fused_kd(gkd(tmp_path, bf16=True, max_steps=1), heads=True)
    loss, seen, weights = trainer.generalized_jsd_loss, [], []

    def watched(**keywords: Any) -> Tensor:
        weights.extend(m.lm_head.weight.detach().clone() for m in models_of(trainer))
        seen.append((loss(**keywords), keywords))
        return seen[0][0]

    trainer.generalized_jsd_loss = watched
    trainer.train()
    [(value, inputs)] = seen
    student, teacher = inputs["student_logits"].detach(), inputs["teacher_logits"]
    sides = Head(student, weights[0]), Head(teacher, weights[1])
    num_items = inputs["num_items_in_batch"]
    for is_autocast in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
            again = KDLoss.like("trl")(*sides, inputs["labels"], num_items=num_items)
        assert torch.equal(again, value.detach()) is is_autocast


def test_accumulation_changes_no_norm_N_17(tmp_path: Path, heads: bool) -> None:
    # ms-swift#6663: since 0.24 TRL passes num_items_in_batch; loss and gradient norm grew by 4
    seen = []
    for cut in tiny.CUTS:
        trainer = use_fused_kd(gkd(tmp_path, **cut), heads=heads)
        trainer.train()
        seen.append([tiny.logged(trainer, key) for key in ("loss", "grad_norm")])
    for whole, parts in zip(*seen, strict=True):
        assert len(whole) == 3
        assert parts == pytest.approx(whole, rel=1e-4)


def test_what_was_set_before_comes_back(tmp_path: Path) -> None:
    trainer, mine = gkd(tmp_path), lambda **keywords: None
    trainer.generalized_jsd_loss = mine
    use_fused_kd(trainer)
    assert trainer.generalized_jsd_loss is not mine
    assert restore(restore(trainer)).generalized_jsd_loss is mine


def test_liger_loss_of_older_versions(tmp_path: Path) -> None:
    need("liger_kernel")
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    weights = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "compiled": False}
    theirs = LigerFusedLinearJSDLoss(**weights, beta=0.3, temperature=0.9)
    trainer = gkd(tmp_path)
    trainer.liger_loss = theirs
    use_fused_kd(trainer)
    assert trainer.liger_loss is not theirs
    student, teacher = torch.randn(7, 16), torch.randn(7, 24)
    heads = torch.randn(V, 16), torch.randn(V, 24)
    inputs = (student, heads[0], teacher, heads[1], torch.tensor([-100, 1, 2, 3, -100, 5, 6]))
    torch.testing.assert_close(trainer.liger_loss(*inputs), theirs(*inputs))
    assert restore(trainer).liger_loss is theirs
    trainer.liger_loss = nn.KLDivLoss()
    message = "must be a LigerFusedLinearJSDLoss; got KLDivLoss"
    refused(TypeError, message, use_fused_kd, trainer)


class OwnLoss(GKDTrainer):
    @staticmethod
    def generalized_jsd_loss(student_logits: Tensor, teacher_logits: Tensor, **_: Any) -> Tensor:
        return (student_logits - teacher_logits).square().mean()


class OwnStep(GKDTrainer):
    def compute_loss(self, *arguments: Any, **keywords: Any) -> Any:
        keywords["return_outputs"] = True
        loss, outputs = super().compute_loss(*arguments, **keywords)
        return loss + outputs.logits.square().mean()


def test_subclasses(tmp_path: Path) -> None:
    message = r"must not override GKDTrainer\.{0}.*got {1}\.{0}".format
    for kind, name, heads in (
        (OwnLoss, "generalized_jsd_loss", False),
        (OwnStep, "compute_loss", True),
    ):
        trainer = gkd(tmp_path, kind=kind)
        refused(TypeError, message(name, kind.__name__), use_fused_kd, trainer, heads=heads)
    same(trained(use_fused_kd(gkd(tmp_path, kind=OwnStep))), trained(gkd(tmp_path, kind=OwnStep)))


def test_wrong_models_and_options(tmp_path: Path) -> None:
    trainer = gkd(tmp_path)
    for keywords, message in (
        ({"heads": True, "inplace": True}, "inplace must be False with heads=True"),
        ({"memory_budget": 2**20}, "memory_budget must be None with heads=False"),
        ({"backend": "tpu"}, "backend must be one of"),
    ):
        refused(ValueError, message, use_fused_kd, trainer, **keywords)
    teacher, config = trainer.teacher_model, transformers.BertConfig(vocab_size=V, hidden_size=24)
    trainer.teacher_model = transformers.BertForMaskedLM(config)
    message = r"BertForMaskedLM.*TRL's trainers shift the labels"
    refused(ValueError, message, use_fused_kd, trainer)
    trainer.teacher_model = teacher
    trainer.teacher_model.lm_head = nn.Linear(24, V + 1, bias=False)
    refused(ValueError, "must share a vocabulary", use_fused_kd, trainer)
    assert "generalized_jsd_loss" not in vars(trainer)


def test_unknown_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def newer(student_logits: Tensor, teacher_logits: Tensor, skew: float = 0.1) -> None: ...

    trainer = gkd(tmp_path)
    monkeypatch.setattr(GKDTrainer, "generalized_jsd_loss", staticmethod(newer))
    refused(TypeError, r"has \['skew'\] in trl 1.*works with trl 1", use_fused_kd, trainer)
