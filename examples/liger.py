"""``python -m examples.liger``: a plain loop with Liger's chunked loss, and ours by its name.

Only the import differs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss as LigersOwn
from torch import Tensor

from examples import common
from fused_kd.integrations.liger import LigerFusedLinearJSDLoss
from fused_kd.integrations.loop import shifted

OPTIONS: dict[str, Any] = {"beta": 0.5, "temperature": 2.0, "chunk_size": 64}


def train(loss_fn: Any, teacher: Any, batches: list[Tensor], student: Any) -> list[float]:
    """The loss of every step."""
    optimizer = torch.optim.SGD(student.parameters(), lr=common.RATE)
    losses = []
    for ids in batches:
        with torch.no_grad():
            taught = teacher.model(input_ids=ids).last_hidden_state
        hidden = student.model(input_ids=ids).last_hidden_state
        loss = loss_fn(
            hidden.flatten(0, 1),
            student.lm_head.weight,
            taught.flatten(0, 1),
            teacher.lm_head.weight,
            shifted(ids).flatten(),
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    """Liger's class against ours."""
    options = common.arguments(__doc__)
    source = common.text()
    student, teacher = common.student_and_teacher(source)
    batches = common.batches(source, options.steps)
    own, ours = (
        partial(train, loss(**OPTIONS), teacher, batches)
        for loss in (LigersOwn, LigerFusedLinearJSDLoss)
    )
    common.compare("LigerFusedLinearJSDLoss", "liger_kernel", own, ours, student)


if __name__ == "__main__":
    main()
