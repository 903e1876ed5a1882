"""Accelerate: a plain loop with a real Accelerator, in one process and in two."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from needs import need
from processes import failures
from torch import Tensor, nn
from torch.utils.data import DataLoader

Accelerator = need("accelerate").Accelerator

from accelerate.state import AcceleratorState, GradientState  # noqa: E402

from fused_kd import KDLoss  # noqa: E402
from fused_kd.integrations.loop import (  # noqa: E402
    divide_gradients,
    global_num_items,
    shifted,
)
from fused_kd.integrations.student_teacher import StudentTeacherLoss  # noqa: E402
from fused_kd.testing.memory import cpu_peak  # noqa: E402

RATE = 0.1
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def _distilled(heads: bool = True) -> StudentTeacherLoss:
    models = tiny.llama(0).train(), tiny.llama(1)
    return StudentTeacherLoss(*models, KDLoss(temperature=2.0), heads=heads)


def _loader(rows: int) -> DataLoader[Any]:
    return DataLoader(tiny.ragged(18), batch_size=rows, collate_fn=tiny.padded)


def _plain_loop(model: StudentTeacherLoss, rows: int) -> nn.Module:
    optimizer = torch.optim.SGD(model.student.parameters(), lr=RATE)
    for batch in _loader(rows):
        loss = model(**batch)
        assert isinstance(loss, Tensor)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.student


def _prepared(heads: bool, rows: int, **options: Any) -> tuple[Any, Any, Any, Any]:
    AcceleratorState._reset_state()
    GradientState._reset_state()
    accelerator, model = Accelerator(cpu=True, **options), _distilled(heads)
    optimizer = torch.optim.SGD(model.student.parameters(), lr=RATE)
    return accelerator, *accelerator.prepare(model, optimizer, _loader(rows))


def _divided_at_the_end(heads: bool, rows: int, micro_batches: int) -> nn.Module:
    """``accumulate()``, sums, one division where the gradients are complete."""
    accelerator, model, optimizer, loader = _prepared(
        heads, rows, gradient_accumulation_steps=micro_batches
    )
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
    student: nn.Module = accelerator.unwrap_model(model).student
    return student


def _counted_first(heads: bool, rows: int, micro_batches: int) -> nn.Module:
    """Whole updates in hand; without ``accumulate()``, which cannot know where one ends."""
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
    student: nn.Module = accelerator.unwrap_model(model).student
    return student


def _close(first: nn.Module, second: nn.Module) -> None:
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


Loop = Callable[[bool, int, int], nn.Module]
LOOPS: list[Loop] = [_divided_at_the_end, _counted_first]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("heads", [False, True])
def test_the_update_does_not_depend_on_the_accumulation(loop: Loop, heads: bool) -> None:
    """P50. The last update has 2 rows."""
    want = _plain_loop(_distilled(heads), 4)
    _close(loop(heads, 4, 1), want)
    _close(loop(heads, 1, 4), want)


def _on_two_ranks(loop: Loop) -> None:
    """Each rank takes every other micro-batch of one row: 18 rows are 4 updates of 4, one of 2."""
    _close(loop(True, 1, 2), _plain_loop(_distilled(), 4))


class _OnTwoRanks:
    """A check for a process: accelerate is imported there."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self) -> None:
        _on_two_ranks(LOOPS[self.number])


@pytest.mark.slow
def test_on_two_processes(tmp_path: Path) -> None:
    checks: dict[str, Callable[[], None]] = {
        loop.__name__: _OnTwoRanks(number) for number, loop in enumerate(LOOPS)
    }
    assert not (found := failures(checks, 2, tmp_path)), "\n".join(found)


def test_the_logits_are_not_converted() -> None:
    """accelerate makes float32 of what a prepared model returns: here, of the loss."""
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    batch = tiny.padded(tiny.ragged(64))  # nothing else is as large as the logits
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    labels = shifted(torch.full_like(batch["labels"], 5))  # every row counts

    def peak(model: Any, call: Callable[[Any], Tensor]) -> int:
        call(model).backward()
        model.zero_grad()
        return cpu_peak(lambda: call(model).backward()).highest

    def apart(student: nn.Module) -> Tensor:
        with torch.no_grad(), accelerator.autocast():
            taught = alone.teacher(**inputs).logits
        logits = student(**inputs).logits
        assert logits.dtype == torch.float32
        loss: Tensor = alone.loss(logits, taught, labels)
        return loss

    whole, alone = _distilled(heads=False), _distilled(heads=False)
    inside = peak(accelerator.prepare(whole), lambda m: m(**{**inputs, "labels": labels}))
    outside = peak(accelerator.prepare(alone.student), apart)
    converted = 4 * labels.numel() * tiny.VOCABULARY
    assert outside - inside > 0.8 * converted  # smaller things differ too
