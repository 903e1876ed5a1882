"""Public reports about glue, with real trainers and models; numbers as N-17."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from needs import need
from torch import Tensor, nn
from trl_training import conversations, models, settings, tokenizer

need("transformers")
need("accelerate")
need("trl")
from transformers import LlamaForCausalLM, Trainer, TrainingArguments  # noqa: E402
from trl.experimental.gkd import GKDConfig, GKDTrainer  # noqa: E402

from fused_kd.integrations.transformers import DistillationLoss  # noqa: E402
from fused_kd.integrations.trl import generalized_jsd_loss, use_fused_kd  # noqa: E402

#: An update as one batch, and as four micro-batches.
ROWS, STEPS = "per_device_train_batch_size", "gradient_accumulation_steps"
CUTS: tuple[dict[str, Any], ...] = ({ROWS: 4, STEPS: 1}, {ROWS: 1, STEPS: 4})
EACH = pytest.mark.parametrize("heads", tiny.BOTH)


@EACH
def test_accumulation_in_trl_changes_no_norm_N_17(tmp_path: Path, heads: bool) -> None:
    # ms-swift#6663: since 0.24 TRL passes num_items_in_batch; loss and gradient norm grew by 4
    seen = []
    for cut in CUTS:
        arguments = GKDConfig(**settings(tmp_path, lmbda=0.0, max_length=32, **cut))
        data = {"train_dataset": conversations(), "processing_class": tokenizer()}
        trainer = GKDTrainer(*models(), args=arguments, **data)
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
    # transformers#37766: num_items_in_batch was dropped, and the loss grew by the accumulation
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
