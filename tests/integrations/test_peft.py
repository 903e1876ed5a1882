"""PEFT: students and teachers with adapters, of logits and of heads."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import tiny
import torch
from needs import need
from support.losses import refused
from torch import Tensor, nn

peft = need("peft")

from fused_kd.integrations.loop import head_of  # noqa: E402
from fused_kd.integrations.student_teacher import StudentTeacherLoss  # noqa: E402
from fused_kd.integrations.transformers import DistillationLoss  # noqa: E402


def _adapted(seed: int, **changes: Any) -> nn.Module:
    """Return a model with LoRA of random weights (not 0); `changes` are keywords of LoraConfig."""
    settings = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **changes}
    model: nn.Module = peft.get_peft_model(tiny.llama(seed), peft.LoraConfig(**settings))
    for weight in model.parameters():
        if weight.requires_grad:
            nn.init.normal_(weight, std=0.1)
    return model


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("saved", [None, ["lm_head"]], ids=["adapter", "adapter and head"])
def test_logits_and_heads_train_the_same_weights(saved: list[str] | None) -> None:
    student, teacher = (_adapted(seed, modules_to_save=saved) for seed in (0, 1))
    results = []
    for heads in tiny.BOTH:
        for adapter in (StudentTeacherLoss, DistillationLoss):
            mine = deepcopy(student).train()
            attached = adapter(mine, deepcopy(teacher).eval(), heads=heads)
            value = tiny.loss_of(attached, mine, tiny.padded(tiny.ragged(4)))
            value.backward()
            results.append((value.detach(), _gradients(mine)))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-6)
    trained = [name for name in results[0][1] if "lm_head" in name]
    assert bool(trained) == bool(saved)


def test_virtual_tokens_before_the_inputs_are_named(heads: bool) -> None:
    # those of a prefix are in the cache, and have no logits
    batch = tiny.padded(tiny.ragged(2))
    length = batch["labels"].shape[1]

    def distilled(kind: Any) -> StudentTeacherLoss:
        config = kind(task_type="CAUSAL_LM", num_virtual_tokens=3)
        student = peft.get_peft_model(tiny.llama(0), config)
        return StudentTeacherLoss(student, tiny.llama(1), heads=heads)

    message = rf"student's logits .*\(2, {length}\); got rows \(2, {length + 3}\): PEFT"
    for kind in (peft.PromptTuningConfig, peft.PromptEncoderConfig):
        refused(ValueError, message, distilled(kind), **batch)
    value = distilled(peft.PrefixTuningConfig)(**batch)
    assert isinstance(value, Tensor)
    assert value.isfinite()
    batch["labels"] = nn.functional.pad(batch["labels"], (0, 1), value=-100)
    plain = StudentTeacherLoss(tiny.llama(0), tiny.llama(1))  # is not blamed on PEFT
    refused(ValueError, r"must have a row for each label.*got rows \(2, \d+\)$", plain, **batch)


def test_a_teachers_adapter_is_neither_trained_nor_random_N_28() -> None:
    teacher = _adapted(1, lora_dropout=0.5)
    model = StudentTeacherLoss(_adapted(0), teacher).train()
    before = {name: x.clone() for name, x in teacher.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    batch = tiny.padded(tiny.ragged(4))
    assert torch.equal(*(teacher(batch["input_ids"]).logits for _ in range(2)))
    for _ in range(2):
        tiny.loss_of(model, model.student, batch).backward()
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
    message = rf"plain nn\.Linear for a Head; got a peft\..*{kind}.*heads=False"
    pair = _adapted(0, **changes), tiny.llama(1)
    refused(TypeError, message, StudentTeacherLoss, *pair, heads=True)
    StudentTeacherLoss(*pair)


def test_a_hook_on_peft_s_wrapper_is_refused() -> None:
    student = _adapted(0, modules_to_save=["lm_head"])
    model = StudentTeacherLoss(student, tiny.llama(1), heads=True)
    student.get_output_embeddings().register_forward_hook(lambda module, inputs, output: 2 * output)
    message = "got register_forward_hook: remove it"
    refused(TypeError, message, model, **tiny.padded(tiny.ragged(2)))
