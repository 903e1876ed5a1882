"""The README's code does what it says."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn import functional as F

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_swap_in_equals_its_equivalent() -> None:
    swap_in, equivalent = BLOCKS
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
