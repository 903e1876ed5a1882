"""Heads that something else changes: the loss is that of the model's logits, or refused (N-26).

Public reports (TRL#4612, unsloth#9331): if the weight of an lm_head is read
without what changes it, the loss is silently that of another model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.models import VOCABULARY, SmallLM
from torch import Tensor, nn

from fused_kd import KDLoss
from fused_kd.integrations._common.heads import bypass_head, scale_of
from fused_kd.integrations.student_teacher import StudentTeacherLoss

IDS = torch.randint(VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(0))
LABELS = torch.where(IDS % 3 == 0, -100, IDS)
Change = Callable[[nn.Linear], Any]


class _Twisted(nn.Module):
    """A parametrization that changes a weight, and has no parameters."""

    def forward(self, weight: Tensor) -> Tensor:
        return 0.5 * weight + weight.mean(0)


class _LowRank(nn.Module):
    """A parametrization that freezes a weight and adds a trained product, as adapters do."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(*s)) for s in ((VOCABULARY, 2), (2, 16)))

    def forward(self, weight: Tensor) -> Tensor:
        return weight.detach() + 0.1 * self.up @ self.down


def _parametrized(by: type[nn.Module]) -> Change:
    return lambda head: nn.utils.parametrize.register_parametrization(head, "weight", by())


def _weight_norm(head: nn.Linear) -> None:
    head = nn.utils.parametrizations.weight_norm(head)
    with torch.no_grad():
        head.parametrizations.weight.original0.mul_(2)


def _weight_norm_by_a_hook(head: nn.Linear) -> None:
    head = nn.utils.weight_norm(head)
    with torch.no_grad():
        head.weight_g.mul_(2)


def _capped(head: nn.Module, inputs: Any, logits: Tensor) -> Tensor:
    return 3 * torch.tanh(logits / 3)


def _capped_in_training(head: nn.Module, inputs: Any, logits: Tensor) -> Tensor | None:
    return 3 * torch.tanh(logits / 3) if head.training else None


def _assigned_forward(head: nn.Linear) -> None:
    forward = head.forward
    head.forward = lambda hidden: 3 * torch.tanh(forward(hidden) / 3)


#: Changes that a loss of heads includes.
RIGHT: dict[str, Change] = {
    "parametrize": _parametrized(_Twisted),
    "weight_norm": _weight_norm,
    "weight_norm by a hook": _weight_norm_by_a_hook,
    "forward_pre_hook": lambda head: head.register_forward_pre_hook(
        lambda module, inputs: (2 * torch.tanh(inputs[0]),)
    ),
}
#: Changes that a loss of heads refuses, and what the message calls them.
REFUSED: dict[str, tuple[Change, str]] = {
    "cap": (lambda head: head.register_forward_hook(_capped), "register_forward_hook"),
    "cap in training": (
        lambda head: head.register_forward_hook(_capped_in_training),
        "register_forward_hook",
    ),
    "gradient": (
        lambda head: head.register_full_backward_pre_hook(lambda module, by: (2 * by[0],)),
        "register_full_backward_pre_hook",
    ),
    "gradients": (
        lambda head: head.register_full_backward_hook(lambda module, by, to: None),
        "register_full_backward_hook",
    ),
    "forward": (_assigned_forward, "an assigned forward method"),
}


def _outcome(model: StudentTeacherLoss) -> tuple[Tensor, ...]:
    model.train()
    loss = model(input_ids=IDS, labels=LABELS)
    trained = list(model.student.parameters())
    return loss.detach(), *(
        torch.zeros(()) if g is None else g
        for g in torch.autograd.grad(loss, trained, allow_unused=True)
    )


def _changed(heads: bool, which: str, change: Change) -> StudentTeacherLoss:
    torch.manual_seed(0)
    student, teacher = SmallLM(0), SmallLM(1, hidden=16)
    if which != "student, late":
        change({"student": student, "teacher": teacher}[which].lm_head)
    model = StudentTeacherLoss(student, teacher, KDLoss(), heads=heads)
    if which == "student, late":
        change(student.lm_head)
    return model


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("change", RIGHT)
@pytest.mark.parametrize("which", ["student", "teacher", "student, late"])
def test_a_changed_weight_is_used(which: str, change: str) -> None:
    want, got = (_outcome(_changed(heads, which, RIGHT[change])) for heads in (False, True))
    plain = _outcome(_changed(True, which, lambda head: None))
    assert (got[0] - plain[0]).abs() > 1e-4
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_a_parametrization_is_trained() -> None:
    # As an adapter of low rank is: its parameters get the gradients, the frozen weight none.
    want, got = (
        _outcome(_changed(heads, "student", _parametrized(_LowRank))) for heads in (False, True)
    )
    shapes = ((VOCABULARY, 2), (2, 16))
    adapter = [pair for pair in zip(got, want, strict=True) if pair[0].shape in shapes]
    assert len(adapter) == 2
    for mine, theirs in adapter:
        assert mine.norm() > 1e-3
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_an_adapter_of_a_tied_embedding_is_not_the_heads() -> None:
    # As with PEFT: the embedding is adapted, the head multiplies by the shared weight alone.
    outcomes = []
    for heads in (False, True):
        torch.manual_seed(0)
        student = SmallLM(0, tied=True)
        nn.utils.parametrize.register_parametrization(student.embed, "weight", _LowRank())
        model = StudentTeacherLoss(student, SmallLM(1), KDLoss(), heads=heads)
        outcomes.append(_outcome(model))
    for theirs, mine in zip(*outcomes, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    up = next(gradient for gradient in outcomes[1] if gradient.shape == (VOCABULARY, 2))
    assert up.norm() > 1e-4


@pytest.mark.parametrize("change", REFUSED)
@pytest.mark.parametrize("which", ["student", "teacher", "student, late"])
def test_a_changed_output_is_refused(which: str, change: str) -> None:
    register, name = REFUSED[change]
    with pytest.raises(TypeError, match=f"of SmallLM must .*got {name}: remove it.*heads=False"):
        _outcome(_changed(True, which, register))
    _outcome(_changed(False, which, register))  # the logits are the model's own


def test_what_leaves_a_head_out_is_no_change() -> None:
    model = SmallLM(0)
    undo = bypass_head(model)
    assert scale_of(model) == 1.0
    undo()
    model.lm_head._hf_hook = object()  # accelerate's, which assigns a forward to move tensors
    _assigned_forward(model.lm_head)
    bypass_head(model)
