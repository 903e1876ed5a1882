"""Distil in a loop with Accelerate: ``python examples/accelerate_loop.py``."""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from fused_kd import KDLoss
from fused_kd.integrations.loop import divide_gradients, global_num_items, shifted
from fused_kd.integrations.student_teacher import StudentTeacherLoss

VOCABULARY = 1000


def model(layers: int) -> LlamaForCausalLM:
    """Return a tiny model; yours is AutoModelForCausalLM.from_pretrained(...)."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128}
    config = LlamaConfig(**sizes, num_hidden_layers=layers, num_attention_heads=4)
    return LlamaForCausalLM(config)


def main() -> None:
    """Train a student; an update is that of the mean over the tokens of two micro-batches."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    both = StudentTeacherLoss(model(1), model(2), KDLoss(temperature=2.0), heads=True).train()
    optimizer = torch.optim.AdamW(both.student.parameters(), lr=1e-2)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(VOCABULARY, (8, 32))]
    both, optimizer, loader = accelerator.prepare(both, optimizer, DataLoader(rows, batch_size=4))
    losses, seen = [], []
    for _ in range(8):
        for batch in loader:
            with accelerator.accumulate(both):
                total = both(**batch, num_items=1)  # a sum: divided when the update is complete
                accelerator.backward(total * accelerator.gradient_accumulation_steps)
                seen.append(shifted(batch["labels"]))
                if accelerator.sync_gradients:
                    divide_gradients(both.parameters(), global_num_items(*seen))
                    seen.clear()
                optimizer.step()
                optimizer.zero_grad()
        losses.append(total.item() / (shifted(batch["labels"]) != -100).sum().item())
    accelerator.print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
