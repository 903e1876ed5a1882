"""Distil with the Hugging Face Trainer: ``python examples/transformers_trainer.py``."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from fused_kd import KDLoss
from fused_kd.integrations.transformers import KDTrainer

VOCABULARY = 1000


def model(layers: int) -> LlamaForCausalLM:
    """Return a tiny model; yours is AutoModelForCausalLM.from_pretrained(...)."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
    )
    return LlamaForCausalLM(config)


def main() -> None:
    """Train a student of one layer on the hidden states and the lm_head of a teacher of two."""
    torch.manual_seed(0)
    student, teacher = model(layers=1), model(layers=2).eval()
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(VOCABULARY, (8, 32))]
    arguments = TrainingArguments(
        output_dir="out/examples",
        max_steps=8,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    # heads=True: the loss takes hidden states and lm_heads, and neither model computes logits
    trainer = KDTrainer(
        student,
        arguments,
        teacher=teacher,
        loss=KDLoss(temperature=2.0),
        heads=True,
        train_dataset=rows,
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
