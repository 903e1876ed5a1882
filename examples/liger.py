"""Train with Liger's chunked loss from another import line: ``python examples/liger.py``."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fused_kd.integrations.liger import LigerFusedLinearJSDLoss  # was: liger_kernel.chunked_loss
from fused_kd.integrations.loop import shifted

VOCABULARY = 1000


def model(layers: int) -> LlamaForCausalLM:
    """Return a tiny model; yours is AutoModelForCausalLM.from_pretrained(...)."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128}
    config = LlamaConfig(**sizes, num_hidden_layers=layers, num_attention_heads=4)
    return LlamaForCausalLM(config)


def main() -> None:
    """Train a student of one layer on the hidden states and the lm_head of a teacher of two."""
    torch.manual_seed(0)
    student, teacher = model(layers=1).train(), model(layers=2).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    loss_fn = LigerFusedLinearJSDLoss(beta=0.5, temperature=2.0)
    ids = torch.randint(VOCABULARY, (8, 32))
    losses = []
    for _ in range(8):
        with torch.no_grad():
            teacher_hidden = teacher.model(ids).last_hidden_state
        loss = loss_fn(
            student.model(ids).last_hidden_state,
            student.lm_head.weight,
            teacher_hidden,
            teacher.lm_head.weight,
            shifted(ids),
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
