"""Public reports about glue, with real trainers and models; numbers as N-17."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from needs import need
from torch import Tensor, nn
from trl_training import build, conversations, settings, tokenizer

need("transformers")
need("accelerate")
need("trl")
from transformers import LlamaForCausalLM, Trainer, TrainingArguments  # noqa: E402
from trl.experimental.gkd import GKDConfig, GKDTrainer  # noqa: E402

from fused_kd import KDLoss, LinearKDLoss  # noqa: E402
from fused_kd.integrations.transformers import DistillationLoss  # noqa: E402
from fused_kd.integrations.trl import use_fused_kd  # noqa: E402

#: Of an update: as one batch, and as four micro-batches.
CUTS = ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4})  # fmt: skip


def logged(trainer: Any, key: str) -> list[float]:
    return [line[key] for line in trainer.state.log_history if key in line]


@pytest.mark.parametrize("level", ["logits", "linear"])
def test_accumulation_in_trl_changes_no_norm_N_17(tmp_path: Path, level: str) -> None:
    """ms-swift#6663: since 0.24 TRL passes num_items_in_batch; loss and gradient norm grew by 4."""
    seen = []
    for cut in CUTS:
        trainer = GKDTrainer(
            model=build("Llama", 16, seed=1), teacher_model=build("Llama", 24, seed=2),
            args=GKDConfig(**settings(tmp_path, lmbda=0.0, max_length=32, **cut)),
            train_dataset=conversations(), processing_class=tokenizer(),
        )  # fmt: skip
        use_fused_kd(trainer, level=level).train()
        seen.append([logged(trainer, key) for key in ("loss", "grad_norm")])
    for whole, parts in zip(*seen, strict=True):
        assert len(whole) == 3
        assert parts == pytest.approx(whole, rel=1e-4)


class NoKeywords(LlamaForCausalLM):  # type: ignore[misc]
    """A model whose forward takes no keywords of a loss."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
    ) -> Any:
        return super().forward(input_ids, attention_mask, labels=labels, use_cache=use_cache)


@pytest.mark.parametrize("loss", [KDLoss(), LinearKDLoss()], ids=["logits", "linear"])
def test_models_that_take_no_keywords_of_a_loss_N_19(tmp_path: Path, loss: Any) -> None:
    """transformers#37766: num_items_in_batch was dropped, and the loss grew by the accumulation."""
    from transformers import LlamaConfig

    weights = []
    for cut in CUTS:
        student, teacher = (tiny.build(NoKeywords, LlamaConfig, seed) for seed in (0, 1))
        trainer = Trainer(
            student,
            TrainingArguments(**settings(tmp_path, max_steps=1, max_grad_norm=0.0, **cut)),
            train_dataset=tiny.ragged(), data_collator=tiny.padded,
            compute_loss_func=DistillationLoss(student, teacher, loss),
        )  # fmt: skip
        assert not trainer.model_accepts_loss_kwargs
        trainer.train()
        weights.append(nn.utils.parameters_to_vector(student.parameters()).detach())
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)
    before = tiny.build(NoKeywords, LlamaConfig, 0).parameters()
    assert (weights[0] - nn.utils.parameters_to_vector(before)).abs().max() > 1e-3
