"""``python -m examples.accelerate_loop``: a plain loop with Accelerate.

Its own way: the student is prepared, the loss is torch's. Ours: a StudentTeacherLoss is prepared,
which returns the loss, with the exact mean over two micro-batches.
"""

from __future__ import annotations

from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from examples import common
from fused_kd import KDLoss
from fused_kd.integrations.loop import divide_gradients, global_num_items, shifted
from fused_kd.integrations.student_teacher import StudentTeacherLoss
from fused_kd.testing import eager_kd_loss

TEMPERATURE, MICRO_BATCHES = 2.0, 2


def loader(ids: list[Tensor]) -> DataLoader[dict[str, Tensor]]:
    """Every row of the text is a micro-batch."""
    rows = [row for batch in ids for row in batch.split(common.ROWS // MICRO_BATCHES)]
    return DataLoader([{"input_ids": x, "labels": x} for x in rows], batch_size=None)


def train_own(ids: list[Tensor], teacher: nn.Module, student: nn.Module) -> list[float]:
    """A mean of the micro-batches' means: the same, as long as they keep as many tokens."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=MICRO_BATCHES)
    optimizer = torch.optim.SGD(student.parameters(), lr=common.RATE)
    model, optimizer, data = accelerator.prepare(student.train(), optimizer, loader(ids))
    losses = []
    for batch in data:
        with accelerator.accumulate(model):
            logits = model(batch["input_ids"]).logits
            with torch.no_grad():
                taught = teacher(batch["input_ids"]).logits
            labels = shifted(batch["labels"])
            loss = eager_kd_loss(logits, taught, labels, temperature=TEMPERATURE)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return per_update(losses)


def train_ours(
    ids: list[Tensor], teacher: nn.Module, loss: KDLoss, heads: bool, student: nn.Module
) -> list[float]:
    """Sums, divided by the number of kept tokens where the gradients are complete."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=MICRO_BATCHES)
    distilled = StudentTeacherLoss(student.train(), teacher, loss, heads=heads)
    optimizer = torch.optim.SGD(student.parameters(), lr=common.RATE)
    model, optimizer, data = accelerator.prepare(distilled, optimizer, loader(ids))
    losses, seen = [], []
    for batch in data:
        with accelerator.accumulate(model):
            total = model(**batch, num_items=1)
            accelerator.backward(total * accelerator.gradient_accumulation_steps)
            seen.append(shifted(batch["labels"]))
            if accelerator.sync_gradients:
                divide_gradients(model.parameters(), global_num_items(*seen))
                seen.clear()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(total.item() / (batch["labels"].numel() - len(batch["labels"])))
    return per_update(losses)


def per_update(losses: list[float]) -> list[float]:
    """The mean of each update's micro-batches."""
    starts = range(0, len(losses), MICRO_BATCHES)
    return [sum(losses[i : i + MICRO_BATCHES]) / MICRO_BATCHES for i in starts]


def main() -> None:
    """Compare the eager loss with ours of logits and of heads."""
    options = common.arguments(__doc__)
    source = common.text()
    student, teacher = common.student_and_teacher(source)
    ids = common.batches(source, options.steps)
    own = partial(train_own, ids, teacher)
    for heads in (False, True):
        loss = KDLoss(temperature=TEMPERATURE, inplace=not heads)
        name = f"Accelerate, heads={heads}"
        ours = partial(train_ours, ids, teacher, loss, heads)
        common.compare(name, "accelerate", own, ours, student)


if __name__ == "__main__":
    main()
