"""DistilledLM: student, teacher and loss in one module, whose forward gives the loss.

For whatever wraps a module and acts before and after its forward: DistributedDataParallel, FSDP2's
``fully_shard``, accelerate's ``prepare``, Lightning. A loss that takes the lm_head's weight has to
run in there: outside, FSDP2 has put the weight's shards back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..functional import KDLossParts
from ..modules import KDLoss, LinearKDLoss
from .heads import aligned, check_head, head_of, headless
from .models import PaddingCheck, check_inputs, check_models
from .parts import check_loss, parts_of


class DistilledLM(nn.Module):
    """Two language models and the loss between them; call it with a batch.

    ::

        model = DistilledLM(student, teacher, LinearKDLoss(temperature=2.0))
        loss = model(**batch)  # input_ids, attention_mask, labels

    With a :class:`fused_kd.LinearKDLoss` neither model makes logits. The teacher is frozen, runs
    without gradient, stays in evaluation mode whatever ``train()`` says, and is not in
    ``state_dict()``; the student is the attribute `student`.

    Args:
        student: a causal language model of transformers, or a module that is called and answers
            like one (for a KDLoss, also one that returns the logits themselves).
        teacher: the same, of the same vocabulary.
        loss: KDLoss or LinearKDLoss, with ``ignore_index=-100``; None: ``KDLoss()``.
        shift: whether labels are those of the inputs, to be shifted to the next token. False:
            ``labels[i]`` belongs to ``logits[i]``, and the models may be of any kind (masked
            language models, classifiers, encoder-decoders).

    Raises:
        TypeError: a loss of another kind; with a LinearKDLoss an lm_head that is no plain
            nn.Linear.
        ValueError: a model that is not causal, if labels are shifted; another vocabulary; a
            parameter that both models have; a router whose aux_loss would be lost; with a
            LinearKDLoss logits that are soft-capped or otherwise changed after the lm_head.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        loss: KDLoss | LinearKDLoss | None = None,
        *,
        shift: bool = True,
    ) -> None:
        super().__init__()
        loss = KDLoss() if loss is None else loss
        _check(student, teacher, loss, shift)
        self.student, self.loss, self.shift = student, loss, shift
        self._check_padding = PaddingCheck()
        self.teacher = teacher.eval().requires_grad_(False)
        self.register_state_dict_post_hook(_leave_out_teacher)
        self.register_load_state_dict_post_hook(_do_not_miss_teacher)

    def forward(
        self, labels: Tensor, num_items: float | Tensor | None = None, **inputs: Any
    ) -> Tensor | KDLossParts:
        """The loss of a batch, as `loss` returns it.

        Args:
            labels: (B, S), those of the inputs themselves (they are shifted here, unless
                ``shift=False``), -100 where a token does not count.
            num_items: the denominator; see :func:`fused_kd.integrations.distributed.
                global_num_items`. None: the kept tokens of this batch.
            inputs: what both models are called with.
        """
        parts = self.parts(labels, num_items, **inputs)
        return parts if self.loss.options.return_parts else parts.loss

    def parts(
        self, labels: Tensor, num_items: float | Tensor | None = None, **inputs: Any
    ) -> KDLossParts:
        """The loss with its hard and its soft part; arguments as in :meth:`forward`."""
        _check_num_items(num_items)
        targets = aligned(labels, self.shift)
        self._check_padding(labels, inputs)
        if not isinstance(self.loss, LinearKDLoss):
            return parts_of(self.loss, *self._outputs(inputs), targets, num_items)
        with headless(self.student), headless(self.teacher):
            given, taught = self._outputs(inputs)
        heads = head_of(self.student), head_of(self.teacher)
        return parts_of(self.loss, given, taught, targets, num_items, heads)

    def train(self, mode: bool = True) -> DistilledLM:
        """The student's mode; the teacher stays in evaluation."""
        super().train(mode)
        self.teacher.eval()
        return self

    def _outputs(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Of student and teacher: logits, or hidden states where the heads are left out."""
        check_inputs(self.student, inputs)
        with torch.no_grad():  # first: its activations are gone when the student's are kept
            taught = logits_of(self.teacher(**inputs))
        return logits_of(self.student(**inputs)), taught


def logits_of(output: Any) -> Tensor:
    """What a model returned, or its attribute ``logits``."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"a model must return its logits, or an object with logits; got {type(output).__name__}"
        )
    return logits


def _check(
    student: nn.Module, teacher: nn.Module, loss: KDLoss | LinearKDLoss, shift: bool
) -> None:
    for name, model in (("student", student), ("teacher", teacher)):
        if not isinstance(model, nn.Module):
            raise TypeError(f"{name} must be a torch.nn.Module; got {type(model).__name__}")
    check_loss(loss, is_mean=False)
    check_models(student, teacher, shift=shift)
    if isinstance(loss, LinearKDLoss):
        check_head(student)
        check_head(teacher)


def _check_num_items(num_items: float | Tensor | None) -> None:
    """Not cast on its way: 257 tokens would have become 256."""
    if isinstance(num_items, Tensor) and num_items.dtype in (torch.bfloat16, torch.float16):
        raise TypeError(
            f"num_items must not have been rounded to 16 bits; got {num_items.dtype}: FSDP2's "
            "mixed precision casts what the outermost module is called with, unless it gets "
            "MixedPrecisionPolicy(..., cast_forward_inputs=False)"
        )


def _leave_out_teacher(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any
) -> None:
    for name in [name for name in state_dict if name.startswith(f"{prefix}teacher.")]:
        del state_dict[name]


def _do_not_miss_teacher(module: nn.Module, incompatible_keys: Any) -> None:
    own = tuple(f".teacher.{name}" for name in module.get_submodule("teacher").state_dict())
    missing = incompatible_keys.missing_keys  # with the prefix of whatever holds this module
    missing[:] = [name for name in missing if not f".{name}".endswith(own)]
