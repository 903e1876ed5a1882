"""The teacher gets the inputs of the student's call that the loss is for."""

from __future__ import annotations

import inspect
import io
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from needs import need
from torch import Tensor, nn

transformers = need("transformers")
need("accelerate")

from fused_kd.integrations.loop import shifted  # noqa: E402
from fused_kd.integrations.student_teacher import StudentTeacherLoss  # noqa: E402
from fused_kd.integrations.transformers import DistillationLoss, KDTrainer  # noqa: E402

BOTH = pytest.mark.parametrize("heads", tiny.BOTH)
DRAW = torch.Generator().manual_seed(0)
IDS, OTHER = torch.randint(3, tiny.VOCABULARY, (2, 2, 6), generator=DRAW)


def _attached(heads: bool = False) -> tuple[nn.Module, DistillationLoss]:
    """Return a student in training mode and the loss attached to it."""
    student = tiny.llama(0).train()
    return student, DistillationLoss(student, tiny.llama(1), heads=heads)


def _pickled(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    assert file.tell() < 2 * sum(p.numel() * 4 for p in model.parameters()) + 50_000  # no teacher
    file.seek(0)
    return torch.load(file, weights_only=False)


# --------------------------------------------------------------------------- saved and copied


@BOTH
@pytest.mark.parametrize("copied", [_pickled, deepcopy])
def test_calls_of_a_copy_of_the_student_are_not_recorded(heads: bool, copied: Any) -> None:
    student = tiny.llama(0).train()
    attached = DistillationLoss(student, tiny.llama(1, layers=2, hidden=32), heads=heads)
    want = attached(student(input_ids=IDS), IDS)
    twin = copied(student)
    outputs = student(input_ids=IDS)
    assert twin(input_ids=OTHER).logits.shape == outputs.logits.shape
    torch.testing.assert_close(attached(outputs, IDS), want)
    with pytest.raises(RuntimeError, match=r"has not been called .* that the Trainer trains"):
        attached(twin(input_ids=IDS), IDS)
    logits = twin.eval()(input_ids=IDS).logits
    torch.testing.assert_close(logits, tiny.llama(0)(input_ids=IDS).logits)
    if heads:
        with pytest.raises(ValueError, match="or student is a copy of such a model"):
            DistillationLoss(twin, tiny.llama(1), heads=True)
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


@BOTH
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
    with pytest.raises(RuntimeError, match=r"called 2 times since the last loss.*before the next"):
        attached(outputs, IDS)


@BOTH
def test_outputs_that_a_wrapper_replaced_are_those_of_the_only_call(heads: bool) -> None:
    # DistributedDataParallel clones them if it looks for unused parameters
    student, attached = _attached(heads)
    want = attached(student(input_ids=IDS), IDS)
    for ids in (IDS, OTHER):  # a prediction without labels has no loss
        with torch.no_grad():
            student(input_ids=ids)
    outputs = student(input_ids=IDS)
    torch.testing.assert_close(attached({"logits": outputs.logits.clone()}, IDS), want)


def test_the_logits_of_a_call_are_not_kept_alive() -> None:
    student, attached = _attached()
    outputs = student(input_ids=IDS)
    (last,) = attached._calls._last.values()
    assert last.call is not None
    assert last.call.logits() is outputs.logits
    del outputs
    assert last.call.logits() is None


@BOTH
def test_embeddings_of_the_student_are_refused(heads: bool) -> None:
    student, teacher = tiny.llama(0), tiny.llama(1)
    states = student.get_input_embeddings()(IDS).detach()
    with pytest.raises(ValueError, match=r"inputs_embeds must not.*pass input_ids"):
        StudentTeacherLoss(student, teacher, heads=heads)(inputs_embeds=states, labels=IDS)
    attached = DistillationLoss(student, teacher, heads=heads)
    for outputs in (
        lambda: student(inputs_embeds=states),
        lambda: student(None, None, None, None, states),
    ):
        with pytest.raises(ValueError, match="inputs_embeds must not be in the batch"):
            attached(outputs(), IDS)


def test_messages_say_why_there_is_no_loss() -> None:
    student, attached = _attached()
    outputs = student(input_ids=IDS)
    attached(outputs, IDS)
    with pytest.raises(RuntimeError, match="loss of these outputs was computed already"):
        attached(outputs, IDS)
    cache = transformers.DynamicCache(config=student.config)
    with pytest.raises(RuntimeError, match=r"called with a cache \(past_key_values or .*whole seq"):
        attached(student(input_ids=IDS, past_key_values=cache), IDS)
    with pytest.raises(RuntimeError, match="DistillationLoss is a copy"):
        deepcopy(attached)(student(input_ids=IDS), IDS)


def test_the_logits_of_a_tuple_are_found() -> None:
    # the first of a tuple is the student's own loss, if it was called with labels
    student, attached = _attached()
    want = attached(student(input_ids=IDS), IDS)
    assert attached(student(input_ids=IDS, labels=IDS, return_dict=False), IDS) == want


@BOTH
def test_positional_arguments_reach_the_teacher_by_their_names(heads: bool) -> None:
    # GPT-2's second argument is not Llama's, nor the third of PEFT's model that of its base
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_inner": 32}
    gpt = tiny.build(transformers.GPT2LMHeadModel, transformers.GPT2Config, 0, **sizes)
    mask = torch.ones_like(IDS)
    mask[:, :2] = 0
    before = [None] * (list(inspect.signature(gpt.forward).parameters).index("attention_mask") - 1)
    peft = need("peft")
    adapted = peft.get_peft_model(tiny.llama(2), peft.LoraConfig(task_type="CAUSAL_LM"))
    for student, arguments in ((gpt, (IDS, *before, mask)), (adapted, (IDS, mask, None, IDS))):
        attached = DistillationLoss(student, tiny.llama(1), heads=heads)
        want = attached(student(input_ids=IDS, attention_mask=mask), IDS)
        assert attached(student(*arguments), IDS) == want


def test_arguments_that_cannot_be_named_are_refused() -> None:
    student, attached = _attached()
    forward = student.forward
    student.forward = lambda *given: forward(*given)
    with pytest.raises(TypeError, match=r"called with 1 positional .* names 0: call it with keyw"):
        attached(student(IDS), IDS)


def test_a_loss_whose_head_is_bypassed_later() -> None:
    student = tiny.llama(0).train()
    first = DistillationLoss(student, tiny.llama(1))
    want = first(student(input_ids=IDS), IDS)
    second = DistillationLoss(student, tiny.llama(1), heads=True)
    with pytest.raises(ValueError, match=r"bypassed by another .*loss\.remove\(\)"):
        first(student(input_ids=IDS), IDS)
    second.remove()
    assert first(student(input_ids=IDS), IDS) == want


# ------------------------------------------------------------------ labels that are not shifted


def _aligned(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return a batch with shifted labels."""
    inputs, labels = tiny.split(tiny.padded(rows))
    return {**inputs, "labels": shifted(labels)}


@BOTH
@pytest.mark.parametrize("accumulate", [1, 4])
def test_shift_false_in_a_trainer(heads: bool, accumulate: int, tmp_path: Path) -> None:
    # Trainer counts labels[:, 1:] of causal models, regardless of the loss
    cut = {"gradient_accumulation_steps": accumulate, "max_steps": 2}
    changes = {**cut, "per_device_train_batch_size": 4 // accumulate}
    losses = []
    for shift, collator in ((True, tiny.padded), (False, _aligned)):
        arguments = transformers.TrainingArguments(**tiny.settings(tmp_path, **changes))
        data = {"train_dataset": tiny.ragged(8), "data_collator": collator}
        options = {"teacher": tiny.llama(1), "heads": heads, "shift": shift}
        trainer = KDTrainer(tiny.llama(0), arguments, **options, **data)
        trainer.train()
        losses.append(tiny.logged(trainer))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert len(losses[0]) == 2
