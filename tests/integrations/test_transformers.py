"""Train in the real Trainer: exact counts, logits and heads, logs, evaluation, refusals."""

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
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from fused_kd import KDLoss
from fused_kd.integrations.loop import shifted
from fused_kd.integrations.student_teacher import StudentTeacherLoss
from fused_kd.integrations.transformers import DistillationLoss, KDTrainer, log_parts
from fused_kd.testing import eager_kd_loss

OPTIONS = {"temperature": 2.0, "hard_weight": 0.3, "soft_weight": 0.7}
LOGITS: dict[str, Any] = {"loss": KDLoss(**OPTIONS)}
IN_PLACE: dict[str, Any] = {"loss": KDLoss(**OPTIONS, inplace=True)}
HEADS: dict[str, Any] = {"loss": KDLoss(**OPTIONS, chunk_rows=8), "heads": True}
WAYS = {"logits": LOGITS, "in-place": IN_PLACE, "heads": HEADS}
KEYS = ("loss", "hard_loss", "soft_loss")
EVERY = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
DATA: dict[str, Any] = {"train_dataset": tiny.ragged(), "data_collator": tiny.padded}
BATCH, LABELS = tiny.split(tiny.padded(tiny.ragged(2)))


def _settings(folder: Path, **changes: Any) -> TrainingArguments:
    usual = {"max_steps": 4, "learning_rate": 1e-2, "max_grad_norm": 0.0}
    return TrainingArguments(**tiny.settings(folder, **{**usual, **changes}))


def _teacher() -> nn.Module:
    return tiny.llama(1, layers=2, hidden=32)


def _trained(
    folder: Path, way: Any = None, student: nn.Module | None = None, **changes: Any
) -> KDTrainer:
    """Train a student with KDTrainer and return the trainer; `way`: its options, as in WAYS."""
    student = tiny.llama(0) if student is None else student
    options = {"teacher": _teacher(), "eval_dataset": tiny.ragged(6, seed=1), **(way or {})}
    trainer = KDTrainer(student, _settings(folder, **changes), **DATA, **options)
    trainer.train()
    return trainer


class _Eager(Trainer):  # type: ignore[misc]
    """The reference: torch operations on sliced logits, with the Trainer's count as denominator."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        inputs, labels = tiny.split(inputs)
        logits = model(**inputs).logits
        with torch.no_grad():
            teacher_logits = _teacher()(**inputs).logits
        sides = logits[:, :-1], teacher_logits[:, :-1]
        return eager_kd_loss(*sides, labels[:, 1:], num_items=num_items_in_batch, **OPTIONS)


@EVERY
def test_the_same_training_as_with_torch_operations(tmp_path: Path, way: Any) -> None:
    expected = _Eager(tiny.llama(0), _settings(tmp_path), **DATA)
    expected.model_accepts_loss_kwargs = True
    expected.train()
    trainer = _trained(tmp_path, way)
    assert logged(trainer) == pytest.approx(logged(expected), rel=1e-5)
    assert tiny.largest_difference(trainer.model, expected.model) < 1e-6
    assert tiny.largest_difference(trainer.model, tiny.llama(0)) > 1e-3


@EVERY
def test_an_update_does_not_depend_on_how_its_batch_is_cut_P50(tmp_path: Path, way: Any) -> None:
    whole = _trained(tmp_path, way)
    cut = _trained(tmp_path, way, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert tiny.largest_difference(whole.model, cut.model) < 1e-6
    for key in KEYS:
        assert logged(cut, key) == pytest.approx(logged(whole, key), rel=1e-5)


@EVERY
@pytest.mark.parametrize("every", [1, 2])
def test_the_parts_are_logged_with_the_loss(tmp_path: Path, way: Any, every: int) -> None:
    evaluation = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}
    trainer = _trained(tmp_path, way, logging_steps=every, **evaluation)
    for prefix, count in (("", 4 // every), ("eval_", 2)):
        whole, hard, soft = (logged(trainer, f"{prefix}{k}loss") for k in ("", "hard_", "soft_"))
        assert len(whole) == len(hard) == len(soft) == count
        weighted = [0.3 * h + 0.7 * s for h, s in zip(hard, soft, strict=True)]
        assert weighted == pytest.approx(whole, rel=1e-4)
        assert min(hard) > 0.1
        assert min(soft) > 0.01


def test_the_stock_trainer_takes_the_loss_and_logs_its_parts(tmp_path: Path) -> None:
    student, teacher = tiny.llama(0), _teacher()
    loss = DistillationLoss(student, teacher, **LOGITS)
    trainer = Trainer(student, _settings(tmp_path), **DATA, compute_loss_func=loss)
    log_parts(trainer)
    trainer.train()
    expected = _trained(tmp_path, LOGITS)
    assert logged(trainer) == logged(expected)
    assert logged(trainer, "soft_loss") == logged(expected, "soft_loss")
    assert all(parameter.grad is None for parameter in teacher.parameters())


@EVERY
def test_evaluation_returns_logits_and_the_same_loss_N_30(tmp_path: Path, way: Any) -> None:
    trainer = _trained(tmp_path, way)
    seen = trainer.predict(tiny.ragged(3, seed=2))
    assert seen.predictions.shape[-1] == tiny.VOCABULARY
    inputs, labels = tiny.split(tiny.padded(tiny.ragged(3, seed=2)))
    with torch.no_grad():
        sides = (m(**inputs).logits for m in (trainer.model, _teacher()))
    expected = eager_kd_loss(*sides, shifted(labels), **OPTIONS)
    assert seen.metrics["test_loss"] == pytest.approx(expected.item(), rel=1e-5)


@EVERY
def test_each_of_several_evaluation_sets_has_its_parts(tmp_path: Path, way: Any) -> None:
    trainer = _trained(tmp_path, way)
    sets = {name: tiny.ragged(6, seed=seed) for seed, name in enumerate("ab", 1)}
    for _ in range(2):
        evaluated = trainer.evaluate(sets)
        for name, rows in sets.items():
            alone = trainer.evaluate(rows)
            for key in KEYS:
                assert evaluated[f"eval_{name}_{key}"] == pytest.approx(
                    alone[f"eval_{key}"], rel=1e-6
                )
    assert not logged(trainer, "train_hard_loss")


def test_a_training_with_heads_makes_no_logits(tmp_path: Path) -> None:
    student, shapes = tiny.llama(0), set()
    student.register_forward_hook(lambda m, _, out: shapes.add((m.training, out.logits.shape[-1])))
    trainer = _trained(tmp_path, HEADS, student)
    assert shapes == {(False, 97), (True, 16)}  # the probe at the start, the training
    trainer.compute_loss_func.remove()
    assert student.train()(input_ids=torch.ones(1, 2, dtype=torch.int64)).logits.shape[-1] == 97
    assert not student._forward_pre_hooks
    assert "forward" not in student.lm_head.__dict__


@EVERY
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, way: Any) -> None:
    trainer = _trained(tmp_path, way, gradient_checkpointing=True)
    assert tiny.largest_difference(trainer.model, _trained(tmp_path, way).model) < 1e-7


def test_mixed_precision_reaches_the_products_and_the_teacher(tmp_path: Path) -> None:
    expected = logged(_trained(tmp_path, LOGITS))
    seen = []
    logits, heads = (_trained(tmp_path, way, bf16=True) for way in (LOGITS, HEADS))
    for trainer in (logits, heads):
        assert logged(trainer) == pytest.approx(expected, rel=2e-2)
        assert logged(trainer) != expected
    teacher = heads.compute_loss_func.teacher
    teacher.model.layers[0].mlp.register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    heads.train()
    assert set(seen) == {torch.bfloat16}


def test_a_resumed_training_continues_as_if_never_stopped(tmp_path: Path) -> None:
    whole = _trained(tmp_path / "whole", HEADS)
    changes: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    _trained(tmp_path / "cut", HEADS, max_steps=2, **changes)
    arguments = _settings(tmp_path / "cut", **changes)
    trainer = KDTrainer(tiny.llama(5), arguments, **HEADS, teacher=_teacher(), **DATA)
    trainer.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    assert tiny.largest_difference(trainer.model, whole.model) < 1e-7
    for key in KEYS:
        assert logged(trainer, key) == pytest.approx(logged(whole, key), rel=1e-5)
    saved = (tmp_path / "cut" / "checkpoint-2").glob("*.safetensors")
    students = sum(p.nbytes for p in tiny.llama(0).parameters())
    assert sum(file.stat().st_size for file in saved) < 2 * students  # no teacher


@pytest.mark.slow
def test_compiled_students_train_the_same(tmp_path: Path, heads: bool) -> None:
    way = HEADS if heads else LOGITS
    compiled = _trained(tmp_path, way, torch_compile=True, eval_strategy="steps", eval_steps=2)
    expected = _trained(tmp_path, way, eval_strategy="steps", eval_steps=2)
    assert tiny.largest_difference(compiled.model, expected.model) < 1e-5
    for key in ("loss", "eval_loss", "soft_loss"):
        assert logged(compiled, key) == pytest.approx(logged(expected, key), rel=1e-4)


def test_a_student_that_is_compiled_already(tmp_path: Path, heads: bool) -> None:
    # Trainer cannot read which columns it takes
    changes: dict[str, Any] = {"remove_unused_columns": False, "label_names": ["labels"]}
    student, way = torch.compile(tiny.llama(0), backend="eager"), HEADS if heads else LOGITS
    trainer, expected = _trained(tmp_path, way, student, **changes), _trained(tmp_path, way)
    assert tiny.largest_difference(trainer.model, expected.model) < 1e-6
    for key, value in expected.evaluate().items():
        if key.endswith("loss"):
            assert trainer.evaluate()[key] == pytest.approx(value, rel=1e-5)


class NoKeywords(LlamaForCausalLM):  # type: ignore[misc]
    def forward(
        self, input_ids: Any, attention_mask: Any = None, labels: Any = None, use_cache: Any = None
    ) -> Any:
        return super().forward(input_ids, attention_mask, labels=labels, use_cache=use_cache)


def test_models_that_take_no_keywords_of_a_loss_N_19(tmp_path: Path, heads: bool) -> None:
    # transformers#37766: num_items_in_batch was dropped, and the loss grew by the accumulation
    students = []
    for cut in tiny.CUTS:
        student, teacher = (tiny.build(NoKeywords, LlamaConfig, seed) for seed in (0, 1))
        loss = DistillationLoss(student, teacher, heads=heads)
        arguments = _settings(tmp_path, max_steps=1, learning_rate=0.1, **cut)
        trainer = Trainer(student, arguments, compute_loss_func=loss, **DATA)
        assert not trainer.model_accepts_loss_kwargs
        trainer.train()
        students.append(student)
    tiny.assert_close(*students)
    assert tiny.largest_difference(student, tiny.build(NoKeywords, LlamaConfig, 0)) > 1e-3


# ---------------------------------------------------------------------------------- bad input


def test_a_router_whose_loss_would_be_lost_is_refused() -> None:
    build = partial(tiny.of, "Mixtral", 0, num_local_experts=4)
    teacher = build(output_router_logits=True)
    student = build(output_router_logits=True, router_aux_loss_coef=0.1)
    for kind in (DistillationLoss, StudentTeacherLoss):
        message = r"aux_loss, times 0\.1.*output_router_logits=False"
        refused(ValueError, message, kind, student, teacher)
    student.config.output_router_logits = False
    StudentTeacherLoss(student, teacher)
    DistillationLoss(build(output_router_logits=True, router_aux_loss_coef=0.0), teacher)


def test_bad_models_losses_and_arguments_are_refused_at_once(tmp_path: Path) -> None:
    student, teacher, base = tiny.llama(0), tiny.llama(1), tiny.llama(2)
    base.model.layers[0] = student.model.layers[0]  # as PEFT's model and what it was made of
    bad: list[tuple[tuple[Any, ...], type[Exception], str]] = [
        ((None, teacher), TypeError, "student must be a model of transformers.*got None"),
        ((student, nn.Linear(2, 2)), TypeError, "teacher must be .*got Linear"),
        ((student, student), ValueError, "teacher must be another model"),
        ((student, base), ValueError, "got 9 that are also the student's: copy.deepcopy"),
        ((student, tiny.llama(1, vocab_size=99)), ValueError, "97 in the student and 99"),
        ((student, tiny.llama(1).train()), ValueError, "teacher must be in evaluation mode"),
        ((student, teacher, "kl"), TypeError, "loss must be a KDLoss; got str"),
        ((student, teacher, KDLoss(reduction="sum")), ValueError, "reduction='mean'.*got 'sum'"),
        ((student, teacher, KDLoss(ignore_index=0)), ValueError, "ignore_index=-100.*got 0"),
    ]
    for arguments, kind, message in bad:
        refused(kind, message, DistillationLoss, *arguments)
    assert not student._forward_pre_hooks
    make = partial(KDTrainer, teacher=teacher, loss=KDLoss())
    smoothed, plain = _settings(tmp_path, label_smoothing_factor=0.2), _settings(tmp_path)
    message = r"got 0\.2: pass loss=KDLoss\(label_smoothing="
    refused(ValueError, message, make, student, smoothed)
    init = {"args": plain, "model_init": lambda: student}
    refused(ValueError, "model_init must be None", make, **init)
    func = DistillationLoss(student, teacher)
    make = partial(KDTrainer, student, teacher=teacher, compute_loss_func=func)
    refused(ValueError, "compute_loss_func must be None", make)
    refused(
        TypeError, "must be a DistillationLoss; got NoneType", log_parts, Trainer(student, plain)
    )


def test_absent_labels_and_a_teacher_that_trains_are_named() -> None:
    student, teacher = tiny.llama(0), tiny.llama(1)
    loss = DistillationLoss(student, teacher)
    refused(ValueError, "labels must be in the batch", loss, student(**BATCH), None)
    refused(RuntimeError, "has not been called", loss, tiny.llama(0)(**BATCH), LABELS)
    teacher.train()
    refused(ValueError, "teacher must be in evaluation mode", loss, student(**BATCH), LABELS)


def _on_two_ranks(which: str, folder: Path) -> None:
    """Check that two ranks of 2 rows each train as one of 4 does, and that rank 0 logs for both."""
    trainer = _trained(folder, WAYS[which], per_device_train_batch_size=2)
    expected = torch.load(folder / f"alone{which}.pt", weights_only=True)
    for name, weight in trainer.model.state_dict().items():
        torch.testing.assert_close(weight, expected["weights"][name], rtol=0, atol=1e-6)
    if trainer.is_world_process_zero():
        for key in KEYS:
            assert logged(trainer, key) == pytest.approx(expected[key], rel=1e-5), key
    _parts_of_the_evaluation(trainer)


def _parts_of_the_evaluation(trainer: KDTrainer) -> None:
    """Check that the parts add up to the loss, without the rows that pad the ranks' last batch."""
    for _ in range(2):
        trainer.predict(tiny.ragged(5, seed=2))
        evaluated = trainer.evaluate()
        parts = 0.3 * evaluated["eval_hard_loss"] + 0.7 * evaluated["eval_soft_loss"]
        assert parts == pytest.approx(evaluated["eval_loss"], rel=1e-5)


def test_on_two_processes(tmp_path: Path) -> None:
    # the stock Trainer's own DistributedDataParallel
    checks: dict[str, Callable[[], None]] = {}
    for which, way in WAYS.items():
        alone = _trained(tmp_path, way)
        _parts_of_the_evaluation(alone)
        logs = {key: logged(alone, key) for key in KEYS}
        torch.save({"weights": alone.model.state_dict(), **logs}, tmp_path / f"alone{which}.pt")
        checks[which] = partial(_on_two_ranks, which, tmp_path)
    assert not (wrong := failures(checks, 2, tmp_path)), "\n".join(wrong)


def test_labels_that_are_shifted_already_are_taken_as_they_are() -> None:
    # shift_labels, as collators without padding make them
    student, ready = tiny.llama(0), {**BATCH, "shift_labels": shifted(LABELS)}
    loss = DistillationLoss(student, tiny.llama(1))
    expected = loss(student(**BATCH), LABELS)
    assert loss(student(**ready), torch.zeros_like(LABELS)).item() == expected.item()
    outputs = student.train()(**ready)
    refused(ValueError, r"labels must be in the batch .* gradient_accum", loss, outputs, None)
    assert torch.isfinite(loss(student(**ready), None, num_items_in_batch=5))
