"""``python -m examples.trl_gkd``: TRL's GKDTrainer, with one line more.

The completions are the text's own (``lmbda=0``), so that both ways see the same batches.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from trl.experimental.gkd import GKDConfig, GKDTrainer

from examples import common
from examples.words import tokenizer
from fused_kd.integrations.trl import use_fused_kd

PROMPT = 16  # tokens of a row that are given, not learned
BETA = 0.5


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """What GKDTrainer takes of a batch whose text is already tokens."""
    ids = torch.tensor([row["input_ids"] for row in rows])
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    prompts = ids[:, :PROMPT]
    masks = {
        "attention_mask": torch.ones_like(ids),
        "prompt_attention_mask": torch.ones_like(prompts),
    }
    return {"input_ids": ids, "labels": labels, "prompts": prompts, **masks}


def train(teacher: nn.Module, ids: list[Tensor], change: Any, student: nn.Module) -> list[float]:
    """The trainer's own logged losses; `change` is applied to it before it trains."""
    arguments = GKDConfig(
        output_dir="out/examples/trl", per_device_train_batch_size=common.ROWS, max_steps=len(ids),
        lmbda=0.0, beta=BETA, logging_steps=1, bf16=False, gradient_checkpointing=False,
        report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True, **common.PLAIN,
    )  # fmt: skip
    trainer = GKDTrainer(
        model=student, teacher_model=teacher, args=arguments, data_collator=collate,
        train_dataset=Dataset.from_dict({"input_ids": torch.cat(ids).tolist()}),
        processing_class=tokenizer(teacher.config),
    )  # fmt: skip
    change(trainer)
    return common.logged(trainer)


def main() -> None:
    """Compare TRL's own loss with ours of logits and of heads."""
    options = common.arguments(__doc__)
    source = common.text()
    student, teacher = common.student_and_teacher(source)
    run = partial(train, teacher, common.batches(source, options.steps))
    own = partial(run, lambda trainer: None)
    for keywords in ({"inplace": True}, {"heads": True}):
        name = f"GKDTrainer, {', '.join(f'{k}={v!r}' for k, v in keywords.items())}"
        common.compare(name, "trl", own, partial(run, partial(use_fused_kd, **keywords)), student)


if __name__ == "__main__":
    main()
