"""N-30: evaluation returns the number of training on the same batch, in each framework."""

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
need("lightning")
from trl.experimental.gkd import GKDConfig, GKDTrainer  # noqa: E402
from trl_training import conversations, models, settings, tokenizer  # noqa: E402

from fused_kd import KDLoss  # noqa: E402
from fused_kd.integrations.lightning import KDModule  # noqa: E402
from fused_kd.integrations.transformers import KDTrainer  # noqa: E402
from fused_kd.integrations.trl import use_fused_kd  # noqa: E402

LOSS = KDLoss(temperature=2.0)
ONE_BATCH = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "max_steps": 1}
STILL = {"learning_rate": 0.0, **ONE_BATCH}


def _of_trainer(heads: bool, folder: Path) -> tuple[float, float]:
    student, teacher, rows = tiny.llama(0), tiny.llama(1), tiny.ragged(4)
    arguments = transformers.TrainingArguments(**settings(folder, **STILL))
    data = {"train_dataset": rows, "eval_dataset": rows, "data_collator": tiny.padded}
    return _numbers(KDTrainer(student, arguments, teacher=teacher, loss=LOSS, heads=heads, **data))


def _of_gkd(heads: bool, folder: Path) -> tuple[float, float]:
    arguments = GKDConfig(**settings(folder, **STILL, lmbda=0.0, max_length=32))
    data = {"train_dataset": conversations(4), "eval_dataset": conversations(4)}
    trainer = GKDTrainer(*models(), args=arguments, **data, processing_class=tokenizer())
    return _numbers(use_fused_kd(trainer, heads=heads))


def _numbers(trainer: Any) -> tuple[float, float]:
    trainer.train()
    (trained,) = tiny.logged(trainer)
    return trained, trainer.evaluate()["eval_loss"]


def _of_lightning(heads: bool, folder: Path) -> tuple[float, float]:
    optimizer = partial(torch.optim.SGD, lr=0.0)
    module = KDModule(tiny.llama(0), tiny.llama(1), LOSS, optimizer=optimizer, heads=heads)
    loader = DataLoader(tiny.ragged(4), batch_size=4, collate_fn=tiny.padded)
    trainer = tiny.lightning_trainer(folder)
    trainer.fit(module, loader, loader)
    found = trainer.callback_metrics
    return found["train_loss"].item(), found["val_loss"].item()


WAYS = {"Trainer": _of_trainer, "Lightning": _of_lightning, "GKDTrainer": _of_gkd}


@pytest.mark.filterwarnings("ignore::UserWarning")  # few workers, few batches
@pytest.mark.parametrize("heads", tiny.BOTH)
@pytest.mark.parametrize("way", WAYS)
def test_the_same_number_in_evaluation_N_30(way: str, heads: bool, tmp_path: Path) -> None:
    trained, evaluated = WAYS[way](heads, tmp_path)
    assert trained > 0.01
    assert evaluated == pytest.approx(trained, rel=1e-5)
