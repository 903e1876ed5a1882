"""DistillationTrainer: its loss from hidden states and lm_heads, and the student's entropy."""

from __future__ import annotations

import inspect
import math
import types
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...linear import linear_kd_loss
from ...modules import LinearKDLoss
from ..heads import IGNORED, TOLERANCE, scale_of
from .trainers import (
    as_tensor,
    check_arguments,
    check_inherited,
    class_of,
    models_of,
    unknown_version,
)

KIND = "DistillationTrainer"
#: The function of its module that is its loss, and the arguments of the versions known.
LOSS = "_chunked_divergence_loss"
_MODELS, _TENSORS = ("student", "teacher"), ("hidden_states", "lm_head_weight", "lm_head_bias")
_REQUIRED = {f"{model}_{name}" for model in _MODELS for name in _TENSORS}
_REQUIRED |= {"completion_mask", "beta", "num_items_in_batch"}
_OPTIONAL = {f"{m}_{name}" for m in _MODELS for name in ("logit_scale", "final_logit_softcapping")}
_OPTIONAL |= {"temperature", "chunk_size"}
_RENAMED = {
    "student_hidden": "student_hidden_states",
    "teacher_hidden": "teacher_hidden_states",
    "mask": "completion_mask",
}
#: What TRL takes for the factor of the logits: the first that a configuration has.
_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


def attributes(trainer: Any, level: str, entropy: bool, options: dict[str, Any]) -> dict[str, Any]:
    """What to set in a DistillationTrainer.

    Its _compute_loss calls a function of its module, which belongs to everybody. So the trainer
    gets a copy of the method that finds ours under that name: a function looks its names up in the
    dictionary it is made with.
    """
    check_inherited(trainer, KIND, "_compute_loss")
    own = class_of(trainer, KIND)._compute_loss
    if LOSS not in own.__globals__ or LOSS not in own.__code__.co_names:
        raise TypeError(f"{KIND}._compute_loss does not call {LOSS} {unknown_version()}")
    LinearKDLoss.like("trl", **options)  # refuses what is out of range
    signature = inspect.signature(own.__globals__[LOSS])
    names = [_RENAMED.get(name, name) for name in signature.parameters]
    check_arguments(LOSS, names, _REQUIRED, _OPTIONAL)
    for which, model in zip(_MODELS, models_of(trainer), strict=True):
        _check_head(which, model, is_scaled="student_logit_scale" in names)
    ours = partial(called, signature, entropy, options)
    method = types.FunctionType(
        own.__code__, {**own.__globals__, LOSS: ours}, own.__name__, own.__defaults__,
        own.__closure__,
    )  # fmt: skip
    method.__kwdefaults__ = own.__kwdefaults__
    return {"_compute_loss": types.MethodType(method, trainer)}


def called(
    signature: inspect.Signature,
    entropy: bool,
    options: dict[str, Any],
    *arguments: Any,
    **keywords: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """TRL's function: versions order its arguments differently, so they are taken by name.

    Args:
        signature: of the installed one.
        entropy: whether to compute it; NaN otherwise; the trainer logs None where all are.
        options: of :class:`fused_kd.LinearKDLoss`.
        arguments: as `signature` has them.
        keywords: the same.

    Returns:
        The loss; the sum of the student's entropies over the tokens that count; their number.
    """
    bound = signature.bind(*arguments, **keywords)
    bound.apply_defaults()
    given = {_RENAMED.get(name, name): value for name, value in bound.arguments.items()}
    student = _head("student", given)
    with torch.no_grad():
        teacher = _head("teacher", given)
    kept = given["completion_mask"].reshape(student.hidden.shape[:-1]) != 0
    labels = torch.where(kept, 0, IGNORED)  # which tokens count: there is no hard term
    temperature = given.get("temperature", 1.0)
    num_items = given["num_items_in_batch"]
    if isinstance(num_items, Tensor):
        num_items = num_items.to(kept.device)
    loss = LinearKDLoss.like("trl", beta=given["beta"], temperature=temperature, **options)(
        student.hidden, student.weight, teacher.hidden, teacher.weight, labels,
        student_bias=student.bias, teacher_bias=teacher.bias, num_items=num_items,
    )  # fmt: skip
    total = torch.full((), math.nan, device=kept.device)
    if entropy:
        total = torch.where(kept, entropies(student, labels, temperature, options), 0).sum()
    return as_tensor(loss), total, kept.sum()


class Head(NamedTuple):
    """What gives a model's logits."""

    hidden: Tensor  # (B, S, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)


@torch.no_grad()
def entropies(student: Head, labels: Tensor, temperature: float, options: dict[str, Any]) -> Tensor:
    """(B, S): of the student's softmax at that temperature, where the labels count.

    With u uniform over V entries, Σ p log(p/u) = log V - entropy of p: a reverse KL whose teacher
    has zeros for logits, one row of which serves for all.
    """
    vocabulary = student.weight.shape[0]
    uniform = student.hidden.new_zeros(vocabulary).expand(*labels.shape, vocabulary)
    lacking = linear_kd_loss(
        student.hidden, student.weight, labels=labels, student_bias=student.bias,
        teacher_logits=uniform, hard_weight=0.0, soft_weight=1.0, divergence="reverse_kl",
        temperature=temperature, soft_scale="none", reduction="none", **options,
    )  # fmt: skip
    return math.log(vocabulary) - as_tensor(lacking)


def _head(model: str, given: dict[str, Any]) -> Head:
    """One model's part of the arguments, as ours takes them."""
    hidden, weight, bias = (given[f"{model}_{name}"] for name in _TENSORS)
    if given.get(f"{model}_final_logit_softcapping") is not None:
        raise ValueError(_capped(model, given[f"{model}_final_logit_softcapping"]))
    # A teacher's shards are gathered once. Of a student they are refused below: the backward of
    # full_tensor() takes the gradient to be the same on all ranks, which it is not.
    if not torch.is_grad_enabled():
        weight, bias = _whole(weight), _whole(bias)
    if not torch.is_autocast_enabled(hidden.device.type):
        weight = weight.to(hidden.dtype)
    scale = given.get(f"{model}_logit_scale", 1.0)
    if scale != 1.0:  # c·(h·W + b) = (c·h)·W + c·b
        hidden, bias = hidden * scale, None if bias is None else bias * scale
    return Head(hidden, weight, bias)


def _whole(x: Any) -> Any:
    """Return a teacher's weight or bias gathered, and without the graph that FSDP1's views have."""
    if x is None:
        return None
    return x.full_tensor().detach() if isinstance(x, DTensor) else x.detach()


def _check_head(which: str, model: nn.Module, is_scaled: bool) -> None:
    """Refuses what would be dropped of a model's head.

    Measured, not only read: configurations have several names for a scale and for a soft-cap.
    """
    config: Any = model.config
    config = config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    if cap is not None:
        raise ValueError(_capped(which, cap))
    try:
        measured = scale_of(model)
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"the {which}: {error}; of TRL's trainers that is GKDTrainer's level 'logits'"
        ) from None
    taken = _scale_in(config) if is_scaled else 1.0
    if abs(measured - taken) > TOLERANCE * abs(measured):
        raise ValueError(
            f"the {which} scales its logits by {measured:.4g}, and this version of TRL ({KIND}) "
            f"by {taken:.4g}: upgrade trl, or train with a GKDTrainer, whose level 'logits' takes "
            "the logits as the model made them"
        )


def _scale_in(config: Any) -> float:
    """As TRL reads it."""
    for name in _SCALES:
        scale = getattr(config, name, None)
        if scale is not None:
            is_divisor = name == "logits_scaling" and config.model_type != "hyperclovax"
            return float(1 / scale if is_divisor else scale)
    return 1.0


def _capped(which: str, cap: float) -> str:
    return (
        f"the {which} soft-caps its logits (final_logit_softcapping={cap}), which fused_kd does "
        f"not do at the level 'linear': leave this {KIND} to TRL's own loss, which does, or train "
        "with a GKDTrainer, whose level 'logits' takes the logits as the model made them"
    )
