"""``python -m examples.trl_distillation``: TRL's DistillationTrainer, with one line more.

It trains on what the student says itself. Both ways start from the same seed, and their weights
differ by rounding alone, so they say the same.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from datasets import Dataset
from torch import Tensor, nn
from trl import DistillationConfig, DistillationTrainer

from examples import common
from examples.words import tokenizer, written
from fused_kd.integrations.trl import use_fused_kd

ROWS, PROMPT, COMPLETION = 8, 32, 32  # as many tokens to learn as in the other examples


def train(teacher: nn.Module, ids: list[Tensor], change: Any, student: nn.Module) -> list[float]:
    """The trainer's own logged losses; `change` is applied to it before it trains."""
    arguments = DistillationConfig(
        output_dir="out/examples/trl", per_device_train_batch_size=ROWS, max_steps=len(ids),
        max_completion_length=COMPLETION, beta=1.0, logging_steps=1, bf16=False,
        gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True,
        use_cpu=True, **common.PLAIN,
    )  # fmt: skip
    rows = [written(row[:PROMPT]) for batch in ids for row in batch]
    trainer = DistillationTrainer(
        model=student, teacher_model=teacher, args=arguments,
        train_dataset=Dataset.from_dict({"prompt": rows}),
        processing_class=tokenizer(teacher.config),
    )  # fmt: skip
    change(trainer)
    return common.logged(trainer)


def main() -> None:
    """TRL's own loss against ours, with and without the entropy that it logs."""
    options = common.arguments(__doc__)
    source = common.text()
    student, teacher = common.student_and_teacher(source)
    run = partial(train, teacher, common.batches(source, options.steps, ROWS))
    own = partial(run, lambda trainer: None)
    for entropy in (True, False):
        ours = partial(run, partial(use_fused_kd, entropy=entropy))
        common.compare(f"DistillationTrainer, entropy={entropy}", "trl", own, ours, student)


if __name__ == "__main__":
    main()
