"""Accelerate: a plain loop with a real Accelerator, in one process and in two."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from needs import need
from support.processes import failures
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

Accelerator = need("accelerate").Accelerator

from accelerate.data_loader import BatchSamplerShard  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402

from fused_kd import KDLoss  # noqa: E402
from fused_kd.integrations.loop import divide_gradients, global_num_items, shifted  # noqa: E402
from fused_kd.integrations.student_teacher import StudentTeacherLoss  # noqa: E402
from fused_kd.objectives.evaluation import _check_order  # noqa: E402
from fused_kd.testing.memory import cpu_peak  # noqa: E402

BOOLS = (False, True)


def _models(heads: bool) -> StudentTeacherLoss:
    pair = tiny.llama(0).train(), tiny.llama(1)
    return StudentTeacherLoss(*pair, KDLoss(temperature=2.0), heads=heads)


def test_held_out_sequences_that_accelerate_repeats_are_refused() -> None:
    # against the indices that the ranks' samplers yield
    cuts = [(count, size, split) for count in (1, 4, 6, 8) for size in (2, 4) for split in BOOLS]
    refused = 0
    for count, size, split in cuts:
        for even in BOOLS:
            plain = BatchSampler(SequentialSampler(range(count)), size, False)
            cut = {"num_processes": 2, "split_batches": split, "even_batches": even}
            shards = [BatchSamplerShard(plain, process_index=rank, **cut) for rank in range(2)]
            if sum(len(batch) for shard in shards for batch in shard) == count:
                _check_order(DataLoader(range(count), batch_sampler=shards[0]))
                continue
            refused += 1
            with pytest.raises(ValueError, match=f"fills up {count} sequences to a multiple of"):
                _check_order(DataLoader(range(count), batch_sampler=shards[0]))
    assert 0 < refused < len(cuts)
    shuffled = BatchSamplerShard(BatchSampler(RandomSampler(range(4)), 2, False), 2)
    with pytest.raises(ValueError, match="got a DataLoader with a RandomSampler"):
        _check_order(DataLoader(range(4), batch_sampler=shuffled))


def _loader(rows: int) -> DataLoader[Any]:
    return DataLoader(tiny.ragged(18), batch_size=rows, collate_fn=tiny.padded)


def _prepared(heads: bool, rows: int, **options: Any) -> tuple[Any, Any, Any, Any]:
    AcceleratorState._reset_state()
    GradientState._reset_state()
    accelerator, model = Accelerator(cpu=True, **options), _models(heads)
    optimizer = torch.optim.SGD(model.student.parameters(), lr=tiny.SGD["learning_rate"])
    return accelerator, *accelerator.prepare(model, optimizer, _loader(rows))


def _divided_at_the_end(heads: bool, rows: int, micro_batches: int) -> Any:
    """Train on sums with accumulate(), and divide the gradients at an update's end.

    Returns the student. `rows` is the batch size, `micro_batches` the batches of an update.
    """
    steps = {"gradient_accumulation_steps": micro_batches}
    accelerator, model, optimizer, loader = _prepared(heads, rows, **steps)
    seen = []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch, num_items=1)
            accelerator.backward(loss * accelerator.gradient_accumulation_steps)
            seen.append(shifted(batch["labels"]))
            if accelerator.sync_gradients:
                divide_gradients(model.parameters(), global_num_items(*seen))
                seen.clear()
            optimizer.step()
            optimizer.zero_grad()
    return accelerator.unwrap_model(model).student


def _counted_first(heads: bool, rows: int, micro_batches: int) -> Any:
    """Train with an update's tokens counted before its first backward; return the student.

    accumulate() is not used, since it learns too late that an update ends.
    """
    accelerator, model, optimizer, loader = _prepared(heads, rows)
    batches = list(loader)
    for start in range(0, len(batches), micro_batches):
        update = batches[start : start + micro_batches]
        num_items = global_num_items(*(shifted(batch["labels"]) for batch in update))
        for batch in update[:-1]:
            with accelerator.no_sync(model):
                accelerator.backward(model(**batch, num_items=num_items))
        accelerator.backward(model(**update[-1], num_items=num_items))
        optimizer.step()
        optimizer.zero_grad()
    return accelerator.unwrap_model(model).student


def _check(loop: Callable[..., Any], heads: bool, *cuts: tuple[int, int]) -> None:
    """Compare every (rows, micro_batches) with whole batches of 4 rows; the last one has 2."""
    want = _models(heads)
    tiny.plain_loop(want, [*_loader(4)])
    for cut in cuts:
        tiny.assert_close(loop(heads, *cut), want.student)


LOOPS = [_divided_at_the_end, _counted_first]


@pytest.mark.parametrize("loop", LOOPS)
def test_the_update_does_not_depend_on_the_accumulation_P50(loop: Any, heads: bool) -> None:
    _check(loop, heads, (4, 1), (1, 4))


def _on_two_ranks(number: int) -> None:
    """Check LOOPS[number] on one of two ranks, each of which trains on every other row."""
    _check(LOOPS[number], True, (1, 2))


@pytest.mark.slow
def test_on_two_processes(tmp_path: Path) -> None:
    checks = {loop.__name__: partial(_on_two_ranks, i) for i, loop in enumerate(LOOPS)}
    assert not (wrong := failures(checks, 2, tmp_path)), "\n".join(wrong)


def test_the_logits_are_not_converted() -> None:
    # accelerate converts to float32 what a prepared model returns: here the loss, not the logits
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    batch = tiny.padded(tiny.ragged(64))  # nothing else is as large as the logits
    tokens = {name: x for name, x in batch.items() if name != "labels"}
    labels = shifted(torch.full_like(batch["labels"], 5))  # every row counts
    pair, alone = _models(heads=False), _models(heads=False)

    def loss_of_logits(student: Any) -> Tensor:
        with torch.no_grad(), accelerator.autocast():
            teacher_logits = alone.teacher(**tokens).logits
        logits = student(**tokens).logits
        assert logits.dtype == torch.float32
        return alone.loss(logits, teacher_logits, labels)

    def peak(model: Any, loss: Callable[[Any], Tensor]) -> int:
        loss(model).backward()
        model.zero_grad()
        return cpu_peak(lambda: loss(model).backward()).highest

    inside = peak(accelerator.prepare(pair), lambda model: model(**tokens, labels=labels))
    outside = peak(accelerator.prepare(alone.student), loss_of_logits)
    converted = 4 * labels.numel() * tiny.VOCABULARY
    assert outside - inside > 0.8 * converted  # smaller things differ too
