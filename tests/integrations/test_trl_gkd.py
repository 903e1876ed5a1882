"""TRL's GKDTrainer: autocast, accumulation, what was set before, refusals."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from needs import need
from support.losses import refused
from torch import Tensor, nn
from trl_training import V, same, trained, trainer_of

transformers = need("transformers")
need("trl")
from trl.experimental.gkd import GKDTrainer  # noqa: E402

from fused_kd import Head, KDLoss  # noqa: E402
from fused_kd.integrations.trl import restore, use_fused_kd  # noqa: E402
from fused_kd.integrations.trl.trainers import models_of  # noqa: E402

CAPPED = {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}
gkd = partial(trainer_of, "gkd")


def test_soft_capped_logits(tmp_path: Path) -> None:
    make = partial(gkd, tmp_path, "Gemma2", {**CAPPED, "attn_implementation": "eager"})
    same(trained(use_fused_kd(make())), trained(make()))
    with pytest.raises(ValueError, match="soft-capping"):
        use_fused_kd(make(), heads=True)


def test_products_of_heads_run_under_the_trainers_autocast(tmp_path: Path) -> None:
    trainer = use_fused_kd(gkd(tmp_path, bf16=True, max_steps=1), heads=True)
    loss, seen, weights = trainer.generalized_jsd_loss, [], []

    def watched(**keywords: Any) -> Tensor:
        weights.extend(m.lm_head.weight.detach().clone() for m in models_of(trainer))
        seen.append((loss(**keywords), keywords))
        return seen[0][0]

    trainer.generalized_jsd_loss = watched
    trainer.train()
    [(found, given)] = seen
    student, teacher = given["student_logits"].detach(), given["teacher_logits"]
    sides = Head(student, weights[0]), Head(teacher, weights[1])
    num_items = given["num_items_in_batch"]
    for is_autocast in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
            again = KDLoss.like("trl")(*sides, given["labels"], num_items=num_items)
        assert torch.equal(again, found.detach()) is is_autocast


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

    theirs = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.3, temperature=0.9, compiled=False
    )
    trainer = gkd(tmp_path)
    trainer.liger_loss = theirs
    use_fused_kd(trainer)
    assert trainer.liger_loss is not theirs
    student, teacher = torch.randn(7, 16), torch.randn(7, 24)
    heads = torch.randn(V, 16), torch.randn(V, 24)
    given = (student, heads[0], teacher, heads[1], torch.tensor([-100, 1, 2, 3, -100, 5, 6]))
    torch.testing.assert_close(trainer.liger_loss(*given), theirs(*given))
    assert restore(trainer).liger_loss is theirs
    trainer.liger_loss = nn.KLDivLoss()
    with pytest.raises(TypeError, match="must be a LigerFusedLinearJSDLoss; got KLDivLoss"):
        use_fused_kd(trainer)


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
    with pytest.raises(TypeError, match=message("generalized_jsd_loss", "OwnLoss")):
        use_fused_kd(gkd(tmp_path, kind=OwnLoss))
    with pytest.raises(TypeError, match=message("compute_loss", "OwnStep")):
        use_fused_kd(gkd(tmp_path, kind=OwnStep), heads=True)
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
