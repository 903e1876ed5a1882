"""Trainers without a teacher model: every batch has a TopK, as from a cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from support.losses import refused
from support.processes import failures
from tiny import logged
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from fused_kd import KDLoss, TopK, kd_loss
from fused_kd.integrations.loop import shifted
from fused_kd.integrations.student_teacher import StudentTeacherLoss
from fused_kd.integrations.transformers import DistillationLoss, KDTrainer, teacher_from_batches
from fused_kd.teachers import collate

K = 7
OPTIONS = {"temperature": 2.0, "hard_weight": 0.3, "soft_weight": 0.7}
KEYS = ("loss", "hard_loss", "soft_loss")


def loss_for(heads: bool) -> KDLoss:
    return KDLoss(**OPTIONS, chunk_rows=8) if heads else KDLoss(**OPTIONS)


def _teacher() -> nn.Module:
    return tiny.llama(1, layers=2, hidden=32)


def cached(count: int = 16, seed: int = 0, k: int = tiny.VOCABULARY) -> list[dict[str, Any]]:
    """Return samples as TopKDataset does: ids, labels and the teacher's TopK of every token."""
    samples, teacher = tiny.ragged(count, seed), _teacher()
    for sample in samples:
        with torch.no_grad():
            logits = teacher(input_ids=sample["input_ids"][None]).logits[0]
        sample["teacher"] = TopK.from_logits(logits, k, OPTIONS["temperature"])
    return samples


def batch_of(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a batch for plain calls, with an attention mask as tiny.padded has."""
    return {**tiny.padded(samples), "teacher": collate([x["teacher"] for x in samples])}


def _settings(folder: Path, **changes: Any) -> TrainingArguments:
    usual = {"max_steps": 4, "learning_rate": 1e-2, "max_grad_norm": 0.0}
    return TrainingArguments(**tiny.settings(folder, **{**usual, **changes}))


def _trained(
    folder: Path, heads: bool, teacher: nn.Module | None = None, k: int = 97, **changes: Any
) -> KDTrainer:
    """Return a KDTrainer after its training, from a teacher or from the batches."""
    rows = (tiny.ragged(), tiny.ragged(6, seed=1)) if teacher else (cached(k=k), cached(6, 1, k))
    trainer = KDTrainer(
        tiny.llama(0),
        _settings(folder, eval_strategy="steps", eval_steps=2, **changes),
        teacher=teacher,
        loss=loss_for(heads),
        heads=heads,
        train_dataset=rows[0],
        eval_dataset=rows[1],
        data_collator=tiny.padded if teacher else collate,
    )
    trainer.train()
    return trainer


def same(got: Trainer, want: Trainer) -> None:
    """Assert that two trainers have logged equal losses and trained equal weights."""
    for key in (*KEYS, *(f"eval_{key}" for key in KEYS)):
        assert logged(got, key) == pytest.approx(logged(want, key), rel=1e-5)
        assert len(logged(got, key)) >= 2
    assert tiny.largest_difference(got.model, want.model) < 1e-6


def test_all_entries_are_the_teacher(tmp_path: Path, heads: bool) -> None:
    trainer = _trained(tmp_path, heads)
    same(trainer, _trained(tmp_path, heads, _teacher()))
    assert tiny.largest_difference(trainer.model, tiny.llama(0)) > 1e-3


def test_an_update_does_not_depend_on_how_its_batch_is_cut(tmp_path: Path, heads: bool) -> None:
    cuts = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    whole, cut = (_trained(tmp_path, heads, k=K, **changes) for changes in ({}, cuts))
    same(cut, whole)
    assert trainer_differs(whole, _trained(tmp_path, heads))


def trainer_differs(one: Trainer, other: Trainer) -> bool:
    return logged(one, "soft_loss") != pytest.approx(logged(other, "soft_loss"), rel=1e-3)


def test_the_stock_trainer(tmp_path: Path, heads: bool) -> None:
    student = tiny.llama(0)
    loss = DistillationLoss(student, None, loss_for(heads), heads=heads)
    trainer = Trainer(
        student,
        _settings(tmp_path),
        train_dataset=cached(k=K),
        data_collator=collate,
        compute_loss_func=loss,
    )
    for _ in range(2):  # the second call does nothing
        teacher_from_batches(trainer)
    trainer.train()
    expected = _trained(tmp_path, heads, k=K)
    assert logged(trainer) == logged(expected)
    assert tiny.largest_difference(student, expected.model) < 1e-7
    refused(TypeError, "must be a DistillationLoss", teacher_from_batches, Trainer(student))


def _on_two_ranks(heads: bool, folder: Path) -> None:
    """Check that two ranks of 2 rows each train as one of 4 does."""
    trainer = _trained(folder, heads, k=K, per_device_train_batch_size=2)
    expected = torch.load(folder / f"alone{heads}.pt", weights_only=True)
    for name, weight in trainer.model.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_on_two_processes(tmp_path: Path) -> None:
    checks: dict[str, Callable[[], None]] = {}
    for heads in tiny.BOTH:
        alone = _trained(tmp_path, heads, k=K)
        torch.save(alone.model.state_dict(), tmp_path / f"alone{heads}.pt")
        checks[str(heads)] = partial(_on_two_ranks, heads, tmp_path)
    assert not (wrong := failures(checks, 2, tmp_path)), "\n".join(wrong)


# ------------------------------------------------------------------------ the module, Lightning


def expected_loss(student: nn.Module, batch: dict[str, Any]) -> Tensor:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = student(**inputs).logits
    return kd_loss(logits, batch["teacher"], shifted(batch["labels"]), **OPTIONS)


def test_the_module(heads: bool) -> None:
    student, batch = tiny.llama(0), batch_of(cached(4, k=K))
    module = StudentTeacherLoss(student, None, loss_for(heads), heads=heads).train()
    loss = module(**batch)
    torch.testing.assert_close(loss, expected_loss(student, batch))
    loss.backward()
    assert all(x.grad is not None for x in student.parameters())
    names = {f"student.{name}" for name in student.state_dict()}
    assert set(module.state_dict()) == names
    assert not module.load_state_dict(module.state_dict()).missing_keys


def test_lightning(tmp_path: Path, heads: bool) -> None:
    from fused_kd.integrations.lightning import KDModule

    batches = [batch_of(cached(4, seed, K)) for seed in range(3)]
    student = tiny.llama(0)
    optimizer = partial(torch.optim.SGD, lr=0.1)
    module = KDModule(student, None, loss_for(heads), optimizer=optimizer, heads=heads)
    trainer = tiny.lightning_trainer(tmp_path, limit_val_batches=1)
    loader = DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)
    trainer.fit(module, loader, loader)
    plain = StudentTeacherLoss(tiny.llama(0), None, loss_for(heads), heads=heads)
    losses = tiny.plain_loop(plain, batches)
    assert trainer.callback_metrics["train_loss"].item() == pytest.approx(losses[-1], rel=1e-5)
    tiny.assert_close(student, plain.student)
    assert trainer.callback_metrics["val_loss"].isfinite()


# ---------------------------------------------------------------------------------- bad input


def test_a_batch_without_a_teacher_and_with_two_are_named(tmp_path: Path) -> None:
    student, batch = tiny.llama(0), batch_of(cached(2, k=K))
    topk = batch.pop("teacher")
    module = StudentTeacherLoss(student, None)
    message = "must have an entry 'teacher', a TopK, .* got none: .*collate.*teacher_from_batches"
    refused(ValueError, message, module, **batch)
    refused(TypeError, "'teacher' must be a fused_kd.TopK; got tuple", module, **batch, teacher=())
    short = topk.rows((slice(None), slice(1, None)))
    message = r"teacher's TopK must have a row for each label, \(2, .*; got rows \(2, "
    refused(ValueError, message, module, **batch, teacher=short)
    both = StudentTeacherLoss(student, _teacher())
    message = "must not have an entry 'teacher' .* got a TopK: create the loss with teacher=None"
    refused(ValueError, message, both, **batch, teacher=topk)
    kinds = tiny.of("Mixtral", 0, output_router_logits=True, router_aux_loss_coef=0.1)
    refused(ValueError, "aux_loss", StudentTeacherLoss, kinds, None)
    trainer = KDTrainer(
        student,
        _settings(tmp_path),
        teacher=None,
        train_dataset=tiny.ragged(),
        data_collator=tiny.padded,
    )
    refused(ValueError, "must have an entry 'teacher'", trainer.train)


def test_another_temperature_than_the_cache_s_is_named(tmp_path: Path) -> None:
    trainer = KDTrainer(
        tiny.llama(0),
        _settings(tmp_path),
        teacher=None,
        loss=KDLoss(temperature=1.0),
        train_dataset=cached(k=K),
        data_collator=collate,
    )
    refused(ValueError, r"teacher.temperature must be the loss's, 1.0, .* got 2.0", trainer.train)
