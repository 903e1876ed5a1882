"""Hugging Face Trainer: a ``compute_loss_func`` that holds the teacher, and a Trainer around it.

::

    trainer = Trainer(student, args, train_dataset=..., data_collator=...,
                      compute_loss_func=DistillationLoss(student, teacher, KDLoss(temperature=2.0)))

or ``KDTrainer(student, args, teacher=teacher, loss=KDLoss(temperature=2.0), ...)``, which also logs
the hard and the soft part. The loss takes the logits of both models; with ``heads=True`` it takes
their hidden states and lm_heads, and neither model makes logits during training. With
``teacher=None`` no teacher runs: ``batch["teacher"]`` is a TopK, from a cache for example.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import KDLoss
from ..objectives import ConvergenceMonitor, HeldOut, Verdict
from ..sides import Side, Teacher, TopK
from ._common.batches import TEACHER, teacher_of_batch
from ._common.calls import Call, Calls
from ._common.convergence import Watch
from ._common.frameworks import need
from ._common.heads import bypass_head, headless, is_bypassed, scale_of, side_of
from ._common.labels import aligned
from ._common.models import PaddingCheck, check_inputs, check_models
from ._common.outputs import logits_in
from ._common.parts import check_loss, parts_of

need("transformers")
from transformers import Trainer, TrainerCallback  # noqa: E402
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR  # noqa: E402

#: Entries of a batch that are for the loss; the teacher gets all others, as the student does.
NOT_FOR_THE_TEACHER = ("labels", "shift_labels", "num_items_in_batch", "use_cache", "return_dict")


@dataclass
class _Parts:
    """Sums of hard and soft losses; kept on the device, so that the host does not wait."""

    sums: Tensor | None = None  # (2,): hard, soft
    count: int = 0

    def add(self, parts: Tensor) -> None:  # (..., 2)
        """Add rows of hard and soft loss to the sums, and their number to the count."""
        rows = parts.reshape(-1, 2)
        self.sums = rows.sum(0) + (0 if self.sums is None else self.sums)
        self.count += len(rows)


class DistillationLoss:
    """Hard and soft loss of a language model, for ``Trainer(compute_loss_func=...)``.

    The labels are those of the batch, not shifted: they are shifted here. The sum over the kept
    tokens is divided by the Trainer's ``num_items_in_batch``, so an update does not depend on how
    its batch is cut into micro-batches or spread over processes. The teacher is called with the
    student's inputs, without gradient, under the same autocast. Without a teacher model every batch
    must have an entry "teacher", a :class:`fused_kd.TopK` whose rows are those of the logits, such
    as :mod:`fused_kd.teachers` makes of a cache (see :func:`teacher_from_batches`).

    With `heads` the student is changed: in training mode with gradients its lm_head returns its
    input, until :meth:`remove`. In evaluation it computes the logits, which the Trainer gets.

    Args:
        student: the model that the Trainer trains, before it is wrapped.
        teacher: a model of the same vocabulary in evaluation mode, on the student's device; or
            None, if the batches have it.
        loss: a KDLoss with ``reduction="mean"``; its ``ignore_index`` must be -100, the Trainer's.
        heads: bypass the lm_heads and pass a :class:`fused_kd.Head` for each model to the loss, so
            that neither computes logits during training.
        shift: whether labels are those of the inputs, to be shifted to the next token. False:
            ``labels[i]`` belongs to ``logits[i]``, and the models may be of any kind (masked
            language models, classifiers, encoder-decoders).

    Raises:
        TypeError: A model is not of transformers, the loss no KDLoss; with `heads` an lm_head is
            not a plain nn.Linear, or has hooks on its output.
        ValueError: A model is not causal, if labels are shifted; the vocabularies differ; both
            models have the same parameter; a router's aux_loss would be lost; the teacher is in
            training mode; a keyword of the loss does not fit `heads`; with `heads` logits are
            soft-capped or otherwise changed after the lm_head; another DistillationLoss bypasses
            the student's lm_head.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        loss: KDLoss | None = None,
        *,
        heads: bool = False,
        shift: bool = True,
    ) -> None:
        self.loss = KDLoss() if loss is None else loss
        self.student, self.teacher, self.heads, self.shift = student, teacher, heads, shift
        self._check()
        self.training_parts = _Parts()
        self.evaluated: Tensor | None = None  # (2,): hard and soft loss of the last batch
        self.has_num_items = False  # whether the Trainer counted tokens for the last loss
        self.topk: object = None  # the entry "teacher" of the batch that the student is called with
        self._calls, self._check_padding = Calls(), PaddingCheck()
        self._undo: list[Callable[[], None]] = []
        if heads:
            self._scales = scale_of(student), 1.0 if teacher is None else scale_of(teacher)
            self._undo.append(bypass_head(student))
        self._undo += self._calls.listen(student)

    def __call__(
        self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Return the loss, 0-d, with the arguments of Trainer's ``compute_loss_func``.

        Args:
            outputs: the student's, a dict or tuple with logits (B, S, V).
            labels: (B, S), -100 where a token does not count. If the student was called with
                ``shift_labels`` these are used instead, and `labels` may be None.
            num_items_in_batch: kept tokens of the whole update; None: of this batch.

        Raises:
            RuntimeError: The outputs cannot be assigned to a call of the student.
            TypeError: The outputs have no logits; the student was called with more positional
                arguments than its forward names; or as :func:`fused_kd.kd_loss`.
            ValueError: Shapes or values do not fit, as in kd_loss; labels are absent, in training
                also if there are ``shift_labels`` but no `num_items_in_batch`; inputs belong to one
                model; the teacher is in training mode; there is no teacher model, and no TopK in
                the batch; another loss bypasses the student's lm_head.
        """
        self.has_num_items = num_items_in_batch is not None
        logits = logits_in(outputs)
        call = self._calls.take(logits)
        inputs = call.named(self.student)
        targets = self._targets(labels, inputs)
        self._check_padding(labels, inputs)
        with call.again(logits.device):
            sides = self._sides(logits, call, inputs)
            parts = parts_of(self.loss, *sides, targets, num_items_in_batch)
        both = torch.stack([parts.hard, parts.soft])
        if self.student.training:
            self.training_parts.add(both)
        else:
            self.evaluated = both
        return parts.loss

    def remove(self) -> None:
        """Remove hooks and bypass from the student, so that it can be trained with another loss.

        This loss cannot be computed for later calls of the student.
        """
        while self._undo:
            self._undo.pop()()

    # ------------------------------------------------------------------------------ the sides

    def _sides(
        self,
        student: Tensor,  # (B, S, V) logits, or (B, S, H) if the call was headless
        call: Call,
        inputs: dict[str, Any],
    ) -> tuple[Side, Teacher]:
        """Return logits or a Head of the student and of the teacher, or the TopK of the batch.

        A teacher model is called with `inputs`.

        Raises:
            ValueError: Another loss bypasses the student's lm_head; there is no TopK, if there is
                no teacher model; or as _run_teacher().
        """
        if not self.heads and call.is_headless and is_bypassed(self.student):
            raise ValueError(
                "student's lm_head is bypassed by another DistillationLoss, with heads=True, so it "
                "returned hidden states: call remove() on that loss first (loss.remove())"
            )
        is_head = self.heads and call.is_headless
        side = side_of(self.student, student, self._scales[0]) if is_head else student
        topk, self.topk = self.topk, None
        if self.teacher is None:
            return side, teacher_of_batch(topk)
        if not is_head:
            return side, self._run_teacher(self.teacher, inputs)
        with headless(self.teacher):
            hidden = self._run_teacher(self.teacher, inputs)
        return side, side_of(self.teacher, hidden, self._scales[1])

    def _run_teacher(self, teacher: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Return the teacher's logits for the student's inputs, without gradient and cache.

        Inside ``headless(teacher)`` they are hidden states. Raises ValueError as __call__.
        """
        self._check_mode_of_teacher()
        check_inputs(self.student, inputs)
        keywords = {k: v for k, v in inputs.items() if k not in NOT_FOR_THE_TEACHER}
        with torch.no_grad():
            logits: Tensor = teacher(**keywords, use_cache=False).logits
        return logits

    def _targets(self, labels: Tensor | None, inputs: dict[str, Any]) -> Tensor:
        """Return labels aligned with the logits: ``shift_labels`` of the inputs, else `labels`.

        Raises:
            ValueError: `labels` is None, without ``shift_labels`` or in training without a count.
        """
        ready = inputs.get("shift_labels")
        if not isinstance(ready, Tensor):
            return aligned(labels, self.shift)
        if labels is None and self.student.training and not self.has_num_items:
            raise ValueError(
                "labels must be in the batch next to shift_labels, since Trainer counts tokens by "
                "labels, and without a count does not divide by gradient_accumulation_steps; got "
                "none: keep labels in the batch, or pass num_items_in_batch"
            )
        return ready

    # ----------------------------------------------------------------------------- at the start

    def _check(self) -> None:
        """Refuse models or a loss that do not fit together; raises as DistillationLoss."""
        for name in ("student", "teacher"):
            model = getattr(self, name)
            if name == "teacher" and model is None:
                continue
            if not isinstance(model, nn.Module) or not hasattr(model, "get_output_embeddings"):
                raise TypeError(
                    f"{name} must be a model of transformers; got "
                    f"{'None' if model is None else type(model).__name__}: for other modules use "
                    "fused_kd.integrations.student_teacher"
                )
        check_loss(self.loss, heads=self.heads, is_mean=True)
        check_models(self.student, self.teacher, shift=self.shift)
        self._check_mode_of_teacher()

    def _check_mode_of_teacher(self) -> None:
        """Raise ValueError if the teacher is in training mode, in which dropout is active."""
        if self.teacher is not None and self.teacher.training:
            raise ValueError(
                "teacher must be in evaluation mode, without dropout; it is in training mode: call "
                "teacher.eval()"
            )


class KDTrainer(Trainer):  # type: ignore[misc]
    """A Trainer that distils, and logs ``hard_loss`` and ``soft_loss`` next to ``loss``.

    Args:
        arguments: those of transformers.Trainer, except ``compute_loss_func``.
        teacher: see :class:`DistillationLoss`; moved, in place, to the Trainer's device if the
            Trainer moves its model. None: that of the batches, see :func:`teacher_from_batches`.
        loss: see :class:`DistillationLoss`.
        heads: see :class:`DistillationLoss`.
        shift: see :class:`DistillationLoss`.
        keywords: those of transformers.Trainer, as above.

    Raises:
        TypeError, ValueError: As DistillationLoss; or ``compute_loss_func``, ``model_init`` or
            ``label_smoothing_factor`` is set, or one process has several GPUs.
    """

    def __init__(
        self,
        *arguments: Any,
        teacher: nn.Module | None,
        loss: KDLoss | None = None,
        heads: bool = False,
        shift: bool = True,
        **keywords: Any,
    ) -> None:
        if keywords.get("compute_loss_func") is not None:
            raise ValueError(
                "compute_loss_func must be None, since KDTrainer sets it; got "
                f"{keywords['compute_loss_func']!r}: pass loss, or use transformers.Trainer"
            )
        super().__init__(*arguments, **keywords)
        if self.model_init is not None:
            raise ValueError(
                "model_init must be None, since train() would make another student than the one "
                f"that the loss is attached to; got {self.model_init!r}: pass model, and make a "
                "KDTrainer for each trial of a search"
            )
        if self.args.label_smoothing_factor != 0:
            raise ValueError(
                "label_smoothing_factor must be 0, since Trainer's own loss is not used here; got "
                f"{self.args.label_smoothing_factor}: pass loss=KDLoss(label_smoothing=...)"
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                "KDTrainer must have one GPU in a process, since torch's DataParallel splits the "
                f"outputs; got {self.args.n_gpu}: start a process for each GPU with torchrun, or "
                "set CUDA_VISIBLE_DEVICES"
            )
        if isinstance(teacher, nn.Module) and self.place_model_on_device:
            teacher.to(self.args.device)
        self.compute_loss_func = DistillationLoss(
            self.model, teacher, loss, heads=heads, shift=shift
        )
        self._loss_shifts_labels = shift  # whether Trainer's count leaves out each row's first
        log_parts(self)
        if teacher is None:
            teacher_from_batches(self)


def teacher_from_batches(trainer: Trainer) -> None:
    """Make a trainer pass ``batch["teacher"]``, a TopK, to its DistillationLoss, not to the model.

    For a DistillationLoss without a teacher model; a KDTrainer does it already. The trainer is
    changed: it moves the TopK to its device, and "teacher" is no unused column. The collator must
    make the entry, as :func:`fused_kd.teachers.collate` does. Accelerate's dispatcher, which it
    uses for an IterableDataset, cannot join TopKs: set ``dispatch_batches=False``.

    Raises:
        TypeError: The trainer's compute_loss_func is no DistillationLoss.
    """
    loss, prepare = _loss_of(trainer), trainer._prepare_inputs
    trainer._set_signature_columns_if_needed()
    if TEACHER in trainer._signature_columns:
        return  # it was called before
    trainer._signature_columns.append(TEACHER)

    def prepare_inputs(inputs: Mapping[str, Any]) -> Any:
        topk = inputs.get(TEACHER)
        loss.topk = topk.to(trainer.args.device) if isinstance(topk, TopK) else topk
        return prepare({name: x for name, x in inputs.items() if name != TEACHER})

    trainer._prepare_inputs = prepare_inputs


def log_parts(trainer: Trainer) -> None:
    """Add hard_loss and soft_loss to the logs of a trainer with a DistillationLoss.

    The two are means like ``loss``, over the steps since the last log; ``eval_hard_loss`` and
    ``eval_soft_loss`` are means over an evaluation. All are read from the device when ``loss`` is.
    The trainer is changed: it gets a callback, and another ``log``. A KDTrainer has them already.

    Raises:
        TypeError: The trainer's compute_loss_func is no DistillationLoss.
    """
    trainer.add_callback(_PartsLogger(trainer, _loss_of(trainer)))


def _loss_of(trainer: Trainer) -> DistillationLoss:
    """Return the trainer's DistillationLoss; raise TypeError if it has another loss or none."""
    loss = trainer.compute_loss_func
    if not isinstance(loss, DistillationLoss):
        raise TypeError(
            f"trainer.compute_loss_func must be a DistillationLoss; got {type(loss).__name__}: "
            "pass compute_loss_func=DistillationLoss(student, teacher) to the Trainer"
        )
    return loss


class ConvergenceCallback(TrainerCallback):  # type: ignore[misc]
    """Stops a training when both objectives have converged, and logs why.

    ::

        monitor = ConvergenceMonitor(hard_delta=0.01, soft_delta=0.01)
        measure = lambda: evaluate(loss, student, teacher, held_out_loader)
        trainer.add_callback(ConvergenceCallback(trainer, monitor, measure))

    At each evaluation of the training it measures the held-out set, and logs the verdict as
    ``convergence``, beside its numbers; ``callback.verdict.reason`` is the sentence with them. It
    works with any trainer of transformers, TRL's too, and any loss. The monitor is saved as
    ``convergence.pt`` in the folder of each checkpoint, and restored when the training resumes.
    On several processes each measures its own sequences.

    Args:
        trainer: the trainer that it is added to.
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
        trainer: Trainer,
        monitor: ConvergenceMonitor,
        measure: Callable[[], HeldOut],
        picture: str | os.PathLike[str] | None = None,
    ) -> None:
        self._trainer, self._watch = trainer, Watch(monitor, measure, picture)

    @property
    def verdict(self) -> Verdict | None:
        """Return the last verdict; None before the first evaluation."""
        return self._watch.verdict

    def on_train_begin(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Restore the monitor from the checkpoint that the training is resumed from, if any.

        Raises:
            FileNotFoundError: The checkpoint, in the Trainer's output_dir, has no monitor.
            ValueError: The monitor has evaluations of another training.
        """
        self._watch.join_processes()
        history = self._watch.monitor.history
        if state.global_step == 0:
            self._watch.check_start(0)
        if state.global_step == 0 or (history and history[-1].step <= state.global_step):
            return  # the caller has restored it
        path = self._file(args, state)
        if not path.exists():
            raise FileNotFoundError(
                f"{path} must be there to resume at step {state.global_step}, since it has the "
                "evaluations so far: for a checkpoint elsewhere call monitor.load_state_dict("
                "torch.load(...)) of its convergence.pt before"
            )
        self._watch.monitor.load_state_dict(torch.load(path, weights_only=True))

    def on_evaluate(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Measure, log the verdict, and end the training if the verdict says so.

        An evaluate() outside a training is ignored: its model is any, such as the best.
        """
        if not self._trainer.is_in_train:
            return
        verdict = self._watch.look(state.global_step, objects.get("optimizer"))
        if verdict is not None:
            self._trainer.log(self._watch.log_entries())
            control.should_training_stop |= verdict.stop

    def on_save(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Save the monitor in the folder of the checkpoint."""
        saved = self._watch.monitor.state_dict()  # of all processes
        if args.should_save:  # with save_on_each_node one process of each node
            torch.save(saved, self._file(args, state))

    def on_train_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Draw the picture."""
        if state.is_world_process_zero:
            self._watch.finish()

    def _file(self, args: Any, state: Any) -> Path:
        folder = self._trainer._get_output_dir(trial=None)
        return Path(folder) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / "convergence.pt"


class _PartsLogger(TrainerCallback):  # type: ignore[misc]
    """A callback that replaces ``trainer.log`` by a function that adds hard and soft loss."""

    def __init__(self, trainer: Trainer, loss: DistillationLoss) -> None:
        self._trainer, self._loss, self._log, self._last = trainer, loss, trainer.log, 0
        self._evaluation = _Parts()
        trainer.log = self._log_with_parts

    def on_train_begin(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Reset the sums and the step: a resumed training does not begin with step 0."""
        self._last, self._loss.training_parts = state.global_step, _Parts()
        self._evaluation = _Parts()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Add the losses of a batch, of all processes and each row once, as Trainer's loop does."""
        parts, self._loss.evaluated = self._loss.evaluated, None
        if parts is not None:
            rows = self._scale() * parts.repeat(args.eval_batch_size, 1)
            self._evaluation.add(self._trainer.accelerator.gather_for_metrics(rows))

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any, **unused: Any) -> None:
        """Drop the sums: Trainer.predict logs nothing, and is no part of the next evaluation."""
        self._evaluation = _Parts()

    def _log_with_parts(self, logs: dict[str, float], *arguments: Any, **keywords: Any) -> None:
        """Add hard and soft loss to `logs`, in place, if these have a loss; then log them."""
        if "loss" in logs:
            step = self._trainer.state.global_step
            logs.update(self._training_means(step - self._last))
            self._last = step
        elif prefix := _prefix_of_evaluation(logs):
            parts, self._evaluation = self._evaluation, _Parts()
            if parts.sums is not None:  # None: the train_loss of a whole training
                logs.update(_log_entries(parts.sums / parts.count, prefix))
        self._log(logs, *arguments, **keywords)

    def _training_means(self, steps: int) -> dict[str, float]:
        """Return log entries: mean hard and soft loss over the last `steps` and all processes.

        They are {} if no loss was computed. The sums are reset. Every process must call it.
        """
        parts, self._loss.training_parts = self._loss.training_parts, _Parts()
        if steps <= 0 or parts.sums is None:
            return {}
        means = self._trainer.accelerator.reduce(parts.sums / steps, "mean")
        return _log_entries(self._scale() * means, "")

    def _scale(self) -> int:
        """Return the factor by which Trainer.compute_loss multiplies a loss per counted token."""
        accelerator, args = self._trainer.accelerator, self._trainer.args
        is_scaled = args.average_tokens_across_devices and self._loss.has_num_items
        return int(accelerator.num_processes) if is_scaled else 1


def _prefix_of_evaluation(logs: dict[str, float]) -> str | None:
    """Return the prefix in a log of both a loss and a runtime; None for any other log.

    It is ``eval_``, ``eval_name_`` for one of several data sets, or ``train_`` after a training.
    """
    prefixes = (key.removesuffix("runtime") for key in logs if key.endswith("_runtime"))
    return next((prefix for prefix in prefixes if f"{prefix}loss" in logs), None)


def _log_entries(parts: Tensor, prefix: str) -> dict[str, float]:
    """Return hard and soft loss (2,) as log entries, read from the device."""
    hard, soft = parts.tolist()
    return {f"{prefix}hard_loss": hard, f"{prefix}soft_loss": soft}
