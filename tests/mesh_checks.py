"""What is checked on every rank of a mesh of data-parallel and tensor-parallel ranks."""

from __future__ import annotations

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from fused_kd import KDLoss, KDLossParts
from fused_kd.integrations.loop import global_num_items

ROWS, V = 12, 11


def one_count_for_both_terms() -> None:
    """Ranks of one tensor-parallel group have the same rows, which are counted once."""
    draw = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(ROWS, V, generator=draw) for _ in range(2))
    labels = torch.randint(V, (ROWS,), generator=draw)
    labels[:7] = -100
    loss = KDLoss(return_parts=True)
    whole = loss(student, teacher, labels)
    for tp in (1, 2, 4):
        shape = dist.get_world_size() // tp, tp
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
        group = mesh.get_group("dp")
        share = ROWS // group.size()
        first = share * mesh.get_local_rank("dp")  # the first ranks keep nothing
        mine = slice(first, first + share)
        num_items = global_num_items(labels[mine], group=group)
        assert num_items == global_num_items(labels[mine]), tp  # copies on both sides of /
        parts = loss(student[mine], teacher[mine], labels[mine], num_items=num_items)
        assert isinstance(parts, KDLossParts)
        sums = torch.stack(list(parts))
        dist.all_reduce(sums, group=group)
        torch.testing.assert_close(sums / group.size(), torch.stack(list(whole)))


CHECKS = {"one count for both terms": one_count_for_both_terms}
