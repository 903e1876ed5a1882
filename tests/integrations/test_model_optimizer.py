"""modelopt trains as before with fused_kd's losses as criterion; they give modelopt's numbers."""

from __future__ import annotations

import itertools
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch._dynamo.testing
from needs import need
from support.losses import outcome, refused
from torch import Tensor, nn

need("modelopt")
import modelopt.torch.distill as mtd  # noqa: E402
from modelopt.torch.distill.losses import LogitsDistillationLoss as TheirLogits  # noqa: E402
from modelopt.torch.distill.losses import MFTLoss as TheirMFT  # noqa: E402

from fused_kd.integrations.model_optimizer import LogitsDistillationLoss, MFTLoss  # noqa: E402

V = tiny.VOCABULARY
HEADS = ("lm_head", "lm_head")
REDUCTIONS = ["mean", "batchmean", "sum"]


def converted(loss: nn.Module, layers: tuple[str, str] = HEADS, weight: float = 1.0) -> Any:
    """Return a student, always with the same weights, that modelopt distils with `loss`.

    layers: the student's and the teacher's, whose outputs it takes; weight: of the loss.
    """
    config = {"teacher_model": tiny.llama(seed=2, hidden=24), "criterion": {layers: loss}}
    config["loss_balancer"] = mtd.StaticLossBalancer(weight)
    return mtd.convert(tiny.llama(seed=1), mode=[("kd_loss", config)])


def trained(model: Any, rate: float, *inputs: str) -> tuple[list[float], list[Tensor]]:
    """Train four steps with these `inputs` of compute_kd_loss; return losses and final weights."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    rows, losses = tiny.ragged(), []
    before = deepcopy(list(model.parameters()))
    model.train()
    for step in range(4):
        batch = tiny.padded(rows[4 * step : 4 * step + 4])
        own, kept = model(**batch).loss, batch["labels"] != -100
        keywords: dict[str, Any] = {
            "student_loss": own,
            "labels": batch["labels"].clamp_min(0).flatten(),
            "loss_reduction_fn": lambda loss, kept=kept: loss[kept].mean(),
        }
        loss = model.compute_kd_loss(**{name: keywords[name] for name in inputs})
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    weights = [p.detach() for p in model.parameters()]
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(before, weights, strict=True))
    return losses, weights


def same(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------ training


LOGITS, MFT = (LogitsDistillationLoss, TheirLogits), (MFTLoss, TheirMFT)
RATES = ("mean", 1.0, 5.0), ("batchmean", 1.0, 0.005), ("sum", 1.0, 0.001)
IN_PLACE = partial(LogitsDistillationLoss, inplace=True), TheirLogits
#: Both classes, their second argument, the loss's weight, learning rate, `inputs` of `trained`.
TRAININGS: list[tuple[Any, ...]] = [
    *((kinds, *case) for kinds in (LOGITS, IN_PLACE) for case in RATES),
    (LOGITS, "none", 1.0, 0.3, "loss_reduction_fn"),
    (LOGITS, "batchmean", 0.5, 0.005, "student_loss"),
    (MFT, 0.3, 1.0, 0.3, "labels"),
]


@pytest.mark.parametrize("case", TRAININGS)
def test_training(case: tuple[Any, ...]) -> None:
    kinds, option, weight, rate, *inputs = case
    runs = (trained(converted(x(2.0, option), weight=weight), rate, *inputs) for x in kinds)
    same(*runs)


class Logits(nn.Module):
    """A model that returns a tensor: modelopt then needs no names of layers."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.model = tiny.llama(seed)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids).logits
        return logits


def test_a_criterion_without_layers() -> None:
    losses = []
    for criterion in (LogitsDistillationLoss(), TheirLogits()):
        config = {"teacher_model": Logits(2), "criterion": criterion}
        model = mtd.convert(Logits(1), mode=[("kd_loss", config)])
        model.train()
        model(torch.arange(12).view(2, 6))
        losses.append(model.compute_kd_loss())
        assert mtd.export(model).state_dict().keys() == Logits(1).state_dict().keys()
    same(*losses)


def test_the_trainer_of_the_plugin(tmp_path: Path) -> None:
    from modelopt.torch.distill.plugins.huggingface import KDTrainer
    from transformers import TrainingArguments

    losses = []
    for criterion in (None, LogitsDistillationLoss(2.0, "none")):
        settings = TrainingArguments(**tiny.settings(tmp_path))
        options = {"teacher_model": tiny.llama(seed=2), "temperature": 2.0}
        data = {"train_dataset": tiny.ragged(), "data_collator": tiny.padded}
        trainer = KDTrainer(tiny.llama(seed=1), settings, **data, distill_args=options)
        if criterion is not None:
            trainer._kd_criterion = criterion
        trainer.train()
        losses.append(tiny.logged(trainer))
    same(*losses)


# ------------------------------------------------------------------------------ the losses alone


@pytest.mark.parametrize("reduction", [*REDUCTIONS, "none"])
@pytest.mark.parametrize("shape", [(6, V), (2, 5, V), (V,)])
def test_same_numbers(shape: tuple[int, ...], reduction: str) -> None:
    # of logits (V,) the first dimension, by which "batchmean" divides, is V
    student, teacher = torch.randn(shape), torch.randn(shape)
    for temperature in (1.0, 0.7, 4.0):
        theirs = outcome(TheirLogits(temperature, reduction), [student], teacher)
        ours = outcome(LogitsDistillationLoss(temperature, reduction), [student], teacher)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_changed_reduction_counts() -> None:
    student, teacher = torch.randn(6, V), torch.randn(6, V)
    loss = LogitsDistillationLoss(2.0, "none")
    for reduction in (*REDUCTIONS, "none"):
        loss.reduction = reduction
        want = LogitsDistillationLoss(2.0, reduction)(student, teacher)
        assert torch.equal(loss(student, teacher), want)


def test_mft_is_compiled_for_two_lengths_not_for_each() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    loss = MFTLoss(2.0)
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for rows in (70, 150, 230, 300):
        tensors = (torch.randn(rows, V), torch.randn(rows, V), torch.randint(V, (rows,)))
        torch.testing.assert_close(compiled(*tensors), loss(*tensors))
    assert counter.frame_count == 2


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.9, 1.0])
def test_same_numbers_of_mft(threshold: float, reduction: str) -> None:
    rows = 150  # more than are corrected at a time
    student = torch.randn(rows, V, dtype=torch.float64)
    teacher = 2 * torch.randn(rows, V, dtype=torch.float64)
    labels = torch.where(torch.arange(rows) % 3 == 0, torch.randint(V, (rows,)), teacher.argmax(-1))
    teacher[1, labels[1]] += 20  # more confident than the threshold requires
    for temperature in (1.0, 2.0):
        theirs = outcome(TheirMFT(temperature, threshold, reduction), [student], teacher, labels)
        ours = outcome(MFTLoss(temperature, threshold, reduction), [student], teacher, labels)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_mft_of_16_bit_logits() -> None:
    # as if they were float64: the corrected logits are not rounded to 16 bits
    sides = [(scale * torch.randn(2, 7, V)).bfloat16() for scale in (1, 2)]
    labels = torch.randint(V, (2, 7))
    exact = MFTLoss()(*(x.double() for x in sides), labels)
    torch.testing.assert_close(MFTLoss()(*sides, labels).double(), exact, rtol=1e-5, atol=0)


def test_mft_without_the_rows_that_do_not_count() -> None:
    student, teacher = torch.randn(5, V), torch.randn(5, V)
    labels = torch.tensor([3, -100, 5, -100, 7])
    kept = labels >= 0
    for reduction in REDUCTIONS:
        loss = MFTLoss(reduction=reduction)
        torch.testing.assert_close(
            loss(student, teacher, labels), loss(student[kept], teacher[kept], labels[kept])
        )


# ------------------------------------------------------------------------------ bad input


def test_bad_input() -> None:
    logits, labels = torch.randn(4, V), torch.arange(4)
    for call, message in (
        (partial(LogitsDistillationLoss, reduction="median"), "reduction must be one of"),
        (partial(LogitsDistillationLoss, temperature=0.0), "temperature must be positive"),
        (partial(LogitsDistillationLoss, reduction="none", inplace=True), "inplace=True needs"),
        (partial(MFTLoss, reduction="none"), "reduction must be one of"),
        (partial(MFTLoss, threshold=1.5), r"threshold must be in \[0, 1\]; got 1\.5"),
        (partial(MFTLoss, threshold="a"), "threshold must be a Python number; got str"),
        (partial(MFTLoss(), logits, logits, labels + V), rf"labels must be in \[0, {V}\)"),
        (partial(MFTLoss(), logits, logits, labels[:3]), "labels must have the leading shape"),
        (partial(MFTLoss(), logits, logits, None), r"labels must be a torch\.Tensor; got NoneType"),
        (partial(MFTLoss(), logits, logits[:, :-1], labels), "same vocabulary size"),
        (partial(MFTLoss(), {}, logits, labels), r"logits_s must be a torch\.Tensor; got dict"),
        (partial(LogitsDistillationLoss(), {}, logits), r"logits_s must be a .*; got dict"),
        (partial(LogitsDistillationLoss(), logits, logits[:, :-1]), "same vocabulary size"),
    ):
        refused((TypeError, ValueError), message, call)


def test_shown_and_kept() -> None:
    for loss, theirs in ((LogitsDistillationLoss, TheirLogits), (MFTLoss, TheirMFT)):
        assert loss.__name__ == theirs.__name__  # modelopt's names of the parts
        assert not loss().state_dict()
        assert "temperature=3.0" in repr(deepcopy(loss(temperature=3.0)))
        both = itertools.zip_longest(loss().named_parameters(), theirs().named_parameters())
        assert not list(both)
