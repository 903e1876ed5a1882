"""Measure both losses of a student on a held-out set, sequence by sequence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from ..integrations._common.heads import not_bypassed
from ..integrations._common.labels import aligned
from ..integrations._common.models import unwrapped
from ..integrations.student_teacher import StudentTeacherLoss
from ..modules import KDLoss
from ..sides import TopK
from .held_out import HeldOut

#: The options under which the losses mean the same, and the optimum is the same.
_SETTINGS = (
    "temperature",
    "hard_weight",
    "soft_weight",
    "divergence",
    "beta",
    "soft_scale",
    "label_smoothing",
)

#: The entry of a batch that identifies its sequences.
IDS = "ids"


def evaluate(
    loss: KDLoss,
    student: nn.Module,
    teacher: nn.Module | None,
    loader: Iterable[Mapping[str, Any]],
    *,
    heads: bool = False,
    shift: bool = True,
) -> HeldOut:
    """Return the losses of each sequence of a held-out set, for a ConvergenceMonitor.

    ::

        held_out = evaluate(loss, student, teacher, loader)
        verdict = monitor.update(**held_out._asdict(), step=step, lr=lr)

    The student runs in evaluation mode, without gradients.

    Args:
        loss: the loss of the training; its reduction does not matter.
        student: see :class:`fused_kd.integrations.student_teacher.StudentTeacherLoss`.
        teacher: the same; put into evaluation mode and frozen. None: the batches' "teacher".
        loader: yields dicts with labels (B, S), a sequence in each row, and the inputs of both
            models; always the same sequences in the same order. On several ranks, each its own, and
            as many batches on each if the student is sharded (FSDP). An entry "ids" (B,), integers,
            is for the monitor, which compares them.
        heads: bypass the lm_heads, so that no logits are computed. False for the student of a
            DistillationLoss with heads, which has bypassed its lm_head.
        shift: whether labels are those of the inputs, to be shifted to the next token.

    Returns:
        float64 tensors on the CPU, one value for each sequence. The losses of an objective whose
        weight is 0 are None.

    Raises:
        TypeError: As StudentTeacherLoss; or a batch is no dict with labels.
        ValueError: The same; or the loader shuffles, or repeats sequences to fill up the ranks (a
            stream that does is not recognised: yield ids), or yields nothing, or ids for some
            batches only.
    """
    _check_order(loader)
    options = replace(loss.options, reduction="none", return_parts=True, inplace=False)
    by_row = KDLoss()
    by_row.options = options
    device = next(student.parameters()).device
    sums: list[Tensor] = []
    ids: list[Tensor] = []
    with _evaluating(student), not_bypassed(unwrapped(student)), torch.no_grad():
        both = StudentTeacherLoss(student, teacher, by_row, heads=heads, shift=shift)
        for batch in loader:
            if not isinstance(batch, Mapping) or "labels" not in batch:
                kind = [*batch] if isinstance(batch, Mapping) else type(batch).__name__
                raise TypeError(f"loader must yield dicts with labels and inputs; got {kind}")
            moved = {name: _moved(value, device) for name, value in batch.items()}
            if IDS in moved:
                ids.append(moved.pop(IDS).cpu())
            parts = both.parts(**moved)
            kept = aligned(moved["labels"], shift) != options.ignore_index
            rows = (parts.hard, parts.soft, kept)
            sums.append(torch.stack([x.double().reshape(len(x), -1).sum(1) for x in rows]).cpu())
    if not sums:
        raise ValueError("loader must yield at least one batch; got none")
    if len(ids) not in (0, len(sums)):
        raise ValueError(
            f"loader must yield {IDS} in each batch or in none; got {len(ids)} of {len(sums)}"
        )
    hard, soft, tokens = torch.cat(sums, dim=1)
    return HeldOut(
        hard if options.hard_weight else None,
        soft if options.soft_weight else None,
        tokens,
        ids=torch.cat(ids) if ids else None,
        measured_with={name: getattr(options, name) for name in _SETTINGS},
    )


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, (Tensor, TopK)) else value


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode for a while, and restore the mode of each of the modules afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _check_order(loader: object) -> None:
    """Refuse a DataLoader whose sequences are not the same in each evaluation, or repeated."""
    if not isinstance(loader, DataLoader):
        return
    batches: Any = loader.batch_sampler
    whole = getattr(batches, "batch_sampler", batches)  # of which Accelerate's has a rank's share
    sampler: Any = getattr(whole, "sampler", loader.sampler)
    if isinstance(sampler, (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)):
        raise ValueError(
            "loader must yield the same sequences in the same order at each evaluation; got a "
            f"DataLoader with a {type(sampler).__name__}, as of shuffle=True"
        )
    if isinstance(sampler, DistributedSampler):
        if sampler.shuffle:
            raise ValueError(
                "loader must yield the same sequences in the same order at each evaluation; got a "
                "DistributedSampler that shuffles: pass shuffle=False"
            )
        count = len(sampler.dataset)  # type: ignore[arg-type]
        if not sampler.drop_last and count % sampler.num_replicas:
            raise ValueError(
                f"loader must not repeat sequences; got a DistributedSampler that fills up {count} "
                f"sequences for {sampler.num_replicas} ranks: pass drop_last=True"
            )
    if getattr(batches, "even_batches", False) and batches.batch_size and not batches.drop_last:
        _check_even(batches, len(sampler))


def _check_even(batches: Any, count: int) -> None:
    """Refuse a BatchSamplerShard of Accelerate that fills up `count` sequences to whole batches."""
    size = batches.batch_size * (1 if batches.split_batches else batches.num_processes)
    if count % size:
        raise ValueError(
            "loader must not repeat sequences; got a DataLoader of Accelerate that fills up "
            f"{count} sequences to a multiple of {size}: set even_batches=False (TrainingArguments "
            "have it in accelerator_config)"
        )
