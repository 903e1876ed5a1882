"""Hugging Face Trainer: a ``compute_loss_func`` that holds the teacher, and a Trainer around it.

::

    trainer = Trainer(student, args, train_dataset=..., data_collator=...,
                      compute_loss_func=DistillationLoss(student, teacher, KDLoss(temperature=2.0)))

or ``KDTrainer(student, args, teacher=teacher, loss=LinearKDLoss(temperature=2.0), ...)``, which
logs the hard and the soft part too. `KDLoss` takes the logits of both models; `LinearKDLoss` their
hidden states, and neither model makes logits while it trains.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import KDLossParts
from ..modules import KDLoss, LinearKDLoss
from .calls import Call, Calls, logits_in
from .frameworks import need
from .heads import aligned, check_head, head_of, headless, is_left_out, leave_out_head
from .models import PaddingCheck, check_inputs, check_models
from .parts import check_loss, parts_of

need("transformers")
from transformers import Trainer, TrainerCallback  # noqa: E402

#: What a batch has for the loss; everything else goes to the teacher as it went to the student.
NOT_FOR_THE_TEACHER = ("labels", "shift_labels", "num_items_in_batch", "use_cache", "return_dict")


@dataclass
class _Parts:
    """Sums since they were logged last; on the device, so that nothing waits for them."""

    sums: Tensor | None = None  # (2,): hard, soft
    count: int = 0

    def add(self, parts: Tensor) -> None:  # (..., 2)
        rows = parts.reshape(-1, 2)
        self.sums = rows.sum(0) + (0 if self.sums is None else self.sums)
        self.count += len(rows)


class DistillationLoss:
    """For ``Trainer(compute_loss_func=...)``: hard and soft loss of a language model.

    The labels are those of the batch, not shifted: it is done here. The sum over the kept tokens is
    divided by the Trainer's ``num_items_in_batch``, so an update does not depend on how its batch
    is cut into micro-batches or spread over processes. The teacher is called with what the student
    was called with, without gradient, under the same autocast.

    With a :class:`fused_kd.LinearKDLoss` the student's lm_head passes its input on while the
    student is in training mode; in evaluation the logits are made, and returned to the Trainer.

    Args:
        student: the model that the Trainer trains, before it is wrapped.
        teacher: a model of the same vocabulary in evaluation mode, on the student's device.
        loss: KDLoss or LinearKDLoss, with ``reduction="mean"``; its ``ignore_index`` must be -100,
            the Trainer's.
        shift: whether labels are those of the inputs, to be shifted to the next token. False:
            ``labels[i]`` belongs to ``logits[i]``, and the models may be of any kind (masked
            language models, classifiers, encoder-decoders).

    Raises:
        TypeError: student, teacher or loss of another kind; with a LinearKDLoss an lm_head that is
            not a plain nn.Linear.
        ValueError: a model that is not causal, if labels are shifted; another vocabulary; a
            parameter that both models have; a router whose aux_loss would be lost; a teacher in
            training mode; with a LinearKDLoss logits that are soft-capped or otherwise changed
            after the lm_head, or a student of another such loss.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        loss: KDLoss | LinearKDLoss | None = None,
        *,
        shift: bool = True,
    ) -> None:
        self.loss = KDLoss() if loss is None else loss
        self.student, self.teacher, self.shift = student, teacher, shift
        self._check()
        self.training_parts = _Parts()
        self.evaluated: Tensor | None = None  # (2,): hard and soft loss of the last batch
        self.has_num_items = False  # whether the Trainer counted tokens for the last loss
        self._calls, self._check_padding = Calls(), PaddingCheck()
        self._undo: list[Callable[[], None]] = []
        if isinstance(self.loss, LinearKDLoss):
            check_head(student)
            check_head(teacher)
            self._undo.append(leave_out_head(student))
        self._undo += self._calls.listen(student)

    def __call__(
        self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Return the loss, as Trainer.compute_loss asks for it.

        Args:
            outputs: of the student, with logits (B, S, V).
            labels: (B, S), -100 where a token does not count; None if the student was called with
                ``shift_labels``.
            num_items_in_batch: kept tokens of the whole update; None: of this batch.

        Raises:
            RuntimeError: outputs that cannot be assigned to a call of the student.
            ValueError: labels that are absent, in training also if there are ``shift_labels`` but
                no `num_items_in_batch`; inputs that are one model's own; a teacher in training
                mode; a student whose lm_head another loss bypasses.
        """
        self.has_num_items = num_items_in_batch is not None
        given = logits_in(outputs)
        call = self._calls.take(given)
        inputs = call.named(self.student)
        targets = self._targets(labels, inputs)
        self._check_padding(labels, inputs)
        with call.again(given.device):
            parts = self._parts(given, call, inputs, targets, num_items_in_batch)
        both = torch.stack([parts.hard, parts.soft])
        if self.student.training:
            self.training_parts.add(both)
        else:
            self.evaluated = both
        return parts.loss

    def remove(self) -> None:
        """Gives the student back as it was: for whoever goes on training it with another loss."""
        while self._undo:
            self._undo.pop()()

    # ------------------------------------------------------------------------------ the parts

    def _parts(
        self,
        given: Tensor,  # (B, S, V) logits, or (B, S, H) if the call was headless
        call: Call,
        inputs: dict[str, Any],
        labels: Tensor,
        num_items: Tensor | int | None,
    ) -> KDLossParts:
        is_linear = isinstance(self.loss, LinearKDLoss)
        if not is_linear and call.is_headless and is_left_out(self.student):
            raise ValueError(
                "student's lm_head is bypassed by another DistillationLoss, of a LinearKDLoss, so "
                "it returned hidden states: call remove() on that loss first (loss.remove())"
            )
        if not (is_linear and call.is_headless):
            return parts_of(self.loss, given, self._teach(inputs), labels, num_items)
        with headless(self.teacher):
            taught = self._teach(inputs)
        heads = head_of(self.student), head_of(self.teacher)
        return parts_of(self.loss, given, taught, labels, num_items, heads)

    def _teach(self, inputs: dict[str, Any]) -> Tensor:
        """Return the teacher's logits for the student's inputs; its hidden states if headless."""
        if self.teacher.training:
            raise ValueError("teacher is in training mode, with dropout: call teacher.eval()")
        check_inputs(self.student, inputs)
        keywords = {k: v for k, v in inputs.items() if k not in NOT_FOR_THE_TEACHER}
        with torch.no_grad():
            logits: Tensor = self.teacher(**keywords, use_cache=False).logits
        return logits

    def _targets(self, labels: Tensor | None, inputs: dict[str, Any]) -> Tensor:
        ready = inputs.get("shift_labels")
        if not isinstance(ready, Tensor):
            return aligned(labels, self.shift)
        if labels is None and self.student.training and not self.has_num_items:
            raise ValueError(
                "labels are absent from the batch, which has shift_labels alone: Trainer counts "
                "tokens by labels, and without a count it does not divide by "
                "gradient_accumulation_steps: keep labels in the batch, or give num_items_in_batch"
            )
        return ready

    # ----------------------------------------------------------------------------- at the start

    def _check(self) -> None:
        for name in ("student", "teacher"):
            model = getattr(self, name)
            if not isinstance(model, nn.Module) or not hasattr(model, "get_output_embeddings"):
                raise TypeError(
                    f"{name} must be a model of transformers; got "
                    f"{'None' if model is None else type(model).__name__}"
                )
        check_loss(self.loss, is_mean=True)
        check_models(self.student, self.teacher, shift=self.shift)
        if self.teacher.training:
            raise ValueError("teacher is in training mode, with dropout: call teacher.eval()")


class KDTrainer(Trainer):  # type: ignore[misc]
    """A Trainer that distils, and logs ``hard_loss`` and ``soft_loss`` beside ``loss``.

    Args:
        teacher: see :class:`DistillationLoss`; moved to the student's device.
        loss: KDLoss or LinearKDLoss.
        shift: see :class:`DistillationLoss`.
        everything else: as transformers.Trainer; ``compute_loss_func`` is taken.

    Raises:
        TypeError, ValueError: as DistillationLoss; ``compute_loss_func``, ``model_init`` or
            ``label_smoothing_factor`` are given; several GPUs in one process.
    """

    def __init__(
        self,
        *arguments: Any,
        teacher: nn.Module,
        loss: KDLoss | LinearKDLoss | None = None,
        shift: bool = True,
        **keywords: Any,
    ) -> None:
        if keywords.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func is what KDTrainer itself sets; got one")
        super().__init__(*arguments, **keywords)
        if self.model_init is not None:
            raise ValueError(
                "model_init makes another student in train() than the one whose head and inputs "
                "the loss knows: give model, and make a KDTrainer for each trial of a search"
            )
        if self.args.label_smoothing_factor != 0:
            raise ValueError(
                "label_smoothing_factor is what Trainer's own loss smooths by, which is not used "
                f"here; got {self.args.label_smoothing_factor}: give "
                "loss=KDLoss(label_smoothing=...), or LinearKDLoss"
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                "KDTrainer: one process with several GPUs is torch's DataParallel, which splits "
                "outputs; start a process for each GPU with torchrun, or set CUDA_VISIBLE_DEVICES"
            )
        if isinstance(teacher, nn.Module) and self.place_model_on_device:
            teacher.to(self.args.device)
        self.compute_loss_func = DistillationLoss(self.model, teacher, loss, shift=shift)
        self._loss_shifts_labels = shift  # whether Trainer's count leaves out each row's first
        log_parts(self)


def log_parts(trainer: Trainer) -> None:
    """Adds hard_loss and soft_loss to whatever a trainer with a DistillationLoss logs.

    They are means as ``loss`` is, over the steps since the last log; ``eval_hard_loss`` and
    ``eval_soft_loss`` over an evaluation. They are read from the device when the loss is.

    Raises:
        TypeError: the trainer's compute_loss_func is no DistillationLoss.
    """
    loss = trainer.compute_loss_func
    if not isinstance(loss, DistillationLoss):
        raise TypeError(
            f"trainer.compute_loss_func must be a DistillationLoss; got {type(loss).__name__}"
        )
    trainer.add_callback(_PartsLogger(trainer, loss))


class _PartsLogger(TrainerCallback):  # type: ignore[misc]
    """Stands between a trainer and its log."""

    def __init__(self, trainer: Trainer, loss: DistillationLoss) -> None:
        self._trainer, self._loss, self._log, self._last = trainer, loss, trainer.log, 0
        self._evaluation = _Parts()
        trainer.log = self._log_with_parts

    def on_train_begin(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Counts from here: a resumed training does not begin with step 0."""
        self._last, self._loss.training_parts = state.global_step, _Parts()
        self._evaluation = _Parts()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Adds a batch of all processes, each row once, as Trainer.evaluation_loop does."""
        parts, self._loss.evaluated = self._loss.evaluated, None
        if parts is not None:
            rows = self._scale() * parts.repeat(args.eval_batch_size, 1)
            self._evaluation.add(self._trainer.accelerator.gather_for_metrics(rows))

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any, **unused: Any) -> None:
        """Trainer.predict logs nothing, and is no part of the next evaluation."""
        self._evaluation = _Parts()

    def _log_with_parts(self, logs: dict[str, float], *arguments: Any, **keywords: Any) -> None:
        if "loss" in logs:
            step = self._trainer.state.global_step
            logs.update(self._training_means(step - self._last))
            self._last = step
        elif prefix := _prefix_of_evaluation(logs):
            parts, self._evaluation = self._evaluation, _Parts()
            if parts.sums is not None:  # None: the train_loss of a whole training
                logs.update(_named(parts.sums / parts.count, prefix))
        self._log(logs, *arguments, **keywords)

    def _training_means(self, steps: int) -> dict[str, float]:
        """Over the steps and all processes."""
        parts, self._loss.training_parts = self._loss.training_parts, _Parts()
        if steps <= 0 or parts.sums is None:
            return {}
        means = self._trainer.accelerator.reduce(parts.sums / steps, "mean")
        return _named(self._scale() * means, "")

    def _scale(self) -> int:
        """What Trainer.compute_loss multiplies a loss by that was divided by a count of tokens."""
        accelerator, args = self._trainer.accelerator, self._trainer.args
        is_scaled = args.average_tokens_across_devices and self._loss.has_num_items
        return int(accelerator.num_processes) if is_scaled else 1


def _prefix_of_evaluation(logs: dict[str, float]) -> str | None:
    """Of its loss and runtime: eval_, for one of several sets eval_name_; None: another log."""
    prefixes = (key.removesuffix("runtime") for key in logs if key.endswith("_runtime"))
    return next((prefix for prefix in prefixes if f"{prefix}loss" in logs), None)


def _named(parts: Tensor, prefix: str) -> dict[str, float]:
    """For a log."""
    hard, soft = parts.tolist()
    return {f"{prefix}hard_loss": hard, f"{prefix}soft_loss": soft}
