"""A default device changes nothing: the loss computes where its tensors are."""

from __future__ import annotations

import pytest
import torch
from support.logits import V

from fused_kd import Head, kd_loss

SIDES = {
    "logits": lambda x, weight: x @ weight.t(),
    "head": Head,
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("student", SIDES)
@pytest.mark.parametrize("teacher", SIDES)
def test_a_default_device_changes_nothing(student: str, teacher: str, compiled: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    s, t = torch.randn(2, 4, 8, generator=generator)
    w_s, w_t = torch.randn(2, V, 8, generator=generator)
    labels = torch.arange(4)
    arguments = SIDES[student](s, w_s), SIDES[teacher](t, w_t), labels
    expected = kd_loss(*arguments, temperature=2.0)

    def loss() -> torch.Tensor:
        return kd_loss(*arguments, temperature=2.0)

    run = torch.compile(loss, backend="aot_eager", fullgraph=True) if compiled else loss
    with torch.device("meta"):
        assert torch.equal(run(), expected)
