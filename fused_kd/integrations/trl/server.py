"""ServerDistillationTrainer: its loss from the log-probabilities of a teacher's server."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ...modules import KDLoss
from ...sides import Head, TopK
from ...teachers.servers import from_trl, with_tail
from .._common.heads import headless, scale_of, side_of
from .._common.labels import IGNORE_INDEX, shifted
from .._common.parts import as_tensor
from .trainers import check_inherited, student_of, unknown_version

KIND = "ServerDistillationTrainer"
#: Methods that are replaced, and those that the replacement does not call.
_METHODS = (
    "compute_loss",
    "_get_teacher_token_logprobs_from_server",
    "_compute_server_forward_kl_loss",
    "_compute_server_sparse_top_1_divergence_loss",
)
_ATTRIBUTES = ("teacher_client", "beta", "temperature", "loss_top_k", "loss_add_tail")
#: The smallest mass that TRL gives to the tail of a teacher or a student.
TAIL_FLOOR = 1e-7


def attributes(trainer: Any, heads: bool, entropy: bool, options: dict[str, Any]) -> dict[str, Any]:
    """Return the attributes to set in a ServerDistillationTrainer; raises as :func:`.use_fused_kd`.

    `entropy` is not used, since this trainer does not log it.
    """
    for method in _METHODS:
        check_inherited(trainer, KIND, method)
    lacking = [name for name in _ATTRIBUTES if not hasattr(trainer, name)]
    if lacking:
        raise TypeError(f"a {KIND} lacks {lacking} {unknown_version()}")
    if trainer.loss_add_tail and trainer.temperature != 1:
        raise ValueError(
            "temperature must be 1 with loss_add_tail=True, since the server's log-probabilities "
            "are at 1 whatever is asked, and the mass of the other tokens at another temperature "
            f"does not follow from them; got {trainer.temperature}: set temperature=1.0, or "
            "loss_add_tail=False, which is exact at any temperature"
        )
    loss = KDLoss.like("trl", beta=trainer.beta, temperature=trainer.temperature, **options)
    return {"compute_loss": _Loss(trainer, student_of(trainer), loss, heads).compute_loss}


class _Loss:
    """The compute_loss of one trainer."""

    def __init__(self, trainer: Any, student: nn.Module, loss: KDLoss, heads: bool) -> None:
        self.trainer, self.student, self.loss, self.heads = trainer, student, loss, heads
        self.scale = scale_of(student) if heads else 1.0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the mean of the divergence over the completion's tokens, and the outputs if asked.

        As in TRL `num_items_in_batch` is not used: the mean of each micro-batch is divided by the
        number of accumulation steps.
        """
        input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        is_completion = torch.zeros_like(mask)
        is_completion[:, inputs["prompt_ids"].shape[1] :] = inputs["completion_mask"]
        labels = shifted(torch.where(is_completion != 0, 0, IGNORE_INDEX))  # which rows count
        teacher = self._teacher(input_ids, mask, inputs["prompt_mask"].sum(1).tolist())
        heads = self.heads and not return_outputs
        with headless(self.student) if heads else nullcontext():
            outputs = model(input_ids=input_ids, attention_mask=mask)
            student: Tensor | Head = outputs.logits
            if heads:
                student = side_of(self.student, outputs.logits, self.scale)
        with self.trainer.accelerator.autocast() if heads else nullcontext():
            loss = as_tensor(self.loss(student, teacher, labels))
        if self.trainer.model.training:
            loss = loss / self.trainer.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def _teacher(self, input_ids: Tensor, mask: Tensor, prompt_lengths: list[int]) -> TopK:
        """Return the server's TopK (B, S, K) for the tokens of each sequence."""
        trainer = self.trainer
        rows = zip(input_ids.cpu(), mask.cpu(), strict=True)
        answer = trainer.teacher_client.get_sequence_logprobs(
            sequences=[ids[kept != 0].tolist() for ids, kept in rows],
            prompt_lengths=prompt_lengths,
            top_logprobs=trainer.loss_top_k,
            temperature=trainer.temperature,
        )
        support = _support(answer, trainer.beta)
        topk = from_trl(support, prompt_lengths, mask, tail="renormalize")
        return with_tail(topk, TAIL_FLOOR) if trainer.loss_add_tail else topk


def _support(answer: dict[str, Any], beta: float) -> dict[str, Any]:
    """Return the entries that TRL compares: the teacher's top k, or for beta > 0 the actual token.

    For beta in (0, 1) it is the teacher's first and the actual token, which is absent if it is the
    same.

    Raises:
        ValueError: The answer lacks the log-probability of an actual token.
    """
    if beta == 0:
        return answer
    actual = {
        "logprob_token_ids": answer["actual_token_ids"],
        "logprobs": answer["actual_logprobs"],
    }
    missing = sum(not math.isfinite(x) for row in actual["logprobs"] for (x,) in row)
    if missing:
        raise ValueError(
            "the teacher's server must return the log-probability of each completion token for "
            f"beta > 0; got none for {missing}: look at the teacher, whose logits may be NaN"
        )
    if beta == 1:
        return actual
    ids, logprobs = [], []
    names = "logprob_token_ids", "logprobs"
    columns = (*(answer[name] for name in names), *(actual[name] for name in names))
    for sequence in zip(*columns, strict=True):
        rows = list(zip(*sequence, strict=True))
        ids.append([[top[0], own[0]] for top, _, own, _ in rows])
        logprobs.append(
            [[x[0], -math.inf if own[0] == top[0] else y[0]] for top, x, own, y in rows]
        )
    return dict(zip(names, (ids, logprobs), strict=True))
