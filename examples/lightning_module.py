"""``python -m examples.lightning_module``: a LightningModule that distils.

Its own way: the module that one writes with torch's losses. Ours: KDModule, of logits and of heads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from examples import common
from fused_kd import KDLoss
from fused_kd.integrations.lightning import KDModule
from fused_kd.integrations.loop import shifted
from fused_kd.testing import eager_kd_loss

TEMPERATURE = 2.0
OPTIMIZER = partial(torch.optim.SGD, lr=common.RATE)


class EagerModule(pl.LightningModule):  # type: ignore[misc]
    """Both models' logits, softmaxes, kl_div and cross_entropy."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student, self.teacher = student.train(), teacher

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        labels = shifted(batch.pop("labels"))
        logits = self.student(**batch).logits
        with torch.no_grad():
            taught = self.teacher(**batch).logits
        loss = eager_kd_loss(logits, taught, labels, temperature=TEMPERATURE)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return OPTIMIZER(self.student.parameters())


class Losses(pl.Callback):  # type: ignore[misc]
    """Of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.values.append(trainer.callback_metrics["train_loss"].item())


def train(
    make: Callable[[nn.Module], pl.LightningModule], ids: list[Tensor], student: nn.Module
) -> list[float]:
    """The Trainer's own logged losses."""
    losses = Losses()
    data = DataLoader([{"input_ids": x, "labels": x} for x in ids], batch_size=None)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[losses], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(make(student), data)
    return losses.values


def main() -> None:
    """Compare the eager loss with ours of logits and of heads."""
    options = common.arguments(__doc__)
    source = common.text()
    student, teacher = common.student_and_teacher(source)
    ids = common.batches(source, options.steps)
    own = partial(train, lambda student: EagerModule(student, teacher), ids)
    for heads in (False, True):
        loss = KDLoss(temperature=TEMPERATURE, inplace=not heads)
        make = partial(KDModule, teacher=teacher, loss=loss, optimizer=OPTIMIZER, heads=heads)
        name = f"Lightning, heads={heads}"
        common.compare(name, "lightning", own, partial(train, make, ids), student)


if __name__ == "__main__":
    main()
