"""Checks that every rank runs: training on shares of a batch is training on the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from fused_kd import Head, KDLoss
from fused_kd.integrations.loop import divide_gradients, global_num_items, shifted
from fused_kd.integrations.student_teacher import StudentTeacherLoss
from support.models import VOCABULARY, Block, SmallLM

STEPS, ROWS, LENGTH = 3, 2, 7
CPU = torch.device("cpu")
#: Tolerance of weights after a few steps: float32 sums in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A check of one way to train: calling it asserts that the ranks train as one process does.

    Every rank of the process group must call it. `wrap` makes a model parallel; `micro_batches` are
    those of a rank in a step.
    """

    wrap: Callable[..., nn.Module]
    heads: bool = True
    micro_batches: int = 1
    last_rank_is_empty: bool = False
    divide: bool = False  # divide the gradients of sums, instead of passing num_items
    model: dict[str, Any] = field(default_factory=dict)  # keywords of the student
    options: dict[str, Any] = field(default_factory=dict)  # keywords of wrap

    def __call__(self) -> None:
        alone, parallel = self.distilled(), self.wrap(self.distilled(), **self.options)
        want = self.train(alone, None)
        got = self.train(parallel, dist.get_rank())
        dist.all_reduce(got)
        torch.testing.assert_close(got / dist.get_world_size(), want, **CLOSE)
        with FSDP1.summon_full_params(parallel):
            for name, weight in student_of(alone).named_parameters():
                mine = whole(student_of(parallel).get_parameter(name))
                torch.testing.assert_close(mine, weight, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")

    def distilled(self) -> StudentTeacherLoss:
        models = SmallLM(0, **self.model), SmallLM(1, hidden=24)
        return StudentTeacherLoss(*models, KDLoss(temperature=2.0), heads=self.heads)

    def train(self, model: nn.Module, rank: int | None) -> Tensor:
        """Train for STEPS steps; return their losses, (STEPS,).

        With `rank` None a step takes the whole batch; else it takes the rank's share, and the
        losses' mean over the ranks is the loss of the whole batch.
        """
        optimizer = torch.optim.SGD(student_of(model).parameters(), lr=0.5)
        losses = torch.zeros(STEPS)
        for step in range(STEPS):
            if rank is None:
                (batch,) = self.batches(step, None)
                losses[step] = self.backward(model, batch, None)
            else:
                losses[step] = self.backward_of_all(model, self.batches(step, rank))
            optimizer.step()
            optimizer.zero_grad()
        return losses

    def backward_of_all(self, model: nn.Module, parts: list[Batch]) -> Tensor:
        """Run the backward of each micro-batch of a rank; return the rank's loss of the step."""
        num_items = global_num_items(*(shifted(part["labels"]) for part in parts))
        loss = torch.zeros(())
        for i, part in enumerate(parts):
            with synchronised(model, i == len(parts) - 1):
                loss += self.backward(model, part, 1 if self.divide else num_items)
        if not self.divide:
            return loss
        divide_gradients(student_of(model).parameters(), num_items)
        return loss / num_items

    def backward(self, model: nn.Module, batch: Batch, num_items: Any) -> Tensor:
        loss = model(**batch, num_items=num_items)
        loss.backward()
        return loss.detach()

    def batches(self, step: int, rank: int | None) -> list[Batch]:
        """Return a rank's micro-batches in a step; for None, the batch of all ranks as one."""
        generator = torch.Generator().manual_seed(step)
        count = dist.get_world_size() * self.micro_batches * ROWS
        ids = torch.randint(VOCABULARY, (count, LENGTH), generator=generator)
        kept = torch.rand(ids.shape, generator=generator) < torch.linspace(0.1, 0.9, count)[:, None]
        kept[0, 1:3] = True  # so the mean exists
        if self.last_rank_is_empty:
            kept[-self.micro_batches * ROWS :] = False
        labels = torch.where(kept, ids, -100)
        if rank is None:
            return [{"input_ids": ids, "labels": labels}]
        shares = list(zip(ids.split(ROWS), labels.split(ROWS), strict=True))
        own = shares[rank * self.micro_batches : (rank + 1) * self.micro_batches]
        return [{"input_ids": share[0], "labels": share[1]} for share in own]


def student_of(model: nn.Module) -> nn.Module:
    return (model.module if isinstance(model, (DistributedDataParallel, FSDP1)) else model).student


def whole(x: Any) -> Tensor:
    return x.full_tensor().detach() if hasattr(x, "full_tensor") else x.detach()


def synchronised(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    # Gradients are reduced over the ranks in the backward of the last micro-batch alone.
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
    elif isinstance(model, (DistributedDataParallel, FSDP1)) and not last:
        return model.no_sync()
    return nullcontext()


def shard(model: StudentTeacherLoss, teacher_apart: bool = False, **options: Any) -> nn.Module:
    # FSDP2: each block is a unit; embeddings, norms and heads belong to the outermost unit;
    # with `teacher_apart` those of the teacher are a unit of their own.
    options["mesh"] = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in [*model.student.blocks, *model.teacher.blocks]:
        fully_shard(block, **options)
    if teacher_apart:
        fully_shard(model.teacher, **options)
    return fully_shard(model, **options)


def shard_flat(model: StudentTeacherLoss) -> nn.Module:
    # FSDP1: frozen weights share a flat parameter with trained ones, so their views have a graph.
    policy = ModuleWrapPolicy({Block})
    return FSDP1(model, auto_wrap_policy=policy, use_orig_params=True, device_id=CPU)


def a_mean_of_means_is_another() -> None:
    # Without num_items, ranks average their own means. The difference is larger than the tolerance
    # of the other checks, which proves that they can fail.
    case = Case(DistributedDataParallel)
    model = case.wrap(case.distilled())
    (batch,) = case.batches(0, dist.get_rank())
    (all_of_them,) = case.batches(0, None)
    model(**batch).backward()
    alone = case.distilled()
    alone(**all_of_them).backward()
    got, want = (student_of(m).lm_head.weight.grad for m in (model, alone))
    assert (got - want).norm() > 0.01 * want.norm()


def no_rank_keeps_a_token() -> None:
    for wrap in (DistributedDataParallel, shard):
        case = Case(wrap)
        model = case.wrap(case.distilled())
        (batch,) = case.batches(0, dist.get_rank())
        batch["labels"].fill_(-100)
        loss = model(**batch, num_items=global_num_items(shifted(batch["labels"])))
        loss.backward()
        assert loss.item() == 0.0
        for parameter in student_of(model).parameters():
            assert not whole(parameter.grad).any()


class Gathers(TorchDispatchMode):
    """Record the number of elements of every all-gather."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op is torch.ops.c10d._allgather_base_.default:
            self.sizes.append(args[0].numel())
        return op(*args, **(kwargs or {}))


def the_head_is_gathered_once() -> None:
    # Once per step, together with the other weights outside the blocks. The student's blocks are
    # gathered twice, the teacher's once: they are not prefetched for the backward.
    model = shard(Case(shard).distilled())
    model.student.blocks[0].set_modules_to_backward_prefetch([model])
    (batch,) = Case(shard).batches(0, dist.get_rank())
    with Gathers() as seen:
        model(**batch).backward()
    blocks = {*model.student.blocks.parameters(), *model.teacher.blocks.parameters()}
    outermost = sum(p.numel() for p in model.parameters() if p not in blocks)
    assert len([size for size in seen.sizes if size >= outermost]) == 1, seen.sizes
    gathers = 1 + 2 * len(model.student.blocks) + len(model.teacher.blocks)
    assert len(seen.sizes) == gathers, seen.sizes


def a_sharded_head_is_refused_outside_the_forward() -> None:
    # P57: CCE#31, torchtune#2800.
    model = shard(Case(shard).distilled())
    head, hidden = model.student.lm_head, torch.randn(3, 16)
    with pytest.raises(TypeError, match=r"student\.weight must be a local .* a DTensor"):
        KDLoss(hard_weight=0)(Head(hidden, head.weight), torch.randn(3, VOCABULARY))


def bfloat16_takes_a_count_that_is_not_cast() -> None:
    case = Case(shard)
    (batch,) = case.batches(0, dist.get_rank())
    (all_of_them,) = case.batches(0, None)
    num_items = global_num_items(shifted(batch["labels"]))
    losses = []
    for cast in (True, False):
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=cast)
        model = shard(case.distilled(), mp_policy=policy)
        if cast:
            with pytest.raises(TypeError, match="num_items"):
                model(**batch, num_items=num_items)
        else:
            loss = model(**batch, num_items=num_items)
            loss.backward()
            losses.append(loss.detach())
    dist.all_reduce(losses[0])
    want = case.distilled()(**all_of_them)
    torch.testing.assert_close(losses[0] / dist.get_world_size(), want, rtol=0.02, atol=0.0)


def the_teacher_is_in_no_checkpoint() -> None:
    model = shard(Case(shard).distilled())
    plain = Case(shard).distilled()
    for state in (get_model_state_dict(model), get_model_state_dict(model.student)):
        assert not [name for name in state if name.startswith("teacher")]
    for name, value in get_model_state_dict(model.student).items():
        torch.testing.assert_close(whole(value), plain.student.state_dict()[name])


BOTH = {"logits": False, "heads": True}
UNUSED = {"find_unused_parameters": True}
DDP_CHECKS: dict[str, Callable[[], None]] = {
    **{f"{name}": Case(DistributedDataParallel, heads) for name, heads in BOTH.items()},
    **{
        f"{name}, the last rank keeps no token": Case(
            DistributedDataParallel, heads, last_rank_is_empty=True
        )
        for name, heads in BOTH.items()
    },
    "two micro-batches": Case(DistributedDataParallel, micro_batches=2),
    "two micro-batches, divided at the end": Case(
        DistributedDataParallel, micro_batches=2, divide=True, last_rank_is_empty=True
    ),
    "find_unused_parameters": Case(DistributedDataParallel, options=UNUSED),
    "find_unused_parameters, the last rank keeps no token": Case(
        DistributedDataParallel, last_rank_is_empty=True, options=UNUSED
    ),
    "static_graph": Case(DistributedDataParallel, options={"static_graph": True}),
    "static_graph, tied, checkpointed": Case(
        DistributedDataParallel,
        options={"static_graph": True},
        model={"tied": True, "checkpointed": True},
    ),
    "a mean of means is another": a_mean_of_means_is_another,
}
FSDP_CHECKS: dict[str, Callable[[], None]] = {
    **{f"{name}": Case(shard, heads) for name, heads in BOTH.items()},
    "logits, the teacher apart": Case(shard, heads=False, options={"teacher_apart": True}),
    "tied": Case(shard, model={"tied": True}),
    "checkpointed": Case(shard, model={"checkpointed": True}),
    "the last rank keeps no token": Case(shard, last_rank_is_empty=True),
    "two micro-batches": Case(shard, micro_batches=2),
    "two micro-batches, divided at the end": Case(shard, micro_batches=2, divide=True),
    "no rank keeps a token": no_rank_keeps_a_token,
    "the head is gathered once": the_head_is_gathered_once,
    "a sharded head is refused": a_sharded_head_is_refused_outside_the_forward,
    "bfloat16": bfloat16_takes_a_count_that_is_not_cast,
    **{f"FSDP1, {name}": Case(shard_flat, heads) for name, heads in BOTH.items()},
    "FSDP1, two micro-batches, the last rank keeps no token": Case(
        shard_flat, micro_batches=2, divide=True, last_rank_is_empty=True
    ),
    "the teacher is in no checkpoint": the_teacher_is_in_no_checkpoint,
}


def one_count_for_both_terms() -> None:
    # Ranks of one tensor-parallel group have the same rows, which are counted once.
    rows, vocabulary = 12, 11
    draw = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(rows, vocabulary, generator=draw) for _ in range(2))
    labels = torch.randint(vocabulary, (rows,), generator=draw)
    labels[:7] = -100
    loss = KDLoss(return_parts=True)
    whole = loss(student, teacher, labels)
    for tp in (1, 2, 4):
        shape = dist.get_world_size() // tp, tp
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
        group = mesh.get_group("dp")
        share = rows // group.size()
        first = share * mesh.get_local_rank("dp")  # the first ranks keep nothing
        mine = slice(first, first + share)
        num_items = global_num_items(labels[mine], group=group)
        assert num_items == global_num_items(labels[mine]), tp  # tp cancels in count / ranks
        sums = torch.stack(loss(student[mine], teacher[mine], labels[mine], num_items=num_items))
        dist.all_reduce(sums, group=group)
        torch.testing.assert_close(sums / group.size(), torch.stack(whole))


#: Checks on meshes of data-parallel and tensor-parallel ranks.
MESH_CHECKS = {"one count for both terms": one_count_for_both_terms}
