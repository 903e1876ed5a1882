"""Distil from a teacher's top k on disk: ``python examples/cached_teacher.py``.

Run it again after an interruption: the cache goes on where it stopped.
"""

import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from fused_kd import KDLoss
from fused_kd.integrations.loop import shifted
from fused_kd.teachers import TopKDataset, TopKWriter, collate, measure

VOCABULARY, K, TEMPERATURE = 1000, 64, 2.0
FOLDER = "out/examples/cache"


def model(layers: int) -> LlamaForCausalLM:
    """Return a tiny model; yours is AutoModelForCausalLM.from_pretrained(...)."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128}
    config = LlamaConfig(**sizes, num_hidden_layers=layers, num_attention_heads=4)
    return LlamaForCausalLM(config)


def write(teacher: LlamaForCausalLM, texts: list[dict[str, torch.Tensor]]) -> None:
    """Write the cache; pass your tokenizer too, so that readers can check theirs."""
    settings = {"vocabulary": VOCABULARY, "k": K, "temperature": TEMPERATURE}
    with TopKWriter(FOLDER, **settings) as writer, torch.no_grad():
        for batch in DataLoader(list(writer.missing(texts)), batch_size=4, collate_fn=collate):
            logits = teacher(batch["input_ids"]).logits
            writer.write(batch["input_ids"], measure(logits, K, TEMPERATURE))
        print(f"{len(writer)} sequences, {writer.rows} tokens")


def main() -> None:
    """Train a student of one layer on the cache of a teacher of two."""
    torch.manual_seed(0)
    teacher, student = model(layers=2).eval(), model(layers=1).train()
    texts = [{"input_ids": ids, "labels": ids} for ids in torch.randint(VOCABULARY, (8, 32))]
    write(teacher, texts)
    loader = DataLoader(TopKDataset(FOLDER, texts), batch_size=4, shuffle=True, collate_fn=collate)
    loss_fn = KDLoss(temperature=TEMPERATURE, inplace=True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        for batch in loader:
            logits = student(batch["input_ids"]).logits
            loss = loss_fn(logits, batch["teacher"], shifted(batch["labels"]))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
