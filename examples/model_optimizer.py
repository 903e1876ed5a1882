"""``python -m examples.model_optimizer``: modelopt's kd_loss mode, with another criterion."""

from __future__ import annotations

from functools import partial

import modelopt.torch.distill as mtd
import torch
from torch import Tensor, nn

from examples import common
from fused_kd.integrations.model_optimizer import LogitsDistillationLoss

TEMPERATURE = 2.0
HEADS = ("lm_head", "lm_head")  # of student and teacher: what their logits come from


def train(
    teacher: nn.Module, ids: list[Tensor], loss: nn.Module, student: nn.Module
) -> list[float]:
    """A loop as in modelopt's documentation; the student is changed in place.

    "batchmean" is a sum over each sequence's tokens: rate and logged losses are those of a token.
    """
    config = {"teacher_model": teacher, "criterion": {HEADS: loss}}
    model = mtd.convert(student, mode=[("kd_loss", config)])
    optimizer = torch.optim.SGD(student.parameters(), lr=common.RATE / common.LENGTH)
    losses = []
    for batch in ids:
        model.train()
        model(input_ids=batch)
        step = model.compute_kd_loss()
        step.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(step.item() / common.LENGTH)
    mtd.export(model)
    return losses


def main() -> None:
    """modelopt's LogitsDistillationLoss against ours."""
    options = common.arguments(__doc__)
    source = common.text()
    student, teacher = common.student_and_teacher(source)
    run = partial(train, teacher, common.batches(source, options.steps))
    own = partial(run, mtd.LogitsDistillationLoss(TEMPERATURE, reduction="batchmean"))
    for inplace in (False, True):
        loss = LogitsDistillationLoss(TEMPERATURE, reduction="batchmean", inplace=inplace)
        name = f"LogitsDistillationLoss, inplace={inplace}"
        common.compare(name, "modelopt", own, partial(run, loss), student)


if __name__ == "__main__":
    main()
