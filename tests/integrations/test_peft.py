"""PEFT: students and teachers with adapters, of logits and of heads."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import tiny
import torch
from needs import need
from torch import Tensor, nn

transformers = need("transformers")
peft = need("peft")

from fused_kd import KDLoss  # noqa: E402
from fused_kd.integrations.loop import head_of  # noqa: E402
from fused_kd.integrations.student_teacher import StudentTeacherLoss  # noqa: E402
from fused_kd.integrations.transformers import DistillationLoss  # noqa: E402


def _adapted(seed: int, **changes: Any) -> nn.Module:
    """Return a model with LoRA on its attention, whose weights are not 0."""
    settings = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **changes}
    made: nn.Module = peft.get_peft_model(tiny.llama(seed), peft.LoraConfig(**settings))
    with torch.no_grad():
        for weight in made.parameters():
            if weight.requires_grad:
                weight.normal_(std=0.1)
    return made


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("saved", [None, ["lm_head"]], ids=["adapter", "adapter and head"])
def test_logits_and_heads_train_the_same_weights(saved: list[str] | None) -> None:
    student, teacher = (_adapted(seed, modules_to_save=saved) for seed in (0, 1))
    batch = tiny.padded(tiny.ragged(4))
    found = []
    for heads in tiny.BOTH:
        for adapter in (StudentTeacherLoss, DistillationLoss):
            mine = deepcopy(student).train()
            attached = adapter(mine, deepcopy(teacher).eval(), heads=heads)
            inputs, labels = tiny.split(batch)
            if isinstance(attached, StudentTeacherLoss):
                value = attached(**batch)
            else:
                value = attached(mine(**inputs), labels)
            value.backward()
            found.append((value.detach(), _gradients(mine)))
    for value, gradients in found[1:]:
        torch.testing.assert_close(value, found[0][0])
        torch.testing.assert_close(gradients, found[0][1], rtol=1e-4, atol=1e-6)
    trained = [name for name in found[0][1] if "lm_head" in name]
    assert bool(trained) == bool(saved)


@pytest.mark.parametrize("heads", tiny.BOTH)
def test_virtual_tokens_before_the_inputs_are_named(heads: bool) -> None:
    # those of a prefix are in the cache, and have no logits
    batch = tiny.padded(tiny.ragged(2))
    rows = tuple(batch["labels"].shape)

    def tuned(kind: Any) -> nn.Module:
        config = kind(task_type="CAUSAL_LM", num_virtual_tokens=3)
        made: nn.Module = peft.get_peft_model(tiny.llama(0), config)
        return made

    for kind in (peft.PromptTuningConfig, peft.PromptEncoderConfig):
        message = rf"student's logits .*\(2, {rows[1]}\); got rows \(2, {rows[1] + 3}\): PEFT"
        with pytest.raises(ValueError, match=message):
            StudentTeacherLoss(tuned(kind), tiny.llama(1), heads=heads)(**batch)
    prefix = StudentTeacherLoss(tuned(peft.PrefixTuningConfig), tiny.llama(1), heads=heads)
    assert torch.isfinite(prefix(**batch))


def test_only_rows_beyond_the_labels_are_blamed_on_peft() -> None:
    batch = tiny.padded(tiny.ragged(2))
    batch["labels"] = nn.functional.pad(batch["labels"], (0, 1), value=-100)
    with pytest.raises(ValueError, match=r"must have a row for each label.*got rows \(2, \d+\)$"):
        StudentTeacherLoss(tiny.llama(0), tiny.llama(1))(**batch)


def test_a_teachers_adapter_is_neither_trained_nor_random_N_28() -> None:
    teacher = _adapted(1, lora_dropout=0.5)
    model = StudentTeacherLoss(_adapted(0), teacher).train()
    before = {name: x.clone() for name, x in teacher.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    batch = tiny.padded(tiny.ragged(4))
    ids = batch["input_ids"]
    assert torch.equal(teacher(ids).logits, teacher(ids).logits)
    for _ in range(2):
        value = model(**batch)
        assert isinstance(value, Tensor)
        value.backward()
        optimizer.step()
    assert not _gradients(teacher)
    assert all(torch.equal(x, before[name]) for name, x in teacher.state_dict().items())


def test_the_head_is_that_of_the_active_adapter() -> None:
    student = _adapted(0, modules_to_save=["lm_head"])
    wrapper = student.get_output_embeddings()
    student.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert head_of(student) is wrapper.modules_to_save["default"]
    student.set_adapter("other")
    assert head_of(student) is wrapper.original_module
    student.set_adapter("default")
    with student.disable_adapter():
        assert head_of(student) is wrapper.original_module


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, r"lora\.layer\.Linear"),
        ({"trainable_token_indices": {"lm_head": [3, 4]}}, "TrainableTokensWrapper"),
    ],
)
def test_a_head_that_is_adapted_itself_is_refused(changes: dict[str, Any], kind: str) -> None:
    with pytest.raises(TypeError, match=rf"plain nn\.Linear; found a peft\..*{kind}.*heads=False"):
        StudentTeacherLoss(_adapted(0, **changes), tiny.llama(1), heads=True)
    StudentTeacherLoss(_adapted(0, **changes), tiny.llama(1), KDLoss())


def test_a_hook_on_peft_s_wrapper_is_refused() -> None:
    student = _adapted(0, modules_to_save=["lm_head"])
    model = StudentTeacherLoss(student, tiny.llama(1), heads=True)
    student.get_output_embeddings().register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(TypeError, match="found register_forward_hook on it"):
        model(**tiny.padded(tiny.ragged(2)))
