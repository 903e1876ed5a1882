"""Distil with TRL's GKDTrainer, one line more: ``python examples/trl_gkd.py``."""

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.experimental.gkd import GKDConfig, GKDTrainer

from fused_kd.integrations.trl import use_fused_kd

WORDS = ["<eos>", "user", "assistant", *(f"w{i}" for i in range(997))]


def model(layers: int) -> LlamaForCausalLM:
    """Return a tiny model; yours is AutoModelForCausalLM.from_pretrained(...)."""
    sizes = {"vocab_size": len(WORDS), "hidden_size": 64, "intermediate_size": 128}
    config = LlamaConfig(**sizes, num_hidden_layers=layers, num_attention_heads=4)
    return LlamaForCausalLM(config)


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of words; yours is AutoTokenizer.from_pretrained(...)."""
    words = models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<eos>")
    splits_at_spaces = Tokenizer(words)
    splits_at_spaces.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    result = PreTrainedTokenizerFast(
        tokenizer_object=splits_at_spaces, eos_token="<eos>", pad_token="<eos>"
    )
    result.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    return result


def main() -> None:
    """Train a student of one layer on the hidden states and the lm_head of a teacher of two."""
    torch.manual_seed(0)
    question = {"role": "user", "content": "w1 w2 w3"}
    answers = [{"role": "assistant", "content": f"w{i} w{i + 1} w{i + 2}"} for i in range(4, 12)]
    options = {"max_steps": 8, "learning_rate": 1e-2, "logging_steps": 1, "use_cpu": True}
    quiet = {"report_to": "none", "save_strategy": "no", "output_dir": "out/examples"}
    trainer = GKDTrainer(
        model=model(layers=1),
        teacher_model=model(layers=2),
        args=GKDConfig(**options, **quiet, lmbda=0.0, bf16=False),
        train_dataset=Dataset.from_dict({"messages": [[question, answer] for answer in answers]}),
        processing_class=tokenizer(),
    )
    use_fused_kd(trainer, heads=True)  # the line that changes
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
