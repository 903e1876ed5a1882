"""``torchrun --nproc-per-node 2 -m examples.ddp``: DistributedDataParallel, the exact mean.

Every rank trains on its rows, each of which keeps another number of tokens. Then rank 0 trains on
the whole batches, alone: the losses and the weights are the same.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from examples import common
from examples.ranks import run_rank
from fused_kd import KDLoss
from fused_kd.integrations.loop import global_num_items, shifted
from fused_kd.integrations.student_teacher import StudentTeacherLoss

Batch = dict[str, Tensor]


def train(model: nn.Module, student: nn.Module, batches: Iterable[Batch]) -> list[float]:
    """What a user writes: a plain loop. The losses are those of all ranks."""
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    losses = []
    for batch in batches:
        num_items = global_num_items(shifted(batch["labels"]))
        loss = model(**batch, num_items=num_items)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean_over_ranks(loss.detach()))
    return losses


def mean_over_ranks(loss: Tensor) -> float:
    """For printing; gradients are averaged so by the wrapper of the model."""
    if dist.is_initialized():
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    return loss.item()


def compare(name: str, wrap: Callable[[StudentTeacherLoss], nn.Module]) -> None:
    """Train `wrap(model)` on all ranks, then the model on one, and print how they differ."""
    options = common.arguments(None)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    source = common.text()
    if rank == 0:
        common.student_and_teacher(source)  # keeps the teacher for the others
    dist.barrier()
    student, teacher = common.student_and_teacher(source)
    model = StudentTeacherLoss(student.train(), teacher, KDLoss(temperature=2.0), heads=True)
    alone = deepcopy(model)
    whole = [with_prompts(ids) for ids in common.batches(source, options.steps, 2 * ranks)]
    own = [{key: x.chunk(ranks)[rank] for key, x in batch.items()} for batch in whole]
    start = time.perf_counter()
    losses, weights = train_in_parallel(model, wrap, own)
    seconds = (time.perf_counter() - start) / len(losses)
    dist.destroy_process_group()
    if rank == 0:
        before = [p.detach().clone() for p in alone.student.parameters()]
        want = train(alone, alone.student, whole)
        after = list(alone.student.parameters())
        print(
            f"{name}, {ranks} ranks, {len(losses)} steps of {seconds:.2f} s\n"
            f"  loss     {losses[0]:.6f} -> {losses[-1]:.6f}; in one process {want[0]:.6f} -> "
            f"{want[-1]:.6f}; they differ by at most "
            f"{max(abs(a - b) for a, b in zip(losses, want, strict=True)):.1e}\n"
            f"  weights  differ by at most {common.difference(weights, after):.1e}; "
            f"training moved one by {common.difference(before, after):.1e}"
        )


def train_in_parallel(
    model: StudentTeacherLoss, wrap: Callable[[StudentTeacherLoss], nn.Module], batches: list[Batch]
) -> tuple[list[float], list[Tensor]]:
    """Train `wrap(model)`; return the losses and the student's weights.

    A function of its own, so that the wrapped model is gone before the process group is destroyed.
    If DistributedDataParallel is the last to hold the group, releasing it can deadlock: it joins
    gloo's worker threads while it holds the interpreter's lock, which those may be waiting for.
    """
    losses = train(wrap(model), model.student, batches)
    return losses, [full(p) for p in model.student.parameters()]  # every rank has to come here


def with_prompts(ids: Tensor) -> Batch:
    """A growing part of each row is a prompt, and does not count: (rows, LENGTH) each."""
    rows, length = ids.shape
    prompts = torch.arange(rows) * length // rows
    return {
        "input_ids": ids,
        "labels": torch.where(torch.arange(length) < prompts[:, None], -100, ids),
    }


def full(parameter: Tensor) -> Tensor:
    """A sharded one is gathered."""
    gather = getattr(parameter, "full_tensor", None)
    return (parameter if gather is None else gather()).detach()


if __name__ == "__main__":
    # not a plain call: see run_rank for how a rank has to end
    run_rank(partial(compare, "DistributedDataParallel", DistributedDataParallel))
