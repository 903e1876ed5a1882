"""The README's code does what it says."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
ROWS, LENGTH, VOCABULARY = 2, 6, 70


def batch() -> dict[str, Tensor]:
    """Return a row with a prompt of two tokens, and one with two tokens of padding at the end."""
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH))
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[1, -2:] = 0
    labels[0, :2] = labels[1, -2:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def trained_on() -> Tensor:
    """Return True for positions whose next token is neither prompt nor padding, (ROWS, LENGTH)."""
    kept = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    kept[:, -1] = False
    kept[0, 0] = False
    kept[1, -3:] = False
    return kept


def test_the_loss_of_logits_equals_its_equivalent() -> None:
    example, from_logits, equivalent, *_ = BLOCKS
    logits = torch.randn(ROWS, LENGTH, VOCABULARY, requires_grad=True)
    teacher_logits = 3 * torch.randn(ROWS, LENGTH, VOCABULARY).cos()
    names: dict[str, Any] = {
        "batch": batch(),
        "teacher": lambda input_ids, attention_mask: SimpleNamespace(logits=teacher_logits),
        "student": lambda input_ids, attention_mask: SimpleNamespace(logits=logits),
    }
    exec(from_logits + example, names)
    loss, gradient = names["loss"], logits.grad
    assert gradient is not None
    exec(equivalent, names)
    want = names["loss"]
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(gradient, torch.autograd.grad(want, logits)[0])
    assert torch.equal(gradient.abs().sum(-1) > 0, trained_on())


class Model(torch.nn.Module):
    """A language model: random hidden states, and an lm_head."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.states = torch.randn(ROWS, LENGTH, hidden, requires_grad=hidden == 8)
        self.lm_head = torch.nn.Linear(hidden, VOCABULARY, bias=False)

    def model(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.states)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.lm_head(self.states))


def test_heads_give_the_loss_of_logits() -> None:
    student, teacher = Model(8), Model(12)
    leaves = student.states, student.lm_head.weight
    names: dict[str, Any] = {"batch": batch(), "teacher": teacher, "student": student}
    outcomes = []
    for block in (BLOCKS[1] + BLOCKS[0], BLOCKS[3]):
        exec(block, names)
        outcomes.append((names["loss"], *(leaf.grad for leaf in leaves)))
        for leaf in leaves:
            leaf.grad = None
    from_logits, from_heads = outcomes
    torch.testing.assert_close(from_heads, from_logits)
    assert torch.equal(from_heads[1].abs().sum(-1) > 0, trained_on())


def test_a_top_k_teacher_is_below_the_dense_one() -> None:
    student, teacher = Model(8), Model(12)
    names: dict[str, Any] = {"batch": batch(), "teacher": teacher, "student": student}
    exec(BLOCKS[1] + BLOCKS[0], names)
    dense = names["loss"]
    exec(BLOCKS[1] + BLOCKS[4], names)
    assert names["topk"].token_ids.shape == (ROWS, LENGTH, 64)
    assert 0 < names["loss"] < dense
    names["loss"].backward()


def test_a_batch_without_labels_trains_on_all_but_padding() -> None:
    (instead,) = re.findall(r"If the batch has no labels, `(.*)`", README)
    tokens = batch()
    labels = eval(instead, {"batch": tokens})
    assert torch.equal(labels == -100, tokens["attention_mask"] == 0)
    assert torch.equal(labels[labels != -100], tokens["input_ids"][labels != -100])
