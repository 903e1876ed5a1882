"""Distil with DistributedDataParallel: ``torchrun --nproc-per-node 2 examples/ddp.py``."""

import os
import sys

import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from fused_kd import KDLoss
from fused_kd.integrations.loop import global_num_items, shifted
from fused_kd.integrations.student_teacher import StudentTeacherLoss

VOCABULARY = 1000


def model(layers: int) -> LlamaForCausalLM:
    """Return a tiny model; yours is AutoModelForCausalLM.from_pretrained(...)."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128}
    config = LlamaConfig(**sizes, num_hidden_layers=layers, num_attention_heads=4)
    return LlamaForCausalLM(config)


def train(rank: int) -> list[float]:
    """Train on this rank; return its losses. Gradients are of the mean over all ranks' tokens."""
    torch.manual_seed(0)
    both = StudentTeacherLoss(model(1), model(2), KDLoss(temperature=2.0), heads=True).train()
    wrapped = DistributedDataParallel(both)
    optimizer = torch.optim.AdamW(both.student.parameters(), lr=1e-2)
    torch.manual_seed(rank)  # the ranks have other rows, and keep other numbers of tokens
    ids = torch.randint(VOCABULARY, (4, 32))
    labels = ids.where(torch.arange(32) >= 8 * rank, -100)
    losses = []
    for _ in range(8):
        num_items = global_num_items(shifted(labels))
        loss = wrapped(input_ids=ids, labels=labels, num_items=num_items)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses  # the wrapped model is released before the process group is


if __name__ == "__main__":
    dist.init_process_group("gloo")  # "nccl" on GPUs
    losses = train(dist.get_rank())
    if dist.get_rank() == 0:
        print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads can abort an interpreter that finalizes
