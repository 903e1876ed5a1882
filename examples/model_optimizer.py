"""Distil with NVIDIA Model Optimizer, another criterion: ``python examples/model_optimizer.py``."""

import modelopt.torch.distill as mtd
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fused_kd.integrations.model_optimizer import LogitsDistillationLoss  # was: mtd

VOCABULARY = 1000


def model(layers: int) -> LlamaForCausalLM:
    """Return a tiny model; yours is AutoModelForCausalLM.from_pretrained(...)."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128}
    config = LlamaConfig(**sizes, num_hidden_layers=layers, num_attention_heads=4)
    return LlamaForCausalLM(config)


def main() -> None:
    """Train a student of one layer on the logits of a teacher of two."""
    torch.manual_seed(0)
    criterion = LogitsDistillationLoss(temperature=2.0, reduction="batchmean", inplace=True)
    layers = ("lm_head", "lm_head")  # of student and teacher: their outputs are compared
    config = {"teacher_model": model(layers=2), "criterion": {layers: criterion}}
    student = mtd.convert(model(layers=1), mode=[("kd_loss", config)])
    student.train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    ids = torch.randint(VOCABULARY, (8, 32))
    losses = []
    for _ in range(8):
        student(input_ids=ids)  # runs the teacher too
        loss = student.compute_kd_loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    mtd.export(student)
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
