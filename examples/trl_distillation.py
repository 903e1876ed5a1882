"""Distil with TRL's DistillationTrainer, one line more: ``python examples/trl_distillation.py``."""

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DistillationConfig, DistillationTrainer

from fused_kd.integrations.trl import use_fused_kd

WORDS = ["<eos>", *(f"w{i}" for i in range(999))]


def model(layers: int) -> LlamaForCausalLM:
    """Return a tiny model; yours is AutoModelForCausalLM.from_pretrained(...)."""
    sizes = {"vocab_size": len(WORDS), "hidden_size": 64, "intermediate_size": 128}
    config = LlamaConfig(
        **sizes, num_hidden_layers=layers, num_attention_heads=4, eos_token_id=0, pad_token_id=0
    )
    return LlamaForCausalLM(config)


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of words; yours is AutoTokenizer.from_pretrained(...)."""
    words = models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<eos>")
    splits_at_spaces = Tokenizer(words)
    splits_at_spaces.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=splits_at_spaces, eos_token="<eos>", pad_token="<eos>"
    )


def main() -> None:
    """Train a student of one layer, on its own completions, against a teacher of two."""
    torch.manual_seed(0)
    options = {"max_steps": 8, "learning_rate": 1e-2, "logging_steps": 1, "use_cpu": True}
    quiet = {"report_to": "none", "save_strategy": "no", "output_dir": "out/examples"}
    trainer = DistillationTrainer(
        model=model(layers=1),
        teacher_model=model(layers=2),
        args=DistillationConfig(**options, **quiet, max_completion_length=16, bf16=False),
        train_dataset=Dataset.from_dict({"prompt": [f"w{i} w{i + 1}" for i in range(8)]}),
        processing_class=tokenizer(),
    )
    use_fused_kd(trainer)  # the line that changes
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
