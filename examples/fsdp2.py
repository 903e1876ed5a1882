"""``torchrun --nproc-per-node 2 -m examples.fsdp2``: FSDP2, the loss of heads in the forward.

The loop is that of examples/ddp.py. Every block is sharded for itself; embeddings, last norms and
lm_heads belong to the outermost module, whose forward gives the loss: they are gathered once a
step, before it, and kept until the backward is through.
"""

from __future__ import annotations

from functools import partial

from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from examples.ddp import compare
from examples.ranks import run_rank
from fused_kd.integrations.student_teacher import StudentTeacherLoss


def shard(model: StudentTeacherLoss) -> nn.Module:
    """In place."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in [*model.student.model.layers, *model.teacher.model.layers]:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


if __name__ == "__main__":
    run_rank(partial(compare, "FSDP2", shard))  # as in examples/ddp.py
