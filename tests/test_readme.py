"""The README's code does what it says."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fused_kd import kd_loss

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
ROWS, LENGTH, VOCABULARY = 2, 6, 30


def batch() -> dict[str, Tensor]:
    """One row with a prompt of two tokens, one with two tokens of padding at the end."""
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH))
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[1, -2:] = 0
    labels[0, :2] = labels[1, -2:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def trained_on() -> Tensor:
    """Positions whose next token is neither prompt nor padding, (ROWS, LENGTH)."""
    kept = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    kept[:, -1] = False
    kept[0, 0] = False
    kept[1, -3:] = False
    return kept


def test_the_swap_in_equals_its_equivalent() -> None:
    swap_in, equivalent, _ = BLOCKS
    logits = torch.randn(ROWS, LENGTH, VOCABULARY, requires_grad=True)
    teacher_logits = 3 * torch.randn(ROWS, LENGTH, VOCABULARY).cos()
    names: dict[str, Any] = {
        "batch": batch(),
        "teacher": lambda input_ids, attention_mask: SimpleNamespace(logits=teacher_logits),
        "student": lambda input_ids, attention_mask: SimpleNamespace(logits=logits),
    }
    exec(swap_in, names)
    loss, gradient = names["loss"], logits.grad
    assert gradient is not None
    exec(equivalent, names)
    want = names["loss"]
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(gradient, torch.autograd.grad(want, logits)[0])
    assert torch.equal(gradient.abs().sum(-1) > 0, trained_on())


def test_heads_give_the_loss_of_logits() -> None:
    def model(hidden: int) -> SimpleNamespace:
        states = torch.randn(ROWS, LENGTH, hidden, requires_grad=hidden == 8)
        return SimpleNamespace(
            model=lambda input_ids, attention_mask: SimpleNamespace(last_hidden_state=states),
            lm_head=torch.nn.Linear(hidden, VOCABULARY, bias=False),
        )

    student, teacher = model(8), model(12)
    names: dict[str, Any] = {"batch": batch(), "teacher": teacher, "student": student}
    exec(BLOCKS[2], names)
    hidden = [m.model(None, None).last_hidden_state for m in (student, teacher)]
    logits = [m.lm_head(h) for m, h in zip((student, teacher), hidden, strict=True)]
    want = kd_loss(logits[0], logits[1].detach(), names["labels"], temperature=2.0)
    assert isinstance(want, Tensor)
    torch.testing.assert_close(names["loss"], want)
    (gradient,) = torch.autograd.grad(want, student.lm_head.weight)
    torch.testing.assert_close(student.lm_head.weight.grad, gradient)
    assert torch.equal(hidden[0].grad.abs().sum(-1) > 0, trained_on())


def test_a_batch_without_labels_trains_on_all_but_padding() -> None:
    (instead,) = re.findall(r"A batch without labels: `(.*)` in", README)
    given = batch()
    labels = eval(instead, {"batch": given})
    assert torch.equal(labels == -100, given["attention_mask"] == 0)
    assert torch.equal(labels[labels != -100], given["input_ids"][labels != -100])
