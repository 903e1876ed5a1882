"""Distil with Lightning: ``python examples/lightning_module.py``."""

from functools import partial

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from fused_kd import KDLoss
from fused_kd.integrations.lightning import KDModule

VOCABULARY = 1000


def model(layers: int) -> LlamaForCausalLM:
    """Return a tiny model; yours is AutoModelForCausalLM.from_pretrained(...)."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128}
    config = LlamaConfig(**sizes, num_hidden_layers=layers, num_attention_heads=4)
    return LlamaForCausalLM(config)


class Losses(pl.Callback):
    """A callback that keeps the loss of every update, as a logger would."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        self.values.append(trainer.callback_metrics["train_loss"].item())


def main() -> None:
    """Train a student of one layer on the hidden states and the lm_head of a teacher of two."""
    torch.manual_seed(0)
    module = KDModule(
        model(layers=1),
        model(layers=2),
        KDLoss(temperature=2.0),
        heads=True,  # False: the loss takes the logits of both models
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
    )
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(VOCABULARY, (8, 32))]
    losses = Losses()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", max_epochs=8, callbacks=[losses], **quiet)
    trainer.fit(module, DataLoader(rows, batch_size=8))
    print(f"loss {losses.values[0]:.4f} -> {losses.values[-1]:.4f}")


if __name__ == "__main__":
    main()
