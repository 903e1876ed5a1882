"""The README's code does what it says."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn import functional as F

from fused_kd import kd_loss

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_swap_in_equals_its_equivalent() -> None:
    swap_in, equivalent, _ = BLOCKS
    logits = torch.randn(2, 5, 30, requires_grad=True)
    names: dict[str, object] = {
        "torch": torch,
        "F": F,
        "input_ids": torch.randint(30, (2, 5)),
        "teacher": lambda ids: SimpleNamespace(logits=torch.randn(2, 5, 30).cos() * 3),
        "student": lambda ids: SimpleNamespace(logits=logits),
    }
    exec(swap_in, names)
    loss, gradient = names["loss"], logits.grad
    exec(equivalent, names)
    want = names["loss"]
    assert isinstance(loss, torch.Tensor)
    assert isinstance(want, torch.Tensor)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(gradient, torch.autograd.grad(want, logits)[0])


def test_the_linear_level_equals_the_logits_level() -> None:
    draw = torch.Generator().manual_seed(0)

    def model(hidden: int) -> SimpleNamespace:
        states = torch.randn(2, 5, hidden, generator=draw, requires_grad=hidden == 8)
        head = torch.nn.Linear(hidden, 30, bias=False)
        return SimpleNamespace(
            model=lambda ids: SimpleNamespace(last_hidden_state=states), lm_head=head
        )

    student, teacher = model(8), model(12)
    names: dict[str, object] = {
        "torch": torch,
        "F": F,
        "input_ids": torch.randint(30, (2, 5), generator=draw),
        "teacher": teacher,
        "student": student,
    }
    exec(BLOCKS[2], names)
    logits = [m.lm_head(m.model(None).last_hidden_state) for m in (student, teacher)]
    labels = names["labels"]
    assert isinstance(labels, torch.Tensor)
    want = kd_loss(logits[0], logits[1].detach(), labels, temperature=2.0)
    assert isinstance(want, torch.Tensor)
    torch.testing.assert_close(names["loss"], want)
    (gradient,) = torch.autograd.grad(want, student.lm_head.weight)
    torch.testing.assert_close(student.lm_head.weight.grad, gradient)
