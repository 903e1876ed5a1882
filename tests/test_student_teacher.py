"""Student, teacher and loss in one module: what it gives, keeps, saves and refuses."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.losses import refused
from support.models import VOCABULARY, SmallLM
from torch import Tensor, nn

from fused_kd import KDLoss, KDLossParts
from fused_kd.integrations.student_teacher import StudentTeacherLoss

LOSS = KDLoss(temperature=2.0)
IDS = torch.randint(VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(0))
LABELS = torch.where(IDS % 3 == 0, -100, IDS)


def _distilled(loss: Any = None, heads: bool = False) -> StudentTeacherLoss:
    return StudentTeacherLoss(SmallLM(0), SmallLM(1, hidden=24), loss, heads=heads)


@pytest.mark.parametrize("heads", [False, True])
def test_it_is_the_loss_of_the_logits_and_the_shifted_labels(heads: bool) -> None:
    model, widths = _distilled(LOSS, heads), set()
    for m in (model.student, model.teacher):
        m.register_forward_hook(lambda m, _, output: widths.add(output.logits.shape[-1]))
    got = model(input_ids=IDS, labels=LABELS)
    assert widths == ({16, 24} if heads else {VOCABULARY})
    student, teacher = (m(IDS).logits for m in (model.student, model.teacher))
    targets = torch.cat([LABELS[:, 1:], torch.full((3, 1), -100)], 1)
    want = LOSS(student, teacher, targets)
    torch.testing.assert_close(got, want)
    count = (targets != -100).sum()
    torch.testing.assert_close(model(LABELS, input_ids=IDS, num_items=2 * count), want / 2)
    weights = list(model.student.parameters())
    gradients = (torch.autograd.grad(x, weights) for x in (got, want))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_parts_if_the_loss_gives_them() -> None:
    plain = _distilled()
    parts = _distilled(KDLoss(return_parts=True))(input_ids=IDS, labels=LABELS)
    assert isinstance(parts, KDLossParts)
    assert torch.equal(parts.loss, plain(input_ids=IDS, labels=LABELS))
    assert torch.equal(plain.parts(input_ids=IDS, labels=LABELS).soft, parts.soft)


def test_the_teacher_stays_in_evaluation_mode_and_frozen() -> None:
    teacher = SmallLM(1).train()
    model = StudentTeacherLoss(SmallLM(0), teacher).train()
    assert model.student.norm.training
    assert not teacher.norm.training
    assert not any(p.requires_grad for p in teacher.parameters())
    model.eval()
    assert not model.student.norm.training


@pytest.mark.parametrize("prefix", ["", "wrapped."])
def test_the_teacher_is_in_no_state_dict_and_not_missed(prefix: str) -> None:
    first, second = _distilled(), StudentTeacherLoss(SmallLM(2), SmallLM(3, hidden=24))
    outer = [nn.ModuleDict({"wrapped": m}) if prefix else m for m in (first, second)]
    kept = outer[0].state_dict()
    assert kept.keys() == {f"{prefix}student.{name}" for name in first.student.state_dict()}
    outer[1].load_state_dict(kept)  # strict
    for a, b in zip(first.student.parameters(), second.student.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.teacher.embed.weight, second.teacher.embed.weight)
    del kept[f"{prefix}student.norm.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*student\.norm\.weight"):
        outer[1].load_state_dict(kept)


def test_it_is_copied_and_pickled() -> None:
    model = _distilled(LOSS, heads=True)
    want = model(input_ids=IDS, labels=LABELS)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(input_ids=IDS, labels=LABELS), want)
        assert not any(name.startswith("teacher") for name in twin.state_dict())


class _Plain(nn.Module):
    """A model that returns its logits and has no get_output_embeddings."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.inner = SmallLM(seed)

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.inner(input_ids).logits
        return logits


def test_a_plain_module_has_logits_alone() -> None:
    got = StudentTeacherLoss(_Plain(0), _Plain(1))(input_ids=IDS, labels=LABELS)
    want = StudentTeacherLoss(SmallLM(0), SmallLM(1))(input_ids=IDS, labels=LABELS)
    assert torch.equal(got, want)
    message = r"must be a plain nn.Linear for a Head; got none"
    refused(TypeError, message, StudentTeacherLoss, _Plain(0), _Plain(1), heads=True)


def test_bad_input() -> None:
    student, teacher = SmallLM(0), SmallLM(1)
    make = partial(StudentTeacherLoss, student)
    refused(TypeError, r"teacher must be a torch\.nn\.Module; got str", make, "teacher")
    refused(ValueError, r"also the student's: copy\.deepcopy the teacher", make, student)
    refused(TypeError, "loss must be a KDLoss; got KLDivLoss", make, teacher, nn.KLDivLoss())
    for heads, options, message in (
        (False, {"ignore_index": 0}, r"ignore_index=-100.*got 0"),
        (True, {"inplace": True}, "not have inplace with heads=True; got True"),
        (False, {"chunk_rows": 4}, "not have chunk_rows with heads=False; got 4"),
    ):
        refused(ValueError, message, make, teacher, KDLoss(**options), heads=heads)
    model = make(teacher)
    message = "labels must be in the batch, since they say"
    refused(ValueError, message, model, input_ids=IDS, labels=None)
    rounded, message = torch.tensor(257.0).bfloat16(), r"rounded to 16 bits; got .*bfloat16: FSDP2"
    refused(TypeError, message, model, input_ids=IDS, labels=LABELS, num_items=rounded)
    teacher.forward = lambda input_ids: SimpleNamespace(loss=1.0)  # type: ignore[assignment]
    message = "with the attribute logits; got SimpleNamespace"
    refused(TypeError, message, model, input_ids=IDS, labels=LABELS)
