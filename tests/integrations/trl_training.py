"""A tokenizer, conversations and settings for trainers of TRL; nothing is downloaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import tiny
import torch
from needs import need
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
need("trl")
transformers = need("transformers")
import tokenizers  # noqa: E402
from datasets import Dataset  # noqa: E402

V = tiny.VOCABULARY
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>"]
WORDS = [f"w{i}" for i in range(V - len(SPECIAL))]
BETAS = [0.0, 0.1, 0.5, 1.0]
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} "
    "{% if message['role'] == 'assistant' %}<eos> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def build(kind: str, hidden: int, seed: int, **changes: Any) -> nn.Module:
    """A small model of transformers; the same seed, the same weights."""
    names = f"{kind}ForCausalLM", f"{kind}Config"
    model, config = (getattr(transformers, name) for name in names)
    return tiny.build(model, config, seed, hidden_size=hidden, **changes)


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Splits at spaces."""
    entries = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(entries, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        padding_side="left",
    )  # fmt: skip
    made.chat_template = TEMPLATE
    return made


def words(count: int, first: int) -> str:
    return " ".join(WORDS[(first + 7 * i) % len(WORDS)] for i in range(count))


def conversations(count: int = 16) -> Dataset:
    """Prompts and answers of different lengths."""
    rows = [
        [
            {"role": "user", "content": words(1 + i % 4, i)},
            {"role": "assistant", "content": words(1 + (5 * i) % 11, 3 * i)},
        ]
        for i in range(count)
    ]
    return Dataset.from_dict({"messages": rows})


def prompts(count: int = 16) -> Dataset:
    """Of different lengths; the student goes on."""
    return Dataset.from_dict({"prompt": [words(1 + i % 5, i) for i in range(count)]})


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """SGD: Adam would divide rounding errors by small gradients."""
    usual = {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "max_steps": 3,
        "learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant", "bf16": False,
        "use_cpu": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1,
        "disable_tqdm": True, "gradient_checkpointing": False, "seed": 1,
    }  # fmt: skip
    return {**usual, **changes}


Run = tuple[list[float], list[Tensor]]


def trained(trainer: Any) -> Run:
    """The loss of every step, and the weights after the last."""
    before = [p.detach().clone() for p in trainer.model.parameters()]
    torch.manual_seed(0)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    weights = [p.detach().clone() for p in trainer.model.parameters()]
    changes = [(a - b).abs().max().item() for a, b in zip(before, weights, strict=True)]
    assert len(losses) == trainer.args.max_steps
    assert max(changes) > 1e-3  # it did learn
    return losses, weights


def same(ours: Run, theirs: Run) -> None:
    """Losses and weights, to the rounding of float32."""
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=2e-6)
