"""N-30: evaluation gives the number that training gives on the same batch, in each framework."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from needs import need
from torch.utils.data import DataLoader

transformers = need("transformers")
need("accelerate")
need("trl")
pl = need("lightning").pytorch
from trl_training import build, conversations, settings, tokenizer  # noqa: E402

from fused_kd import KDLoss  # noqa: E402
from fused_kd.integrations.lightning import KDModule  # noqa: E402
from fused_kd.integrations.transformers import KDTrainer  # noqa: E402
from fused_kd.integrations.trl import use_fused_kd  # noqa: E402

LOSS = KDLoss(temperature=2.0)
STILL = {"learning_rate": 0.0, "max_steps": 1, "per_device_train_batch_size": 4,
         "per_device_eval_batch_size": 4}  # fmt: skip


def _of_trainer(heads: bool, folder: Path) -> tuple[float, float]:
    arguments = transformers.TrainingArguments(**settings(folder, **STILL))
    rows = tiny.ragged(4)
    trainer = KDTrainer(
        tiny.llama(0), arguments, teacher=tiny.llama(1), loss=LOSS, heads=heads,
        train_dataset=rows, eval_dataset=rows, data_collator=tiny.padded,
    )  # fmt: skip
    return _numbers(trainer)


def _of_gkd(heads: bool, folder: Path) -> tuple[float, float]:
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    trainer = GKDTrainer(
        model=build("Llama", 16, seed=1), teacher_model=build("Llama", 24, seed=2),
        args=GKDConfig(**settings(folder, **STILL, lmbda=0.0, max_length=32)),
        train_dataset=conversations(4), eval_dataset=conversations(4), processing_class=tokenizer(),
    )  # fmt: skip
    return _numbers(use_fused_kd(trainer, heads=heads))


def _numbers(trainer: Any) -> tuple[float, float]:
    trainer.train()
    (trained,) = (line["loss"] for line in trainer.state.log_history if "loss" in line)
    return trained, trainer.evaluate()["eval_loss"]


def _of_lightning(heads: bool, folder: Path) -> tuple[float, float]:
    optimizer = partial(torch.optim.SGD, lr=0.0)
    module = KDModule(tiny.llama(0), tiny.llama(1), LOSS, optimizer=optimizer, heads=heads)
    loader = DataLoader(tiny.ragged(4), batch_size=4, collate_fn=tiny.padded)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, loader, loader)
    found = trainer.callback_metrics
    return found["train_loss"].item(), found["val_loss"].item()


WAYS = {"Trainer": _of_trainer, "Lightning": _of_lightning, "GKDTrainer": _of_gkd}


@pytest.mark.filterwarnings("ignore::UserWarning")  # few workers, few batches
@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_the_same_number_in_evaluation_N_30(way: str, heads: bool, tmp_path: Path) -> None:
    trained, evaluated = WAYS[way](heads, tmp_path)
    assert trained > 0.01
    assert evaluated == pytest.approx(trained, rel=1e-5)
