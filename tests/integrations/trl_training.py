"""A tokenizer, conversations, trainers and trainings for TRL; nothing is downloaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers
from needs import need
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
need("trl")
import tokenizers  # noqa: E402
from datasets import Dataset  # noqa: E402
from trl import DistillationConfig, DistillationTrainer  # noqa: E402
from trl.experimental.gkd import GKDConfig, GKDTrainer  # noqa: E402

V = tiny.VOCABULARY
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>"]
WORDS = [f"w{i}" for i in range(V - len(SPECIAL))]
BETAS = [0.0, 0.1, 0.5, 1.0]
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} "
    "{% if message['role'] == 'assistant' %}<eos> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def models(kind: str = "Llama", **changes: Any) -> tuple[nn.Module, nn.Module]:
    """Return a student and a wider teacher, always with the same weights."""
    return tiny.of(kind, 1, **changes), tiny.of(kind, 2, hidden_size=24, **changes)


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer that splits at spaces."""
    entries = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(entries, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    options = {"padding_side": "left", "chat_template": TEMPLATE, **special}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, **options)


def words(count: int, first: int) -> str:
    return " ".join(WORDS[(first + 7 * i) % len(WORDS)] for i in range(count))


def conversations(count: int = 16) -> Dataset:
    """Return a data set of prompts and answers of different lengths."""

    pairs = [
        [("user", words(1 + i % 4, i)), ("assistant", words(1 + (5 * i) % 11, 3 * i))]
        for i in range(count)
    ]
    messages = [[{"role": role, "content": text} for role, text in pair] for pair in pairs]
    return Dataset.from_dict({"messages": messages})


def prompts(count: int = 16) -> Dataset:
    """Return a data set of prompts of different lengths, which the student completes."""
    return Dataset.from_dict({"prompt": [words(1 + i % 5, i) for i in range(count)]})


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return keywords for the configuration of a trainer of TRL, in float32 unless changed."""
    usual = {"per_device_train_batch_size": 2, "bf16": False, "gradient_checkpointing": False}
    return tiny.settings(folder, **{**usual, **changes})


OF_GKD = {"lmbda": 0.0, "max_length": 32, "max_new_tokens": 4}
#: Trainer, configuration, data, usual settings.
KINDS: dict[str, tuple[Any, ...]] = {
    "gkd": (GKDTrainer, GKDConfig, conversations, OF_GKD),
    "distillation": (
        DistillationTrainer,
        DistillationConfig,
        prompts,
        {"max_completion_length": 6},
    ),
}


def trainer_of(
    name: str, folder: Path, family: str = "Llama", changes: Any = None, **more: Any
) -> Any:
    """Return a trainer named in KINDS, or of its subclass `kind`, always with the same data.

    family, changes: of the models, whose weights are always the same; more: the settings.
    """
    kind, config, rows, usual = KINDS[name]
    kind = more.pop("kind", kind)
    arguments = config(**settings(folder, **{**usual, **more}))
    data = {"train_dataset": rows(), "eval_dataset": rows(4), "processing_class": tokenizer()}
    return kind(*models(family, **(changes or {})), args=arguments, **data)


Run = tuple[list[float], list[Tensor], list[float]]


def trained(trainer: Any) -> Run:
    """Train to the end; return the losses, the final weights and the logged entropies.

    An assertion fails if a step logged no loss, or if the weights did not change.
    """
    before = [p.detach().clone() for p in trainer.model.parameters()]
    torch.manual_seed(0)
    trainer.train()
    losses = tiny.logged(trainer)
    weights = [p.detach().clone() for p in trainer.model.parameters()]
    changes = [(a - b).abs().max().item() for a, b in zip(before, weights, strict=True)]
    assert len(losses) == trainer.args.max_steps
    assert max(changes) > 1e-3  # the weights moved
    return losses, weights, tiny.logged(trainer, "entropy")


def same(ours: Run, theirs: Run) -> None:
    """Assert that losses, weights and entropies of two runs are equal up to float32 rounding."""
    for a, b, rtol in zip(ours, theirs, (1e-5, 1e-4, 1e-4), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=2e-6)
