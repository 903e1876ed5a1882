"""TRL's trainers train and log as before with fused_kd's loss; other trainers are unchanged."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from needs import need
from support.losses import refused
from torch import nn
from trl_training import (
    BETAS,
    KINDS,
    conversations,
    models,
    same,
    settings,
    tokenizer,
    trained,
    trainer_of,
)

need("trl")
from trl import SFTConfig, SFTTrainer  # noqa: E402
from trl.trainer import distillation_trainer  # noqa: E402

from fused_kd import KDLoss  # noqa: E402
from fused_kd.integrations.transformers import ConvergenceCallback  # noqa: E402
from fused_kd.integrations.trl import restore, use_fused_kd  # noqa: E402
from fused_kd.objectives import ConvergenceMonitor, HeldOut, evaluate  # noqa: E402

HEADS = {"gkd": (False, True), "distillation": (True,)}
WAYS = [(kind, heads) for kind in KINDS for heads in HEADS[kind]]
EACH = pytest.mark.parametrize(("kind", "heads"), WAYS)
#: By kind: the module or class that has TRL's own loss, and the loss's name there.
OWN: dict[str, tuple[Any, str]] = {
    "gkd": (KINDS["gkd"][0], "generalized_jsd_loss"),
    "distillation": (distillation_trainer, "_chunked_divergence_loss"),
}
CUT = {"gradient_accumulation_steps": 4}
SCALED = ("Granite", {"logits_scaling": 3.0}), ("Cohere", {"logit_scale": 0.3})
CASES: list[tuple[str, dict[str, Any]]] = [
    *((kind, {"beta": beta}) for kind in KINDS for beta in BETAS),
    *(("gkd", {"beta": beta, **CUT}) for beta in (0.0, 0.1)),
    *(("distillation", {"beta": beta, **CUT}) for beta in (0.5, 1.0)),
    ("gkd", {"lmbda": 1.0, "max_steps": 2}),  # the student's own completions
    *((kind, {"family": x, "changes": y, "temperature": 0.8}) for kind in KINDS for x, y in SCALED),
]


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_training(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    make = partial(trainer_of, kind, tmp_path, **options)
    theirs = trained(make())
    for heads in HEADS[kind]:
        in_place = not heads and CUT.items() <= options.items()
        same(trained(use_fused_kd(make(), heads=heads, inplace=in_place)), theirs)


@EACH
def test_mixed_precision_and_checkpointing(tmp_path: Path, kind: str, heads: bool) -> None:
    make = partial(trainer_of, kind, tmp_path, bf16=True, gradient_checkpointing=True)
    losses = trained(use_fused_kd(make(), heads=heads))[0], trained(make())[0]
    torch.testing.assert_close(*losses, rtol=0.01, atol=0)  # logits rounded to bfloat16


@EACH
def test_evaluation_N_30(tmp_path: Path, kind: str, heads: bool) -> None:
    trainers = use_fused_kd(trainer_of(kind, tmp_path), heads=heads), trainer_of(kind, tmp_path)
    scores: list[dict[str, float]] = []
    for trainer in trainers:
        torch.manual_seed(0)
        scores.append(trainer.evaluate())
    for name in {"eval_loss", "eval_entropy"} & scores[1].keys():
        assert scores[0][name] == pytest.approx(scores[1][name], rel=1e-5)
    if kind == "gkd":  # requested logits are logits in any case
        data = conversations(2)
        torch.testing.assert_close(*(trainer.predict(data).predictions for trainer in trainers))


@EACH
def test_only_this_trainer(
    tmp_path: Path, kind: str, heads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    owners = OWN[kind][0], KINDS[kind][0]
    in_trl = [dict(vars(owner)) for owner in owners]
    make = partial(trainer_of, kind, tmp_path, max_steps=1)
    trainer, other = make(), make()
    before = set(vars(other))
    assert use_fused_kd(use_fused_kd(trainer, heads=heads), heads=heads) is trainer
    added = vars(trainer).keys() - before
    assert added
    assert [dict(vars(owner)) for owner in owners] == in_trl
    assert vars(other).keys() == before

    def never(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("TRL's own loss")

    with monkeypatch.context() as broken:
        owner, name = OWN[kind]
        broken.setattr(owner, name, staticmethod(never) if isinstance(owner, type) else never)
        refused(AssertionError, "own loss", other.train)
        trained(trainer)
    assert restore(trainer) is trainer
    assert not added & vars(trainer).keys()
    same(trained(restore(use_fused_kd(make(), heads=heads))), trained(make()))


@EACH
def test_convergence(tmp_path: Path, kind: str, heads: bool) -> None:
    # a rate of 0: the second whole window has converged; TRL's own logs are as without it
    often = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.0}
    make = partial(trainer_of, kind, tmp_path, **often)
    trainer, plain = use_fused_kd(make(), heads=heads), make(max_steps=4)
    monitor, loss = ConvergenceMonitor(0.01, 0.01, window=3), KDLoss(hard_weight=0.1)
    held_out = [tiny.padded(tiny.ragged(4))]

    def measure() -> HeldOut:
        return evaluate(loss, trainer.model, trainer.teacher_model, held_out)

    callback = ConvergenceCallback(trainer, monitor, measure)
    trainer.add_callback(callback)
    for each in (trainer, plain):
        torch.manual_seed(0)
        each.train()
    assert trainer.state.global_step == 4
    assert tiny.logged(trainer, "convergence") == [*["undecided"] * 3, "converged"]
    logs = [line for line in trainer.state.log_history if "convergence" not in line]
    assert [line.keys() for line in logs] == [line.keys() for line in plain.state.log_history]


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_trainers_and_options(tmp_path: Path, kind: str) -> None:
    trainer = trainer_of(kind, tmp_path)
    before = set(vars(trainer))
    bad = {"heads": True, "memory_budget": 0}
    refused(ValueError, "memory_budget must be at least 1", use_fused_kd, trainer, **bad)
    trainer.teacher_model = None
    refused(TypeError, "must have a teacher_model", use_fused_kd, trainer)
    assert set(vars(trainer)) == before


def test_other_trainers(tmp_path: Path) -> None:
    data = {"train_dataset": conversations(), "processing_class": tokenizer()}
    other = SFTTrainer(models()[0], SFTConfig(**settings(tmp_path)), **data)
    for trainer in (other, nn.Linear(1, 1), None):
        refused(TypeError, "must be a GKDTrainer or a Distillation", use_fused_kd, trainer)
