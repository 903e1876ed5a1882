"""The teacher gets the inputs of the call of the student whose outputs get the loss."""

from __future__ import annotations

import inspect
import io
import itertools
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from needs import need
from support.losses import refused
from torch import Tensor, nn

from fused_kd.integrations.loop import shifted
from fused_kd.integrations.student_teacher import StudentTeacherLoss
from fused_kd.integrations.transformers import DistillationLoss, KDTrainer

DRAW = torch.Generator().manual_seed(0)
IDS, OTHER = torch.randint(3, tiny.VOCABULARY, (2, 2, 6), generator=DRAW)


def _attached(heads: bool = False, **teacher: int) -> tuple[nn.Module, DistillationLoss]:
    """Return a student in training mode and the loss attached to it; `teacher`: its sizes."""
    student = tiny.llama(0).train()
    return student, DistillationLoss(student, tiny.llama(1, **teacher), heads=heads)


def _pickled(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    assert file.tell() < 2 * sum(p.numel() * 4 for p in model.parameters()) + 50_000  # no teacher
    file.seek(0)
    return torch.load(file, weights_only=False)


# --------------------------------------------------------------------------- saved and copied


@pytest.mark.parametrize("copied", [_pickled, deepcopy])
def test_calls_of_a_copy_of_the_student_are_not_recorded(heads: bool, copied: Any) -> None:
    student, attached = _attached(heads, layers=2, hidden=32)
    want = attached(student(input_ids=IDS), IDS)
    twin = copied(student)
    outputs = student(input_ids=IDS)
    assert twin(input_ids=OTHER).logits.shape == outputs.logits.shape
    torch.testing.assert_close(attached(outputs, IDS), want)
    message = r"has not been called .* that the Trainer trains"
    refused(RuntimeError, message, attached, twin(input_ids=IDS), IDS)
    logits = twin.eval()(input_ids=IDS).logits
    torch.testing.assert_close(logits, tiny.llama(0)(input_ids=IDS).logits)
    if heads:
        message = "or student is a copy of such a model"
        refused(ValueError, message, DistillationLoss, twin, tiny.llama(1), heads=True)
    else:
        assert torch.isfinite(DistillationLoss(twin, tiny.llama(1))(twin(input_ids=IDS), IDS))


def test_a_student_in_training_mode_generates_and_scores_with_logits() -> None:
    # a bypassed head would generate ids below the hidden size
    student = tiny.llama(0)
    attached = DistillationLoss(student, tiny.llama(1), heads=True)
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    want, loss = student.generate(IDS, **settings), attached(student(input_ids=IDS), IDS)
    student.train()
    assert torch.equal(student.generate(IDS, **settings), want)
    trained = attached(student(input_ids=IDS), IDS)
    with torch.no_grad():
        outputs = student(input_ids=IDS)
    torch.testing.assert_close(trained, loss)
    torch.testing.assert_close(attached(outputs, IDS), loss)


# -------------------------------------------------------------------------- which call it was


def test_another_call_before_the_loss_is_harmless_or_noticed(heads: bool) -> None:
    student, attached = _attached(heads)
    want = attached(student(input_ids=IDS), IDS)
    outputs = student(input_ids=IDS)
    with torch.no_grad():
        student(input_ids=OTHER)
    student.generate(OTHER, max_new_tokens=2, do_sample=False)
    torch.testing.assert_close(attached(outputs, IDS), want)
    student(input_ids=OTHER)
    torch.testing.assert_close(attached(student(input_ids=IDS), IDS), want)
    outputs = student(input_ids=IDS)
    student(input_ids=OTHER)
    message = r"called 2 times since the last loss.*before the next"
    refused(RuntimeError, message, attached, outputs, IDS)


def test_outputs_that_a_wrapper_replaced_are_those_of_the_only_call(heads: bool) -> None:
    # DistributedDataParallel clones them if it looks for unused parameters
    student, attached = _attached(heads)
    want = attached(student(input_ids=IDS), IDS)
    for ids in (IDS, OTHER):  # a prediction without labels has no loss
        with torch.no_grad():
            student(input_ids=ids)
    outputs = student(input_ids=IDS)
    torch.testing.assert_close(attached({"logits": outputs.logits.clone()}, IDS), want)
    if not heads:  # the first of a tuple is the student's own loss, if it was called with labels
        assert attached(student(input_ids=IDS, labels=IDS, return_dict=False), IDS) == want


def test_the_logits_of_a_call_are_not_kept_alive() -> None:
    student, attached = _attached()
    outputs = student(input_ids=IDS)
    (last,) = attached._calls._last.values()
    assert last.call is not None
    assert last.call.logits() is outputs.logits
    del outputs
    assert last.call.logits() is None


def test_embeddings_of_the_student_are_refused(heads: bool) -> None:
    student, teacher = tiny.llama(0), tiny.llama(1)
    states = student.get_input_embeddings()(IDS).detach()
    model = StudentTeacherLoss(student, teacher, heads=heads)
    message = r"inputs_embeds must not.*pass input_ids"
    refused(ValueError, message, model, inputs_embeds=states, labels=IDS)
    attached = DistillationLoss(student, teacher, heads=heads)
    for arguments in ((), (None, None, None, None, states)):
        outputs = student(*arguments) if arguments else student(inputs_embeds=states)
        refused(ValueError, "inputs_embeds must not be in the batch", attached, outputs, IDS)


def test_messages_say_why_there_is_no_loss() -> None:
    student, attached = _attached()
    outputs = student(input_ids=IDS)
    attached(outputs, IDS)
    message = "loss of these outputs was computed already"
    refused(RuntimeError, message, attached, outputs, IDS)
    cache = transformers.DynamicCache(config=student.config)
    outputs = student(input_ids=IDS, past_key_values=cache)
    message = r"called with a cache \(past_key_values or .*whole seq"
    refused(RuntimeError, message, attached, outputs, IDS)
    copied, outputs = deepcopy(attached), student(input_ids=IDS)
    refused(RuntimeError, "DistillationLoss is a copy", copied, outputs, IDS)
    forward = student.forward
    student.forward = lambda *arguments: forward(*arguments)
    message = r"called with 1 positional .* names 0: call it with keyw"
    with pytest.raises(TypeError, match=message):
        attached(student(IDS), IDS)


@pytest.mark.parametrize("kind", ["GPT-2", "PEFT"])
def test_positional_arguments_reach_the_teacher_by_their_names(heads: bool, kind: str) -> None:
    # GPT-2's second argument is not Llama's, nor the third of PEFT's model that of its base
    mask = torch.ones_like(IDS)
    mask[:, :2] = 0
    if kind == "PEFT":
        peft = need("peft")
        student = peft.get_peft_model(tiny.llama(2), peft.LoraConfig(task_type="CAUSAL_LM"))
        arguments = (IDS, mask, None, IDS)
    else:
        sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_inner": 32}
        student = tiny.build(transformers.GPT2LMHeadModel, transformers.GPT2Config, 0, **sizes)
        names = list(inspect.signature(student.forward).parameters)
        arguments = (IDS, *[None] * (names.index("attention_mask") - 1), mask)
    attached = DistillationLoss(student, tiny.llama(1), heads=heads)
    want = attached(student(input_ids=IDS, attention_mask=mask), IDS)
    assert attached(student(*arguments), IDS) == want


def test_losses_one_of_which_bypasses_the_students_head() -> None:
    student, first = _attached()
    want = first(student(input_ids=IDS), IDS)
    second = DistillationLoss(student, tiny.llama(1), heads=True)
    message = r"bypassed by another .*loss\.remove\(\)"
    refused(ValueError, message, first, student(input_ids=IDS), IDS)
    for kind, heads in itertools.product((DistillationLoss, StudentTeacherLoss), tiny.BOTH):
        message = r"already bypassed.*loss\.remove\(\)"
        refused(ValueError, message, kind, student, tiny.llama(2), heads=heads)
    second.remove()
    assert first(student(input_ids=IDS), IDS) == want
    DistillationLoss(student, tiny.llama(2), heads=True).remove()
    assert student(input_ids=IDS).logits.shape[-1] == tiny.VOCABULARY


# ------------------------------------------------------------------ labels that are not shifted


def _aligned(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return rows as a padded batch whose labels are shifted already."""
    inputs, labels = tiny.split(tiny.padded(rows))
    return {**inputs, "labels": shifted(labels)}


@pytest.mark.parametrize("cut", tiny.CUTS)
def test_shift_false_in_a_trainer(heads: bool, cut: dict[str, int], tmp_path: Path) -> None:
    # Trainer counts labels[:, 1:] of causal models, regardless of the loss
    losses = []
    for shift, collator in ((True, tiny.padded), (False, _aligned)):
        settings = tiny.settings(tmp_path, max_steps=2, **cut)
        data = {"train_dataset": tiny.ragged(8), "data_collator": collator}
        options = {"teacher": tiny.llama(1), "heads": heads, "shift": shift}
        arguments = transformers.TrainingArguments(**settings)
        trainer = KDTrainer(tiny.llama(0), arguments, **options, **data)
        trainer.train()
        losses.append(tiny.logged(trainer))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert len(losses[0]) == 2
