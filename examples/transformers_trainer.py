"""``python -m examples.transformers_trainer``: the stock Trainer with a distillation loss.

Its own way: what one writes in a ``compute_loss`` of one's own, with torch. Ours: one argument.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from examples import common
from fused_kd import KDLoss
from fused_kd.integrations.loop import shifted
from fused_kd.integrations.transformers import KDTrainer
from fused_kd.testing import eager_kd_loss

TEMPERATURE = 2.0


class EagerTrainer(Trainer):
    """The usual subclass: both models' logits, softmaxes, kl_div and cross_entropy."""

    def __init__(self, *arguments: Any, teacher: nn.Module, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.teacher = teacher

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **unused: Any
    ) -> Tensor:
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        with torch.no_grad():
            taught = self.teacher(**inputs).logits
        return eager_kd_loss(logits, taught, shifted(labels), temperature=TEMPERATURE)


def train(make: partial[Trainer], ids: list[Tensor], student: nn.Module) -> list[float]:
    """The Trainer's own logged losses."""
    data = [{"input_ids": row, "labels": row} for batch in ids for row in batch]
    settings = TrainingArguments(
        output_dir="out/examples/trainer", per_device_train_batch_size=common.ROWS,
        max_steps=len(ids), logging_steps=1, save_strategy="no", report_to="none",
        disable_tqdm=True, use_cpu=True, **common.PLAIN,
    )  # fmt: skip
    trainer = make(student, settings, train_dataset=data)
    return common.logged(trainer)


def main() -> None:
    """Compare the eager loss with ours of logits and of heads."""
    options = common.arguments(__doc__)
    source = common.text()
    student, teacher = common.student_and_teacher(source)
    ids = common.batches(source, options.steps)
    own = partial(train, partial(EagerTrainer, teacher=teacher), ids)
    for heads in (False, True):
        loss = KDLoss(temperature=TEMPERATURE, inplace=not heads)
        make = partial(KDTrainer, teacher=teacher, loss=loss, heads=heads)
        name = f"Trainer, heads={heads}"
        common.compare(name, "transformers", own, partial(train, make, ids), student)


if __name__ == "__main__":
    main()
