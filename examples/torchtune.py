"""``python -m examples.torchtune``: the step of torchtune's distillation recipe, one loss replaced.

The models are torchtune's own, with the weights of the other examples; what the recipe's
configuration would name in ``kd_loss`` is torchtune's class or ours.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchtune.models.convert_weights import hf_to_tune
from torchtune.models.llama2 import llama2
from torchtune.modules import loss as torchtunes_own
from torchtune.modules.loss import CEWithChunkedOutputLoss

from examples import common
from fused_kd.integrations import torchtune as ours_by_name
from fused_kd.integrations.loop import shifted

KD_RATIO = 0.5


def converted(model: Any) -> Any:
    """A Llama of transformers as torchtune's, its head no longer tied to the embeddings."""
    config = model.config
    heads = {"num_heads": config.num_attention_heads, "num_kv_heads": config.num_key_value_heads}
    decoder = llama2(
        vocab_size=config.vocab_size, num_layers=config.num_hidden_layers, **heads,
        embed_dim=config.hidden_size, intermediate_dim=config.intermediate_size,
        max_seq_len=common.LENGTH, norm_eps=config.rms_norm_eps,
    )  # fmt: skip
    decoder.load_state_dict(hf_to_tune(model.state_dict(), **heads, dim=config.hidden_size))
    return decoder


def train(kd_loss: Any, teacher: Any, batches: list[Tensor], student: Any) -> list[float]:
    """The loss of every step; with chunks or without, as the recipe does."""
    chunks = getattr(kd_loss, "num_output_chunks", 0)
    class_loss: Any = CEWithChunkedOutputLoss(chunks) if chunks else nn.CrossEntropyLoss()
    for model in (student, teacher):
        model.set_num_output_chunks(chunks)
    optimizer = torch.optim.SGD(student.parameters(), lr=common.RATE)
    losses = []
    for ids in batches:
        logits, labels = student(ids), shifted(ids)
        with torch.no_grad():
            taught = teacher(ids)
        if not chunks:
            logits, taught, labels = logits.flatten(0, 1), taught.flatten(0, 1), labels.flatten()
        kd = kd_loss(logits, taught, labels)
        loss = (1 - KD_RATIO) * class_loss(logits, labels) + KD_RATIO * kd
        del logits, taught
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    """torchtune's classes against ours."""
    options = common.arguments(__doc__)
    source = common.text()
    student, teacher = map(converted, common.student_and_teacher(source))
    batches = common.batches(source, options.steps)
    for name in ("ForwardKLLoss", "ForwardKLWithChunkedOutputLoss"):
        own, ours = (
            partial(train, getattr(module, name)(), teacher.eval(), batches)
            for module in (torchtunes_own, ours_by_name)
        )
        common.compare(f"recipe, {name}", "torchtune", own, ours, student)


if __name__ == "__main__":
    main()
