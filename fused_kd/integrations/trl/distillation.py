"""DistillationTrainer: its loss from hidden states and lm_heads, and the student's entropy."""

from __future__ import annotations

import inspect
import math
import types
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...modules import KDLoss
from ...sides import Head
from .._common.heads import TOLERANCE, scale_of
from .._common.labels import IGNORE_INDEX
from .._common.parts import as_tensor
from .trainers import (
    check_arguments,
    check_inherited,
    class_of,
    models_of,
    unknown_version,
)

KIND = "DistillationTrainer"
#: The function of its module that computes its loss, and the arguments in the known versions.
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
#: Names of the factor of the logits; TRL uses the first that a configuration has.
_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


def attributes(trainer: Any, heads: bool, entropy: bool, options: dict[str, Any]) -> dict[str, Any]:
    """Return the attributes to set in a DistillationTrainer; raises as :func:`.use_fused_kd`.

    Its _compute_loss calls the function LOSS of its module, which all trainers share. So the
    trainer gets a copy of the method with other global names, in which LOSS is :func:`called`.
    `heads` is not used: this trainer always has Heads.
    """
    check_inherited(trainer, KIND, "_compute_loss")
    own = class_of(trainer, KIND)._compute_loss
    if LOSS not in own.__globals__ or LOSS not in own.__code__.co_names:
        raise TypeError(f"{KIND}._compute_loss does not call {LOSS} {unknown_version()}")
    KDLoss.like("trl", **options)  # refuses what is out of range
    signature = inspect.signature(own.__globals__[LOSS])
    names = [_RENAMED.get(name, name) for name in signature.parameters]
    check_arguments(LOSS, names, _REQUIRED, _OPTIONAL)
    for which, model in zip(_MODELS, models_of(trainer), strict=True):
        _check_head(which, model, is_scaled="student_logit_scale" in names)
    ours = partial(called, signature, entropy, options)
    names_of_method = {**own.__globals__, LOSS: ours}
    rest = own.__name__, own.__defaults__, own.__closure__
    method = types.FunctionType(own.__code__, names_of_method, *rest)
    method.__kwdefaults__ = own.__kwdefaults__
    return {"_compute_loss": types.MethodType(method, trainer)}


def called(
    signature: inspect.Signature,
    entropy: bool,
    options: dict[str, Any],
    *arguments: Any,
    **keywords: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what TRL's function LOSS does; arguments are bound by name, since their order varies.

    Args:
        signature: the signature of the installed LOSS.
        entropy: whether to compute the student's entropies; without, their sum is NaN, and the
            trainer logs None if all sums are NaN.
        options: keywords of :class:`fused_kd.KDLoss`.
        arguments: positional arguments of LOSS.
        keywords: keyword arguments of LOSS; `chunk_size` is ignored.

    Returns:
        The loss; the sum of the student's entropies over the tokens that count; their number.

    Raises:
        TypeError: The arguments are not those of the signature; or as :func:`fused_kd.kd_loss`.
        ValueError: A soft-cap is passed; or as kd_loss.
    """
    bound = signature.bind(*arguments, **keywords)
    bound.apply_defaults()
    inputs = {_RENAMED.get(name, name): value for name, value in bound.arguments.items()}
    student = _head("student", inputs)
    with torch.no_grad():
        teacher = _head("teacher", inputs)
    kept = inputs["completion_mask"].reshape(student.hidden.shape[:-1]) != 0
    labels = torch.where(kept, 0, IGNORE_INDEX)  # which tokens count: there is no hard term
    temperature = inputs.get("temperature", 1.0)
    num_items = inputs["num_items_in_batch"]
    if isinstance(num_items, Tensor):
        num_items = num_items.to(kept.device)
    loss = KDLoss.like("trl", beta=inputs["beta"], temperature=temperature, **options)(
        student, teacher, labels, num_items=num_items
    )
    total = torch.full((), math.nan, device=kept.device)
    if entropy:
        total = torch.where(kept, entropies(student, labels, temperature, options), 0).sum()
    return as_tensor(loss), total, kept.sum()


@torch.no_grad()
def entropies(student: Head, labels: Tensor, temperature: float, options: dict[str, Any]) -> Tensor:
    """Return the entropies (B, S) of softmax(student / temperature); log V at ignored labels.

    With u uniform over V entries, Σ p log(p/u) = log V - entropy of p: a reverse KL whose teacher's
    logits are zeros, one row expanded to all.
    """
    vocabulary = student.weight.shape[0]
    uniform = student.hidden.new_zeros(vocabulary).expand(*labels.shape, vocabulary)
    reverse_kl = KDLoss(
        hard_weight=0.0,
        soft_weight=1.0,
        divergence="reverse_kl",
        temperature=temperature,
        soft_scale="none",
        reduction="none",
        **options,
    )
    return math.log(vocabulary) - as_tensor(reverse_kl(student, uniform, labels))


def _head(model: str, inputs: dict[str, Any]) -> Head:
    """Return the Head of "student" or "teacher" from the arguments of LOSS, by name.

    Without gradients (the teacher) sharded weights are gathered. Outside autocast the weight is
    cast to the dtype of the hidden states.

    Raises:
        ValueError: The logits are soft-capped.
    """
    hidden, weight, bias = (inputs[f"{model}_{name}"] for name in _TENSORS)
    if inputs.get(f"{model}_final_logit_softcapping") is not None:
        raise ValueError(_capped(model, inputs[f"{model}_final_logit_softcapping"]))
    # A teacher's shards are gathered once. A student's are refused below: the backward of
    # full_tensor() assumes that the gradient is the same on all ranks, which it is not.
    if not torch.is_grad_enabled():
        weight, bias = _whole(weight), _whole(bias)
    if not torch.is_autocast_enabled(hidden.device.type):
        weight = weight.to(hidden.dtype)
    return Head(hidden, weight, bias, inputs.get(f"{model}_logit_scale", 1.0))


def _whole(x: Any) -> Any:
    """Return a teacher's weight or bias gathered, and detached from the graph of FSDP1's views.

    None stays None.
    """
    if x is None:
        return None
    return x.full_tensor().detach() if isinstance(x, DTensor) else x.detach()


def _check_head(which: str, model: nn.Module, is_scaled: bool) -> None:
    """Refuse a model whose head, scale or soft-cap a DistillationTrainer would not apply.

    `is_scaled`: whether this version of TRL multiplies the logits by the scale in the config.

    The scale is measured, not only read: configurations have several names for it and for a
    soft-cap.

    Raises:
        TypeError: The lm_head is not a plain nn.Linear, or has hooks on its output.
        ValueError: The model soft-caps its logits, or scales them by another factor than TRL uses.
    """
    config: Any = model.config
    config = config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    if cap is not None:
        raise ValueError(_capped(which, cap))
    try:
        measured = scale_of(model)
    except (TypeError, ValueError) as error:
        reason = str(error).rpartition(": ")[0]  # without the advice heads=False
        raise type(error)(
            f"the {which} cannot be used with a {KIND}, which needs Heads ({reason}): use a "
            "GKDTrainer with heads=False"
        ) from None
    used = _scale_in(config) if is_scaled else 1.0
    if abs(measured - used) > TOLERANCE * abs(measured):
        raise ValueError(
            f"the {which} scales its logits by {measured:.4g}, and this version of TRL ({KIND}) "
            f"by {used:.4g}: upgrade trl, or train with a GKDTrainer and heads=False, which uses "
            "the model's own logits"
        )


def _scale_in(config: Any) -> float:
    """Return the scale of the logits that TRL reads in a configuration; 1.0 if there is none."""
    for name in _SCALES:
        scale = getattr(config, name, None)
        if scale is not None:
            is_divisor = name == "logits_scaling" and config.model_type != "hyperclovax"
            return float(1 / scale if is_divisor else scale)
    return 1.0


def _capped(which: str, cap: float) -> str:
    """Return the error message for a model with a soft-cap; `which` is "student" or "teacher"."""
    return (
        f"the {which} soft-caps its logits (final_logit_softcapping={cap}), which fused_kd does "
        f"not do with heads: use TRL's own loss in this {KIND}, or train with a GKDTrainer and "
        "heads=False, which uses the model's own logits"
    )
