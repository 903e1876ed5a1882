"""Callbacks that stop real trainings of Transformers and Lightning when both losses are flat."""

from __future__ import annotations

import sys
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from needs import need
from support.processes import failures
from torch import distributed as dist
from torch.utils.data import DataLoader
from transformers import TrainingArguments

pl = need("lightning").pytorch

from fused_kd import KDLoss  # noqa: E402
from fused_kd.integrations import lightning  # noqa: E402
from fused_kd.integrations.lightning import KDModule  # noqa: E402
from fused_kd.integrations.transformers import ConvergenceCallback, KDTrainer  # noqa: E402
from fused_kd.objectives import ConvergenceMonitor, HeldOut, evaluate  # noqa: E402
from fused_kd.objectives.monitor import Point  # noqa: E402

LOSS = KDLoss(temperature=2.0, hard_weight=0.3, soft_weight=0.7)
#: With a rate of 0 nothing moves: the verdict is "converged" at the second whole window.
FLAT = {"learning_rate": 0.0}
LOOKS = 4

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # few workers


def monitor_of(**settings: Any) -> ConvergenceMonitor:
    return ConvergenceMonitor(0.01, 0.01, window=LOOKS - 1, **settings)


def held_out() -> DataLoader[Any]:
    return DataLoader(tiny.ragged(6, seed=1), batch_size=4, collate_fn=tiny.padded)


def trainer_of(
    folder: Path,
    monitor: ConvergenceMonitor,
    picture: Path | None = None,
    heads: bool = False,
    **changes: Any,
) -> tuple[KDTrainer, ConvergenceCallback]:
    """Return a KDTrainer that evaluates every 2 of at most 16 steps, and its callback."""
    usual = {"max_steps": 16, "eval_strategy": "steps", "eval_steps": 2, **FLAT}
    trainer = KDTrainer(
        tiny.llama(0),
        TrainingArguments(**tiny.settings(folder, **{**usual, **changes})),
        teacher=tiny.llama(1),
        loss=deepcopy(LOSS),
        heads=heads,
        train_dataset=tiny.ragged(),
        eval_dataset=tiny.ragged(6, seed=1),
        data_collator=tiny.padded,
    )

    def measure() -> HeldOut:
        loss = trainer.compute_loss_func
        return evaluate(loss.loss, trainer.model, loss.teacher, held_out())

    callback = ConvergenceCallback(trainer, monitor, measure, picture)
    trainer.add_callback(callback)
    return trainer, callback


@pytest.mark.parametrize("heads", tiny.BOTH)
def test_transformers_stop_and_log(heads: bool, tmp_path: Path) -> None:
    trainer, callback = trainer_of(tmp_path, monitor_of(), tmp_path / "runs.svg", heads)
    trainer.train()
    assert trainer.state.global_step == 2 * LOOKS
    assert tiny.logged(trainer, "convergence") == [*["undecided"] * (LOOKS - 1), "converged"]
    for name in ("hard", "soft"):
        ours = tiny.logged(trainer, f"convergence_{name}_loss")
        theirs = tiny.logged(trainer, f"eval_{name}_loss")
        assert len(ours) == len(theirs) == LOOKS  # means over tokens, and over batches
        assert ours == pytest.approx(theirs, rel=0.1)
    assert callback.verdict is not None
    assert "converged: improved by 0 over 3 evaluations" in callback.verdict.reason
    assert (tmp_path / "runs.svg").exists()


def test_transformers_go_on_while_the_losses_move(tmp_path: Path) -> None:
    trainer, callback = trainer_of(tmp_path, monitor_of(), learning_rate=0.5)
    trainer.train()
    assert trainer.state.global_step == 16
    assert callback.verdict is not None
    assert callback.verdict.hard_interval is not None
    assert abs(callback.verdict.hard_interval.improvement) > 0.01


def test_transformers_evaluate_outside_a_training(tmp_path: Path) -> None:
    trainer, callback = trainer_of(tmp_path, monitor_of(), max_steps=4, learning_rate=0.05)
    trainer.evaluate()
    assert callback.verdict is None
    trainer.train()
    trainer.evaluate()
    assert [point.step for point in callback._watch.monitor.history] == [2, 4]


def test_transformers_evaluate_several_sets_and_keep_the_best(tmp_path: Path) -> None:
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_a_loss"}
    saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, **best}
    trainer, callback = trainer_of(tmp_path, monitor_of(), eval_on_start=True, **saving)
    trainer.eval_dataset = {name: tiny.ragged(6, seed=1) for name in "ab"}
    trainer.add_callback(transformers.EarlyStoppingCallback(early_stopping_patience=7))
    trainer.train()
    assert [point.step for point in callback._watch.monitor.history] == [0, 2, 4, 6]
    assert len(tiny.logged(trainer, "eval_b_loss")) == len(tiny.logged(trainer, "convergence")) == 4
    assert trainer.state.global_step == 6
    saved = {path.parent.name for path in tmp_path.glob("*/convergence.pt")}
    assert saved == {"checkpoint-2", "checkpoint-6"}  # the best and the last


def test_transformers_save_on_each_node(tmp_path: Path) -> None:
    trainer, callback = trainer_of(tmp_path, monitor_of(), save_on_each_node=True)
    (tmp_path / "checkpoint-5").mkdir()
    trainer.state.global_step, trainer.state.is_world_process_zero = 5, False
    callback.on_save(trainer.args, trainer.state, trainer.control)
    assert (tmp_path / "checkpoint-5" / "convergence.pt").exists()


def test_transformers_log_an_evaluation_that_is_skipped(tmp_path: Path) -> None:
    trainer, callback = trainer_of(tmp_path, monitor_of(check_finite=False), max_steps=4)
    measure, nan = callback._watch.measure, [float("nan"), 1.0]  # at the first evaluation

    def measure_or_nan() -> HeldOut:
        held_out = measure()
        assert held_out.hard is not None
        return held_out._replace(hard=held_out.hard * nan.pop(0))

    callback._watch.measure = measure_or_nan
    trainer.train()
    assert tiny.logged(trainer, "convergence") == ["undecided"] * 2
    assert len(tiny.logged(trainer, "convergence_hard_loss")) == 1


def test_transformers_resume(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 0.05}
    whole, _ = trainer_of(tmp_path / "whole", monitor_of(), **saving, max_steps=10)
    whole.train()
    cut, _ = trainer_of(tmp_path / "cut", monitor_of(), **saving, max_steps=10)
    cut.add_callback(_StopAt(6))
    cut.train()
    assert cut.state.global_step == 6
    last, callback = trainer_of(tmp_path / "cut", monitor_of(), **saving, max_steps=10)
    last.train(resume_from_checkpoint=True)
    keys = [key for key in whole.state.log_history[-1] if key.startswith("convergence")]
    for key in ("convergence", "convergence_hard_improvement", *keys):
        assert tiny.logged(last, key) == tiny.logged(whole, key)
    elsewhere, _ = trainer_of(tmp_path / "other", monitor_of(), **saving, max_steps=10)
    with pytest.raises(FileNotFoundError, match=r"convergence.pt must be there to resume at step"):
        elsewhere.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-6"))
    with pytest.raises(ValueError, match="monitor must have no evaluations of another training"):
        trainer_of(tmp_path, callback._watch.monitor)[0].train()


def _on_two_ranks(folder: Path) -> None:
    """Check that both ranks, with 4 and 3 sequences, stop at once, and resume as if not stopped."""

    def trained(rate: float, steps: int, resume: str | None = None) -> list[Point]:
        saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": steps}
        trainer, callback = trainer_of(folder, monitor_of(), learning_rate=rate, **saving)
        rows = tiny.ragged(7, seed=1)[dist.get_rank() :: 2]
        batch, loss = tiny.padded(rows), trainer.compute_loss_func
        callback._watch.measure = lambda: evaluate(loss.loss, trainer.model, loss.teacher, [batch])
        trainer.train(resume_from_checkpoint=resume)
        return callback._watch.monitor.history

    assert [point.pair for point in trained(0.0, 16)][LOOKS - 1 :] == ["converged"]
    whole = trained(0.05, 10)
    everywhere: list[Any] = [None, None]
    dist.all_gather_object(everywhere, whole)
    assert everywhere[0] == everywhere[1]
    assert trained(0.05, 10, str(folder / "checkpoint-6")) == whole


@pytest.mark.slow
def test_transformers_on_two_processes(tmp_path: Path) -> None:
    checks = {"ranks": partial(_on_two_ranks, tmp_path / "trainer")}
    assert not (wrong := failures(checks, 2, tmp_path)), "\n".join(wrong)


class _StopAt(tiny.transformers.TrainerCallback):  # type: ignore[misc]
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        control.should_training_stop |= state.global_step >= self.step


# ------------------------------------------------------------------------------------ Lightning


class _Logged(pl.Callback):
    """Stores what is logged after every validation."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.metrics.append({k: v.item() for k, v in trainer.callback_metrics.items()})


def fitted(
    folder: Path, monitor: ConvergenceMonitor, lr: float = 0.0, **options: Any
) -> tuple[Any, lightning.ConvergenceCallback, _Logged]:
    """Return a Trainer after a fit of at most 8 epochs, with a validation after each."""
    sgd = partial(torch.optim.SGD, lr=lr)
    module = KDModule(tiny.llama(0), tiny.llama(1), deepcopy(LOSS), optimizer=sgd)
    callback = lightning.ConvergenceCallback(
        monitor,
        lambda: evaluate(module.loss, module.student, module.teacher, held_out()),
        folder / "runs.svg",
    )
    logged, resume = _Logged(), options.pop("ckpt_path", None)
    trainer = tiny.lightning_trainer(
        folder, **{"max_epochs": 8, "callbacks": [callback, logged], **options}
    )
    batches = DataLoader(tiny.ragged(), batch_size=4, collate_fn=tiny.padded)
    trainer.fit(module, batches, held_out(), ckpt_path=resume)
    return trainer, callback, logged


def test_lightning_stops_and_logs(tmp_path: Path) -> None:
    trainer, callback, logged = fitted(tmp_path, monitor_of())
    assert trainer.current_epoch == LOOKS
    assert callback.verdict is not None
    assert callback.verdict.pair == "converged"
    assert (tmp_path / "runs.svg").exists()
    for name in ("hard", "soft"):  # of the same sequences, by the same weights
        ours = [x[f"convergence_{name}_loss"] for x in logged.metrics[-LOOKS:]]
        assert ours == pytest.approx([x[f"val_{name}"] for x in logged.metrics[-LOOKS:]], rel=1e-5)


def test_lightning_resumes(tmp_path: Path) -> None:
    options = {"lr": 0.05, "max_epochs": 6}
    whole = fitted(tmp_path / "whole", monitor_of(), **options)[1]
    first, _, _ = fitted(tmp_path / "cut", monitor_of(), lr=0.05, max_epochs=3)
    first.save_checkpoint(tmp_path / "cut.ckpt")
    cut = fitted(tmp_path / "cut", monitor_of(), **options, ckpt_path=tmp_path / "cut.ckpt")[1]
    assert cut.verdict == whole.verdict
    assert cut._watch.monitor.history == whole._watch.monitor.history


def test_lightning_refuses_the_monitor_of_another_training(tmp_path: Path) -> None:
    monitor = monitor_of()
    fitted(tmp_path, monitor, max_epochs=1)
    with pytest.raises(ValueError, match="with 1, the last at step 4, in a training that star"):
        fitted(tmp_path, monitor, max_epochs=1)


def test_lightning_with_several_loaders(tmp_path: Path) -> None:
    # one look for all loaders, also in a later fit; none in a validation outside it
    sgd = partial(torch.optim.SGD, lr=0.0)
    module = KDModule(tiny.llama(0), tiny.llama(1), deepcopy(LOSS), optimizer=sgd)
    monitor = monitor_of()
    callback = lightning.ConvergenceCallback(
        monitor, lambda: evaluate(module.loss, module.student, module.teacher, held_out())
    )
    trainer = tiny.lightning_trainer(tmp_path, callbacks=[callback])
    batches = DataLoader(tiny.ragged(), batch_size=4, collate_fn=tiny.padded)
    trainer.validate(module, [held_out(), held_out()], verbose=False)
    assert monitor.history == []
    for epoch in (1, 2):
        trainer.fit_loop.max_epochs = epoch
        trainer.fit(module, batches, [held_out(), held_out()])
    assert [point.step for point in monitor.history] == [4, 8]
    assert "convergence_hard_loss" in trainer.callback_metrics


@pytest.mark.parametrize("callback", ["transformers", "lightning"])
def test_arguments_that_are_refused(
    callback: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(monitor: Any, measure: Any, picture: str | None = None) -> Any:
        if callback == "lightning":
            return lightning.ConvergenceCallback(monitor, measure, picture)
        return ConvergenceCallback(trainer_of(tmp_path, monitor_of())[0], monitor, measure, picture)

    with pytest.raises(TypeError, match="monitor must be a ConvergenceMonitor; got float"):
        make(0.01, dict)
    with pytest.raises(TypeError, match=r"measure must be a function.*got HeldOut"):
        make(monitor_of(), HeldOut(None, None, torch.ones(1)))
    with pytest.raises(ValueError, match="picture's path must end with the name of a file type"):
        make(monitor_of(), dict, "runs.xyz")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"a picture needs matplotlib: pip install fused_kd"):
        make(monitor_of(), dict, "runs.png")
