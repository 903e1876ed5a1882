"""Lightning: a real Trainer trains as a plain loop over whole batches does."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from needs import need
from support.losses import refused
from support.ranks import run_rank
from tiny import lightning_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

pl = need("lightning").pytorch
from lightning.pytorch.strategies import DDPStrategy  # noqa: E402
from lightning.pytorch.strategies.launchers import multiprocessing as launchers  # noqa: E402

from fused_kd import Head, KDLoss, KDLossParts  # noqa: E402
from fused_kd.integrations.lightning import KDModule, TeacherCallback  # noqa: E402
from fused_kd.integrations.loop import head_of, headless, shifted  # noqa: E402
from fused_kd.integrations.student_teacher import StudentTeacherLoss  # noqa: E402

SGD = partial(torch.optim.SGD, lr=tiny.SGD["learning_rate"])
LOSS = KDLoss(temperature=2.0)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # few workers, few batches


def _module(heads: bool = False, loss: KDLoss = LOSS) -> KDModule:
    return KDModule(tiny.llama(0), tiny.llama(1), deepcopy(loss), optimizer=SGD, heads=heads)


def _loader(rows: int, seed: int = 0) -> DataLoader[Any]:
    return DataLoader(tiny.ragged(seed=seed), batch_size=rows, collate_fn=tiny.padded)


class _Seen(pl.Callback):
    """Stores the logged metrics after every optimizer step in `steps`."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step > len(self.steps):
            self.steps.append({k: v.item() for k, v in trainer.callback_metrics.items()})


def _plain_loop(heads: bool, rows: int, epochs: int = 1) -> tuple[nn.Module, list[float]]:
    """Train without a framework on batches of `rows`; return the student and the losses."""
    model = StudentTeacherLoss(tiny.llama(0).train(), tiny.llama(1), LOSS, heads=heads)
    losses = tiny.plain_loop(model, [*_loader(rows)] * epochs)
    return model.student, losses


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_weights_of_a_plain_loop_P50(heads: bool, accumulate: int, tmp_path: Path) -> None:
    module, seen = _module(heads), _Seen()
    trainer = lightning_trainer(tmp_path, accumulate_grad_batches=accumulate, callbacks=[seen])
    trainer.fit(module, _loader(4 // accumulate))
    student, losses = _plain_loop(heads, 4)
    tiny.assert_close(module.student, student)
    assert [step["train_loss"] for step in seen.steps] == pytest.approx(losses, rel=1e-5)
    for step in seen.steps:
        parts = 0.5 * step["train_hard"] + 0.5 * step["train_soft"]
        assert step["train_loss"] == pytest.approx(parts, rel=1e-5)


def test_the_last_update_of_an_epoch_may_have_fewer_micro_batches(tmp_path: Path) -> None:
    module = _module()
    trainer = lightning_trainer(tmp_path, accumulate_grad_batches=6)  # 16 rows: 6, 6, 4
    trainer.fit(module, _loader(1))
    assert trainer.global_step == 3
    tiny.assert_close(module.student, _plain_loop(False, 6)[0])


def test_gradients_are_clipped_after_they_are_divided(tmp_path: Path) -> None:
    module, options = _module(), {"accumulate_grad_batches": 2, "gradient_clip_val": 0.01}
    lightning_trainer(tmp_path, max_steps=1, **options).fit(module, _loader(2))
    pairs = zip(module.student.parameters(), tiny.llama(0).parameters(), strict=True)
    moved = torch.stack([(a - b).norm() for a, b in pairs]).norm().item()
    assert moved == pytest.approx(0.01 * tiny.SGD["learning_rate"], rel=1e-2)


def test_a_checkpoint_has_no_teacher_and_is_resumed_from(heads: bool, tmp_path: Path) -> None:
    whole, half, again = (_module(heads) for _ in range(3))
    lightning_trainer(tmp_path, max_epochs=2).fit(whole, _loader(4))
    trainer, path = lightning_trainer(tmp_path), tmp_path / "half.ckpt"
    trainer.fit(half, _loader(4))
    trainer.save_checkpoint(path)
    kept = torch.load(path, weights_only=False)["state_dict"]
    assert kept.keys() == {f"student.{name}" for name in half.student.state_dict()}
    lightning_trainer(tmp_path, max_epochs=2).fit(again, _loader(4), ckpt_path=path)
    tiny.assert_close(again.student, whole.student)
    other = {"student": tiny.llama(2), "teacher": tiny.llama(1), "optimizer": SGD}
    loaded = KDModule.load_from_checkpoint(path, **other, loss=LOSS, heads=heads)
    tiny.assert_close(loaded.student, half.student)


def _mean_of_all(module: KDModule, seed: int) -> list[float]:
    """Return the mean loss, hard and soft term over all 16 rows as one batch."""
    (batch,) = _loader(16, seed)
    module.eval()
    with torch.no_grad():
        parts = module.parts(**batch)
    module.train()
    return [x.item() for x in parts]


def _means(metrics: Any, ending: str = "") -> Any:
    """Return the logged mean loss, hard and soft term; `ending` is that of a loader's names."""
    stage = next(iter(metrics)).partition("_")[0]
    expected = [float(metrics[f"{stage}_{name}{ending}"]) for name in KDLossParts._fields]
    return pytest.approx(expected, rel=1e-5)


def test_validation_is_a_mean_over_all_tokens_N_30(heads: bool, tmp_path: Path) -> None:
    module, trainer = _module(heads), lightning_trainer(tmp_path)
    teacher = deepcopy(module.teacher)
    trainer.fit(module, _loader(4), _loader(3, seed=1))
    assert module.student.training
    assert not module.teacher.training
    validated = {k: v for k, v in trainer.callback_metrics.items() if k.startswith("val")}
    (tested,) = trainer.test(module, _loader(3, seed=1), verbose=False)
    for metrics in (validated, tested):
        assert len(metrics) == 3
        assert _mean_of_all(module, seed=1) == _means(metrics)
    tiny.assert_close(module.teacher, teacher)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_every_loader_of_several_has_its_means(stage: str, heads: bool, tmp_path: Path) -> None:
    module, loaders = _module(heads), [_loader(3, seed=1), _loader(5, seed=2)]
    trainer = lightning_trainer(tmp_path)
    getattr(trainer, stage)(module, loaders, verbose=False)
    assert len(trainer.callback_metrics) == 6
    for i in (0, 1):
        want = _mean_of_all(module, seed=i + 1)
        assert want == _means(trainer.callback_metrics, f"/dataloader_idx_{i}")


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_an_interrupted_evaluation_leaves_no_sums(stage: str, tmp_path: Path) -> None:
    module = _module()
    run = partial(getattr(lightning_trainer(tmp_path), stage), module, verbose=False)
    second_is_broken = DataLoader([*tiny.ragged(4), None], batch_size=4, collate_fn=tiny.padded)
    refused(TypeError, "NoneType", run, second_is_broken)
    assert _mean_of_all(module, seed=1) == _means(run(_loader(3, seed=1))[0])


class _Empty(IterableDataset[Any]):
    """A stream of no rows, whose length is unknown."""

    def __iter__(self) -> Iterator[Any]:
        return iter(())


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_a_stream_that_yields_nothing_has_means_of_0(stage: str, tmp_path: Path) -> None:
    trainer, loaders = lightning_trainer(tmp_path), [_loader(4), DataLoader(_Empty())]
    getattr(trainer, stage)(_module(), loaders, verbose=False)
    assert len(trainer.callback_metrics) == 6
    for name, mean in trainer.callback_metrics.items():
        assert mean > 0 if name.endswith("0") else mean == 0, name


def test_mixed_precision(heads: bool, tmp_path: Path) -> None:
    module = _module(heads)
    lightning_trainer(tmp_path, precision="bf16-mixed", accumulate_grad_batches=2).fit(
        module, _loader(2)
    )
    plain, _ = _plain_loop(heads, 4)
    start = tiny.llama(0)
    moved = tiny.largest_difference(plain, start)
    assert 0 < tiny.largest_difference(module.student, plain) < 0.1 * moved


class _Launcher(launchers._MultiProcessingLauncher):  # type: ignore[misc]
    """A launcher whose ranks end without Python's finalization, which can abort."""

    def _wrapping_function(self, *arguments: Any) -> None:
        run_rank(partial(super()._wrapping_function, *arguments))


class _Spawned(DDPStrategy):  # type: ignore[misc]
    """Lightning's "ddp_spawn" with _Launcher."""

    def _configure_launcher(self) -> None:
        self._launcher = _Launcher(self, start_method="spawn")


@pytest.mark.slow
def test_two_devices(tmp_path: Path) -> None:
    # 8 micro-batches of one row in each process are one batch of 16, in any order
    module = _module(heads=True)
    strategy = _Spawned(start_method="spawn")
    options = {"devices": 2, "strategy": strategy, "accumulate_grad_batches": 8}
    lightning_trainer(tmp_path, max_epochs=2, **options).fit(module, _loader(1))
    tiny.assert_close(module.student, _plain_loop(True, 16, epochs=2)[0])


class _Own(pl.LightningModule):  # type: ignore[misc]
    """A user's module, which reads the teacher's side that the callback stored in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.student = tiny.llama(0).train()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        inputs, self.teachers_side = (batch["input_ids"], batch["attention_mask"]), batch["teacher"]
        if isinstance(self.teachers_side, Head):
            with headless(self.student):
                hidden = self.student(*inputs).logits
            side = Head(hidden, head_of(self.student).weight)
        else:
            side = self.student(*inputs).logits
        return LOSS(side, self.teachers_side, shifted(batch["labels"]))

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters())


def test_a_teacher_next_to_a_users_own_module(heads: bool, tmp_path: Path) -> None:
    module, path = _Own(), tmp_path / "own.ckpt"
    teacher = TeacherCallback(tiny.llama(1).train(), heads=heads)
    trainer = lightning_trainer(tmp_path, callbacks=[teacher])
    trainer.fit(module, _loader(4), _loader(4, seed=1))
    assert isinstance(module.teachers_side, Head if heads else Tensor)
    tiny.assert_close(module.student, _plain_loop(heads, 4)[0])
    assert trainer.callback_metrics["val_loss"] > 0
    assert not teacher.teacher.training
    trainer.save_checkpoint(path)
    kept = torch.load(path, weights_only=False)["state_dict"]
    assert all(name.startswith("student.") for name in kept)


def test_bad_input(tmp_path: Path) -> None:
    refused(ValueError, r"reduction='mean'.*got 'sum'", _module, loss=KDLoss(reduction="sum"))
    make = partial(KDModule, tiny.llama(0), optimizer=SGD)
    refused(TypeError, r"teacher must be a torch.nn.Module; got str", make, "teacher")
    larger = tiny.llama(1, vocab_size=101)
    refused(ValueError, "vocab_size is 97 in the student and 101", make, larger)
    batch = {"inputs_embeds": torch.zeros(1, 3, 16), "labels": torch.ones(1, 3).long()}
    start, trainer = (
        TeacherCallback(tiny.llama(1)).on_train_batch_start,
        lightning_trainer(tmp_path),
    )
    message = "inputs_embeds must not be in the batch"
    refused(ValueError, message, start, trainer, None, batch, 0)
    data = DataLoader([row["input_ids"] for row in tiny.ragged(4)], batch_size=1)
    message = r"a batch must be a dict with labels.*got Tensor"
    refused(TypeError, message, trainer.fit, _module(), data)
