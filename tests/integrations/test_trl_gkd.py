"""TRL's GKDTrainer trains as before with fused_kd's loss; other trainers are unchanged."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from needs import need
from torch import Tensor, nn
from trl_training import BETAS, V, conversations, models, same, settings, tokenizer, trained

transformers = need("transformers")
need("trl")
from tiny import BOTH  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402
from trl.experimental.gkd import GKDConfig, GKDTrainer  # noqa: E402

from fused_kd import Head, KDLoss  # noqa: E402
from fused_kd.integrations.trl import restore, use_fused_kd  # noqa: E402
from fused_kd.integrations.trl.trainers import models_of  # noqa: E402

SCALED = {"Granite": {"logits_scaling": 3.0}, "Cohere": {"logit_scale": 0.3}}
CAPPED = {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}


def gkd(
    folder: Path, family: str = "Llama", changes: Any = None, kind: Any = GKDTrainer, **given: Any
) -> GKDTrainer:
    """Return a trainer whose student, teacher and data are always the same."""
    usual = {"lmbda": 0.0, "max_length": 32, "max_new_tokens": 4}
    arguments = GKDConfig(**settings(folder, **{**usual, **given}))
    data = {"train_dataset": conversations(), "eval_dataset": conversations(4)}
    pair = models(family, **(changes or {}))
    return kind(*pair, args=arguments, **data, processing_class=tokenizer())


# ------------------------------------------------------------------------------ training


@pytest.mark.parametrize(
    ("beta", "accumulation"), [*((beta, 1) for beta in BETAS), (0.0, 4), (0.1, 4)]
)
def test_training(tmp_path: Path, beta: float, accumulation: int) -> None:
    make = partial(gkd, tmp_path, beta=beta, gradient_accumulation_steps=accumulation)
    theirs = trained(make())
    for heads in BOTH:
        in_place = not heads and accumulation > 1
        same(trained(use_fused_kd(make(), heads=heads, inplace=in_place)), theirs)


OTHERS = {"its own completions": {"lmbda": 1.0, "max_steps": 2}}
OTHERS |= {family: {"family": family, "changes": changes} for family, changes in SCALED.items()}


@pytest.mark.parametrize("given", OTHERS.values(), ids=OTHERS)
def test_training_of_other_kinds(tmp_path: Path, given: dict[str, Any]) -> None:
    make = partial(gkd, tmp_path, **given)
    theirs = trained(make())
    for heads in BOTH:
        same(trained(use_fused_kd(make(), heads=heads)), theirs)


def test_soft_capped_logits(tmp_path: Path) -> None:
    make = partial(gkd, tmp_path, "Gemma2", {**CAPPED, "attn_implementation": "eager"})
    same(trained(use_fused_kd(make())), trained(make()))
    with pytest.raises(ValueError, match="soft-capping"):
        use_fused_kd(make(), heads=True)


@pytest.mark.parametrize("heads", BOTH)
def test_mixed_precision_and_checkpointing(tmp_path: Path, heads: bool) -> None:
    make = partial(gkd, tmp_path, bf16=True, gradient_checkpointing=True)
    (ours, _), (theirs, _) = trained(use_fused_kd(make(), heads=heads)), trained(make())
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0)  # logits rounded to bfloat16


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


@pytest.mark.parametrize("heads", BOTH)
def test_evaluation_N_30(tmp_path: Path, heads: bool) -> None:
    own, ours = gkd(tmp_path), use_fused_kd(gkd(tmp_path), heads=heads)
    theirs = own.evaluate()["eval_loss"]
    assert ours.evaluate()["eval_loss"] == pytest.approx(theirs, rel=1e-5)
    # logits that are asked for are logits in any case
    data = conversations(2)
    torch.testing.assert_close(*(t.predict(data).predictions for t in (ours, own)))


# ------------------------------------------------------------------ one trainer, not the library


@pytest.mark.parametrize("heads", BOTH)
def test_only_this_trainer(tmp_path: Path, heads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("generalized_jsd_loss", "compute_loss")
    in_trl = {name: vars(GKDTrainer)[name] for name in names}
    make = partial(gkd, tmp_path, max_steps=1)
    trainer, other = make(), make()
    assert use_fused_kd(use_fused_kd(trainer, heads=heads), heads=heads) is trainer
    assert {name: vars(GKDTrainer)[name] for name in names} == in_trl
    assert not set(names) & set(vars(other))

    def never(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("TRL's own loss")

    with monkeypatch.context() as broken:
        broken.setattr(GKDTrainer, "generalized_jsd_loss", staticmethod(never))
        with pytest.raises(AssertionError, match="own loss"):
            other.train()
        trained(trainer)
    assert restore(trainer) is trainer
    assert not set(names) & set(vars(trainer))
    same(trained(restore(use_fused_kd(make(), heads=heads))), trained(make()))


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


# ------------------------------------------------------------------------------ bad input


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


def test_other_trainers(tmp_path: Path) -> None:
    arguments, student = SFTConfig(**settings(tmp_path)), models()[0]
    data = {"train_dataset": conversations(), "processing_class": tokenizer()}
    other = SFTTrainer(student, arguments, **data)
    for trainer in (other, nn.Linear(1, 1), None):
        with pytest.raises(TypeError, match="trainer must be a GKDTrainer or a Distillation"):
            use_fused_kd(trainer)


def test_wrong_models_and_options(tmp_path: Path) -> None:
    trainer = gkd(tmp_path)
    for keywords, message in (
        ({"heads": True, "inplace": True}, "inplace must be False with heads=True"),
        ({"memory_budget": 2**20}, "memory_budget must be None with heads=False"),
        ({"heads": True, "memory_budget": 0}, "memory_budget must be at least 1"),
        ({"backend": "tpu"}, "backend must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            use_fused_kd(trainer, **keywords)
    teacher, config = trainer.teacher_model, transformers.BertConfig(vocab_size=V, hidden_size=24)
    trainer.teacher_model = transformers.BertForMaskedLM(config)
    with pytest.raises(ValueError, match=r"BertForMaskedLM.*TRL's trainers shift the labels"):
        use_fused_kd(trainer)
    trainer.teacher_model = teacher
    trainer.teacher_model.lm_head = nn.Linear(24, V + 1, bias=False)
    with pytest.raises(ValueError, match="must share a vocabulary"):
        use_fused_kd(trainer)
    trainer.teacher_model = None
    with pytest.raises(TypeError, match="must have a teacher_model"):
        use_fused_kd(trainer)
    assert "generalized_jsd_loss" not in vars(trainer)


def test_unknown_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def newer(student_logits: Tensor, teacher_logits: Tensor, skew: float = 0.1) -> None:
        pass

    trainer = gkd(tmp_path)
    monkeypatch.setattr(GKDTrainer, "generalized_jsd_loss", staticmethod(newer))
    with pytest.raises(TypeError, match=r"has \['skew'\] in trl 1.*works with trl 1"):
        use_fused_kd(trainer)
