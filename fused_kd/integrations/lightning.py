"""Lightning: a LightningModule that distils, and a callback that runs the teacher for yours.

::

    module = KDModule(student, teacher, KDLoss(temperature=2.0), heads=True,
                      optimizer=partial(torch.optim.AdamW, lr=1e-4))
    Trainer(accumulate_grad_batches=4).fit(module, loader)  # batches: input_ids, labels, ...

The package is ``lightning``, or ``pytorch_lightning`` if only that is installed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import KDLossParts
from ..modules import KDLoss
from ..objectives import ConvergenceMonitor, HeldOut, Verdict
from ._common.convergence import Watch
from ._common.frameworks import need
from ._common.heads import headless, scale_of, side_of
from ._common.labels import IGNORE_INDEX, aligned
from ._common.models import check_inputs
from ._common.outputs import logits_of
from ._common.parts import check_loss
from .loop import divide_gradients
from .student_teacher import StudentTeacherLoss

if find_spec("lightning") is None and find_spec("pytorch_lightning") is not None:
    import pytorch_lightning as pl
else:
    need("lightning")
    import lightning.pytorch as pl


class KDModule(StudentTeacherLoss, pl.LightningModule):  # type: ignore[misc]
    """A LightningModule that trains the student of a :class:`StudentTeacherLoss`.

    An update uses the gradient of the mean over all its kept tokens, regardless of the number of
    micro-batches (``accumulate_grad_batches``) and devices. The losses are sums, and the gradients
    are divided by the count once, before they are clipped. So ``train_loss``, ``train_hard`` and
    ``train_soft`` are exact means of the update too. They are logged as tensors, without waiting
    for a device. ``val_...`` and ``test_...`` are means over all kept tokens of the evaluation.
    With several loaders they are named ``val_loss/dataloader_idx_0`` and so on, as Lightning names
    them. Automatic optimisation only.

    The loss of a step as Lightning reports it (``outputs["loss"]`` in a callback) is the sum, times
    ``accumulate_grad_batches``, by which Lightning divides.

    Args:
        student: see :class:`StudentTeacherLoss`; put into training mode.
        teacher: see :class:`StudentTeacherLoss`; moved with the module, not in its checkpoints.
            None: ``batch["teacher"]``, a :class:`fused_kd.TopK`, is moved with the batch.
        loss: a KDLoss with ``reduction="mean"``; None: ``KDLoss()``.
        optimizer: called with the student's parameters that require grad; its result is returned
            by ``configure_optimizers``.
        heads: see :class:`StudentTeacherLoss`.
        shift: see :class:`StudentTeacherLoss`.

    Raises:
        TypeError, ValueError: As StudentTeacherLoss; or the loss has another reduction.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        loss: KDLoss | None = None,
        *,
        optimizer: Callable[[Iterable[nn.Parameter]], Any],
        heads: bool = False,
        shift: bool = True,
    ) -> None:
        super().__init__(student, teacher, loss, heads=heads, shift=shift)
        check_loss(self.loss, heads=heads, is_mean=True)
        self.student.train()  # Lightning would keep from_pretrained's evaluation mode
        self.make_optimizer = optimizer
        self._sums: dict[tuple[str, int], Tensor] = {}  # by stage and loader

    def configure_optimizers(self) -> Any:
        """Return ``optimizer(parameters)`` of the student's parameters that require grad."""
        return self.make_optimizer([p for p in self.student.parameters() if p.requires_grad])

    def on_train_start(self) -> None:
        """Discard the sums of an interrupted update; Lightning discards its gradients too."""
        self._discard("train")

    def on_validation_start(self) -> None:
        """Discard the sums of an interrupted validation."""
        self._discard("val")

    def on_test_start(self) -> None:
        """Discard the sums of an interrupted test."""
        self._discard("test")

    def training_step(self, batch: MutableMapping[str, Any], batch_idx: int) -> Tensor:
        """Return the sum over the batch's kept tokens, times ``accumulate_grad_batches``.

        Raises:
            TypeError: The batch is not a dict with a tensor of labels; or as the forward of
                :class:`StudentTeacherLoss`.
            ValueError: As that forward.
        """
        divisor: int = self._lightning.accumulate_grad_batches
        return self._step("train", batch).loss * divisor

    def validation_step(
        self, batch: MutableMapping[str, Any], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Add the losses and the count of kept tokens of a batch to the sums of its loader."""
        self._step("val", batch, dataloader_idx)

    def test_step(
        self, batch: MutableMapping[str, Any], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Add the losses and the count of kept tokens of a batch to the sums of its loader."""
        self._step("test", batch, dataloader_idx)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Divide the gradients by the mean number of kept tokens per rank; log the mean losses.

        The gradients are sums over a rank's tokens, averaged over the ranks.
        """
        kept = self._log_means("train")
        divide_gradients(self.student.parameters(), kept / self._lightning.world_size)

    def on_validation_epoch_end(self) -> None:
        """Log the mean loss, hard and soft term of every loader."""
        self._log_means_of_loaders("val", self._lightning.num_val_batches)

    def on_test_epoch_end(self) -> None:
        """Log the mean loss, hard and soft term of every loader."""
        self._log_means_of_loaders("test", self._lightning.num_test_batches)

    def _discard(self, stage: str) -> None:
        """Drop the sums of a stage."""
        self._sums = {key: sums for key, sums in self._sums.items() if key[0] != stage}

    @property
    def _lightning(self) -> Any:
        """Return the Trainer as Any: nn.Module declares attributes as parameters or modules."""
        return self.trainer

    def _step(self, stage: str, batch: MutableMapping[str, Any], loader: int = 0) -> KDLossParts:
        """Return a batch's losses, summed over tokens; add them to the sums of stage and loader.

        Raises as training_step().
        """
        _check_batch(batch)
        parts = self.parts(**batch, num_items=1)
        kept = (aligned(batch["labels"], self.shift) != IGNORE_INDEX).sum()
        sums = torch.stack([kept.double(), *(part.detach().double() for part in parts)])
        key = (stage, loader)
        self._sums[key] = self._sums[key] + sums if key in self._sums else sums
        return parts

    def _log_means_of_loaders(self, stage: str, batches: Sequence[float]) -> None:
        """Log the means of every loader, under Lightning's names if there are several.

        A loader without batches logs nothing. A loader of unknown length may yield no batch, in one
        process or in all: its sums are 0 there, since all processes reduce together.
        """
        for loader, count in enumerate(batches):
            if count > 0:
                suffix = f"/dataloader_idx_{loader}" if len(batches) > 1 else ""
                self._log_means(stage, loader, suffix)

    def _log_means(self, stage: str, loader: int = 0, suffix: str = "") -> Tensor:
        """Log the means of a loader's sums over all devices, and drop the sums.

        Every process must call it, since the sums are reduced.

        Returns:
            0-d, float64: the number of kept tokens on all devices.
        """
        strategy = self._lightning.strategy
        none = torch.zeros(4, dtype=torch.float64, device=strategy.root_device)
        sums = strategy.reduce(self._sums.pop((stage, loader), none), reduce_op="sum")
        loss, hard, soft = (sums[1:] / sums[0].clamp(min=1)).float()
        means = {"loss": loss, "hard": hard, "soft": soft}
        log: Any = self.log_dict
        logs = {f"{stage}_{name}{suffix}": mean for name, mean in means.items()}
        log(logs, add_dataloader_idx=False)  # the suffix has it
        kept: Tensor = sums[0]
        return kept


class TeacherCallback(pl.Callback):  # type: ignore[misc]
    """A callback that stores a teacher's logits or Head of every batch as ``batch["teacher"]``.

    It is for your own LightningModule, whose steps then pass ``batch["teacher"]`` to a KDLoss.
    The teacher belongs to no module: it is in no checkpoint, no optimizer and no gradient
    synchronisation. It is frozen and put into evaluation mode in place, and runs without gradient
    in the Trainer's precision.

    Args:
        teacher: called with everything in the batch but the labels, so there must be no embeddings,
            encoder states or cache in it. It is not called in ``Trainer.predict``.
        heads: bypass the lm_head, so that ``batch["teacher"]`` is a :class:`fused_kd.Head`, not
            logits.

    Raises:
        TypeError, ValueError: With `heads`, the lm_head cannot be bypassed (see
            :class:`StudentTeacherLoss`).
    """

    def __init__(self, teacher: nn.Module, *, heads: bool = False) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self._scale = scale_of(teacher) if heads else None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Move the teacher, in place, to the device of this process."""
        self.teacher.to(trainer.strategy.root_device)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any) -> None:
        """Run the teacher on the batch; add ``batch["teacher"]``, its logits or Head, in place.

        Raises:
            TypeError: The batch is not a dict with a tensor of labels; or the teacher returns no
                logits.
            ValueError: The batch has embeddings, encoder states or a cache, which belong to one
                model; or it lacks decoder_input_ids that the teacher needs.
        """
        _check_batch(batch)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        check_inputs(self.teacher, inputs)
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            if self._scale is None:
                batch["teacher"] = logits_of(self.teacher(**inputs))
                return
            with headless(self.teacher):
                hidden = logits_of(self.teacher(**inputs))
        batch["teacher"] = side_of(self.teacher, hidden, self._scale)

    on_validation_batch_start = on_test_batch_start = on_train_batch_start


class ConvergenceCallback(pl.Callback):  # type: ignore[misc]
    """Stops a training when both objectives have converged, and logs why.

    At the end of each validation it measures the held-out set, and logs losses and improvements
    under ``convergence_...``; the verdict in words is ``callback.verdict``. The monitor is in the
    Trainer's checkpoints. On several processes each measures its own sequences.

    Args:
        monitor: see :class:`fused_kd.objectives.ConvergenceMonitor`; without a group it gets that
            of all processes.
        measure: called without arguments on every process, returns what
            :func:`fused_kd.objectives.evaluate` does.
        picture: a file for a picture of the losses and the verdicts, at the end of the training.

    Raises:
        TypeError: `monitor` or `measure` has the wrong type.
        ImportError, ValueError: `picture` cannot be drawn, see :func:`fused_kd.objectives.draw`.
    """

    def __init__(
        self,
        monitor: ConvergenceMonitor,
        measure: Callable[[], HeldOut],
        picture: str | os.PathLike[str] | None = None,
    ) -> None:
        self._watch = Watch(monitor, measure, picture)

    @property
    def verdict(self) -> Verdict | None:
        """Return the last verdict; None before the first validation."""
        return self._watch.verdict

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Make all processes the ranks of a monitor without a group."""
        self._watch.join_processes()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Raise ValueError if the monitor has evaluations of another training."""
        self._watch.check_start(trainer.global_step)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure, log numbers, and end the training if the verdict says so."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        optimizers = trainer.optimizers
        verdict = self._watch.look(trainer.global_step, optimizers[0] if optimizers else None)
        if verdict is None:
            return
        entries = self._watch.log_entries()
        numbers = {name: x for name, x in entries.items() if not isinstance(x, str)}
        pl_module.log_dict(numbers, rank_zero_only=True)
        trainer.should_stop = trainer.should_stop or verdict.stop

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Draw the picture."""
        if trainer.is_global_zero:
            self._watch.finish()

    def state_dict(self) -> dict[str, Any]:
        """Return the monitor's state, of all processes."""
        return self._watch.monitor.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the monitor; raises as its load_state_dict."""
        self._watch.monitor.load_state_dict(state_dict)


def _check_batch(batch: object) -> None:
    """Refuse a batch that is not a dict with labels.

    Raises:
        TypeError: `batch` is no dict, or has no tensor of labels.
    """
    if not isinstance(batch, MutableMapping) or not isinstance(batch.get("labels"), Tensor):
        kind = type(batch).__name__
        if isinstance(batch, MutableMapping):
            kind = f"a dict with the keys {[*batch]}"
        raise TypeError(
            "a batch must be a dict with labels, -100 where a token does not count, and the inputs "
            f"of the models; got {kind}"
        )
