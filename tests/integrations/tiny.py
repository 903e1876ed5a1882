"""Tiny models of transformers, ragged batches for them, and trainers of every framework.

Without transformers and the accelerate of its Trainer, modules that import this one are skipped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from needs import need
from torch import Tensor, nn

transformers = need("transformers")
need("accelerate")

VOCABULARY = 97
LAYERS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
ATTENTION = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
IDS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
#: Adam would divide rounding errors by small gradients.
SGD: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}
QUIET = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
#: An update as one batch, and as four micro-batches.
CUTS: tuple[dict[str, Any], ...] = (
    {"per_device_train_batch_size": 4},
    {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
)
#: Both sides as logits, and as heads.
BOTH = (False, True)


def llama(seed: int, layers: int = 1, hidden: int = 16, **changes: Any) -> nn.Module:
    """Return a LlamaForCausalLM; the same seed gives the same weights."""
    return of("Llama", seed, num_hidden_layers=layers, hidden_size=hidden, **changes)


def of(kind: str, seed: int, **changes: Any) -> nn.Module:
    """Return a small causal language model of a family of transformers, such as "Llama"."""
    names = f"{kind}ForCausalLM", f"{kind}Config"
    model, config = (getattr(transformers, name) for name in names)
    return build(model, config, seed, **changes)


def build(model: Any, config: Any, seed: int, **changes: Any) -> nn.Module:
    """Return a small decoder in evaluation mode; its logits are so large that softmaxes differ.

    `seed` determines the weights, and is set as torch's global one.
    """
    sizes = {**IDS, **LAYERS, **ATTENTION, "max_position_embeddings": 64}
    torch.manual_seed(seed)
    built: nn.Module = model(config(**{**sizes, **changes})).eval()
    with torch.no_grad():
        built.get_output_embeddings().weight.normal_(std=0.5)
    return built


def ragged(count: int = 16, seed: int = 0) -> list[dict[str, Tensor]]:
    """Return `count` sequences of 3 to 12 tokens, whose labels are their ids (the same tensor)."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 13, (count,), generator=generator).tolist()
    rows = [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in lengths]
    return [{"input_ids": row, "labels": row} for row in rows]


def padded(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return rows as a batch: ids and attention_mask are padded with 0, labels with -100."""
    pad = nn.utils.rnn.pad_sequence
    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": pad(ids, batch_first=True),
        "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad([row["labels"] for row in rows], batch_first=True, padding_value=-100),
    }


def split(batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Return a batch's inputs and its labels."""
    return {name: x for name, x in batch.items() if name != "labels"}, batch["labels"]


def loss_of(adapter: Any, student: nn.Module, batch: dict[str, Tensor]) -> Any:
    """Return the loss of a batch by a StudentTeacherLoss, or by a DistillationLoss of `student`.

    A StudentTeacherLoss uses its own student.
    """
    if isinstance(adapter, nn.Module):
        return adapter(**batch)
    inputs, labels = split(batch)
    return adapter(student(**inputs), labels)


def largest_difference(first: nn.Module, second: nn.Module) -> float:
    """Return the largest absolute difference between weights of two models."""
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def assert_close(first: nn.Module, second: nn.Module) -> None:
    """Assert that all weights of two models are equal up to float32 rounding."""
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        message = f"{name}: {{}}".format
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=message)


# ------------------------------------------------------------------------------------ trainers


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return keywords for the TrainingArguments of transformers or TRL; `changes` win."""
    usual = {"output_dir": str(folder), "max_steps": 3, "logging_steps": 1, "seed": 1}
    return {**usual, "per_device_train_batch_size": 4, **SGD, **QUIET, **changes}


def logged(trainer: Any, key: str = "loss") -> list[float]:
    """Return all values that a Trainer logged under a name, in order."""
    return [line[key] for line in trainer.state.log_history if key in line]


def lightning_trainer(folder: Path, **options: Any) -> Any:
    """Return a quiet Trainer of Lightning on one CPU."""
    import lightning.pytorch as pl

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    usual = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "log_every_n_steps": 1, **quiet}
    files = {"enable_checkpointing": False, "default_root_dir": folder}
    return pl.Trainer(**{**usual, **files, **options})


def plain_loop(model: Any, batches: list[dict[str, Tensor]]) -> list[float]:
    """Train a StudentTeacherLoss by plain SGD, one update for each batch; return its losses."""
    optimizer = torch.optim.SGD(model.student.parameters(), lr=SGD["learning_rate"])
    losses = []
    for batch in batches:
        loss = model(**batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
