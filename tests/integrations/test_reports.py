"""Public reports about glue, with real trainers and models; numbers as N-17."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from needs import need
from torch import Tensor, nn
from trl_training import conversations, models, prompts, settings, tokenizer

need("transformers")
need("accelerate")
need("trl")
from transformers import LlamaForCausalLM, Trainer, TrainingArguments  # noqa: E402
from trl import DistillationConfig, DistillationTrainer  # noqa: E402
from trl.experimental.gkd import GKDConfig, GKDTrainer  # noqa: E402

from fused_kd import KDLoss  # noqa: E402
from fused_kd.integrations.loop import shifted  # noqa: E402
from fused_kd.integrations.student_teacher import StudentTeacherLoss  # noqa: E402
from fused_kd.integrations.transformers import DistillationLoss  # noqa: E402
from fused_kd.integrations.trl import generalized_jsd_loss, use_fused_kd  # noqa: E402

#: An update as one batch, and as four micro-batches.
ROWS, STEPS = "per_device_train_batch_size", "gradient_accumulation_steps"
CUTS: tuple[dict[str, Any], ...] = ({ROWS: 4, STEPS: 1}, {ROWS: 1, STEPS: 4})
EACH = pytest.mark.parametrize("heads", tiny.BOTH)


def gkd(folder: Path, *pair: nn.Module, **changes: Any) -> Any:
    arguments = GKDConfig(**settings(folder, lmbda=0.0, max_length=32, **changes))
    data = {"train_dataset": conversations(), "eval_dataset": conversations(4)}
    return GKDTrainer(*pair, args=arguments, **data, processing_class=tokenizer())


@EACH
def test_accumulation_in_trl_changes_no_norm_N_17(tmp_path: Path, heads: bool) -> None:
    """ms-swift#6663: since 0.24 TRL passes num_items_in_batch; loss and gradient norm grew by 4."""
    seen = []
    for cut in CUTS:
        trainer = gkd(tmp_path, *models(), **cut)
        use_fused_kd(trainer, heads=heads).train()
        seen.append([tiny.logged(trainer, key) for key in ("loss", "grad_norm")])
    for whole, parts in zip(*seen, strict=True):
        assert len(whole) == 3
        assert parts == pytest.approx(whole, rel=1e-4)


def test_messages_name_trls_own_argument() -> None:
    logits = torch.randn(1, 3, 7)
    with pytest.raises(ValueError, match=r"^num_items_in_batch must be positive .*; got -1"):
        generalized_jsd_loss(logits, logits, num_items_in_batch=-1)


class NoKeywords(LlamaForCausalLM):  # type: ignore[misc]
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
    ) -> Any:
        return super().forward(input_ids, attention_mask, labels=labels, use_cache=use_cache)


@EACH
def test_models_that_take_no_keywords_of_a_loss_N_19(tmp_path: Path, heads: bool) -> None:
    """transformers#37766: num_items_in_batch was dropped, and the loss grew by the accumulation."""
    from transformers import LlamaConfig

    weights = []
    for cut in CUTS:
        student, teacher = (tiny.build(NoKeywords, LlamaConfig, seed) for seed in (0, 1))
        arguments = tiny.settings(tmp_path, max_steps=1, max_grad_norm=0.0, **cut)
        loss = DistillationLoss(student, teacher, heads=heads)
        data = {"train_dataset": tiny.ragged(), "data_collator": tiny.padded}
        trainer = Trainer(student, TrainingArguments(**arguments), compute_loss_func=loss, **data)
        assert not trainer.model_accepts_loss_kwargs
        trainer.train()
        weights.append(nn.utils.parameters_to_vector(student.parameters()).detach())
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)
    before = tiny.build(NoKeywords, LlamaConfig, 0).parameters()
    assert (weights[0] - nn.utils.parameters_to_vector(before)).abs().max() > 1e-3


# ---------------------------------------------------------------- a teacher that is one token off


def pair(rolled: bool) -> tuple[nn.Module, nn.Module]:
    """Return equal models; `rolled`: the teacher's hidden states and logits are a token late."""
    student, teacher = tiny.llama(1), tiny.llama(1)
    if rolled:
        teacher.model.norm.register_forward_hook(lambda _, inputs, output: output.roll(1, 1))
    return student, teacher


def of_trainer(heads: bool, folder: Path, student: nn.Module, teacher: nn.Module) -> float:
    inputs, labels = tiny.split(tiny.padded(tiny.ragged(3)))
    compute = DistillationLoss(student.train(), teacher, heads=heads)
    compute(student(**inputs), labels)
    assert compute.training_parts.sums is not None
    return compute.training_parts.sums[1].item()


def of_module(heads: bool, folder: Path, *models: nn.Module) -> float:
    return StudentTeacherLoss(*models, heads=heads).parts(**tiny.padded(tiny.ragged(3))).soft.item()


def of_gkd(heads: bool, folder: Path, *models: nn.Module) -> float:
    evaluated = use_fused_kd(gkd(folder, *models), heads=heads).evaluate()
    return evaluated["eval_loss"]  # type: ignore[no-any-return]


def of_distillation(heads: bool, folder: Path, *models: nn.Module) -> float:
    arguments = DistillationConfig(**settings(folder, max_completion_length=6))
    data = {"train_dataset": prompts(4), "eval_dataset": prompts(4)}
    trainer = DistillationTrainer(*models, args=arguments, **data, processing_class=tokenizer())
    return use_fused_kd(trainer).evaluate()["eval_loss"]  # type: ignore[no-any-return]


def of_lightning(heads: bool, folder: Path, *models: nn.Module) -> float:
    """Return the loss by TeacherCallback; KDModule is a StudentTeacherLoss."""
    pl = need("lightning").pytorch
    from fused_kd.integrations.lightning import TeacherCallback

    class Own(pl.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.student = models[0]

        def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            student = self.student(batch["input_ids"], batch["attention_mask"]).logits
            self.log("soft", soft(student, batch["teacher"], shifted(batch["labels"])))

    soft = KDLoss(hard_weight=0.0, soft_weight=1.0)
    trainer = tiny.lightning_trainer(folder, callbacks=[TeacherCallback(models[1])])
    loader = torch.utils.data.DataLoader(tiny.ragged(3), batch_size=3, collate_fn=tiny.padded)
    return trainer.validate(Own(), loader, verbose=False)[0]["soft"]  # type: ignore[no-any-return]


def of_model_optimizer(heads: bool, folder: Path, *models: nn.Module) -> float:
    need("modelopt")
    import modelopt.torch.distill as mtd

    from fused_kd.integrations.model_optimizer import LogitsDistillationLoss

    criterion = {("lm_head", "lm_head"): LogitsDistillationLoss(reduction="batchmean")}
    config = {"teacher_model": models[1], "criterion": criterion}
    model = mtd.convert(models[0], mode=[("kd_loss", config)])
    model.train()
    model(**tiny.padded(tiny.ragged(3)))
    return model.compute_kd_loss().item()  # type: ignore[no-any-return]


EITHER = [(of, heads) for of in (of_trainer, of_module, of_gkd) for heads in tiny.BOTH]
ALONE = [(of, False) for of in (of_distillation, of_lightning, of_model_optimizer)]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("adapter", "heads"), [*EITHER, *ALONE])
def test_a_teacher_that_is_one_token_off_is_seen_N_23(
    tmp_path: Path, adapter: Any, heads: bool
) -> None:
    """RLCSD#6, Model-Optimizer#1191: logits shifted twice, or by a micro-batch's length."""
    assert abs(adapter(heads, tmp_path, *pair(rolled=False))) < 1e-5
    assert adapter(heads, tmp_path, *pair(rolled=True)) > 0.05
