"""The conventions of other frameworks, as keywords of :class:`fused_kd.KDLoss`.

``KDLoss.like("liger", temperature=2.0)`` computes Liger's loss: its weights, its divergence, no
factor T², its denominator. CONVENTIONS holds each framework's defaults; the caller's keywords
override them. ``beta`` has the framework's own meaning: for "liger", "swift" and "trl", 0 and 1 are
forward and reverse KL; for "kdflow" it weighs the student.

Two frameworks compute what no keyword does. "model_optimizer" divides by N·V by default: the preset
has its ``reduction="none"``, and fused_kd.integrations.model_optimizer divides. "torchtune" returns
the soft cross-entropy, which is larger by the teacher's entropy and has the same gradient. If a
framework divides by its own count, pass that count as ``num_items`` of the call (Automodel's
``num_batch_labels``, KDFlow's ``avg_token_num``, the batch size for TRL's "batchmean" without
labels). ms-swift's loss is TRL's.

**Top-k teachers.** TAILS has the ``tail`` of a :class:`fused_kd.TopK` with which a preset computes
the framework's loss of a teacher's most likely tokens. "megatron" (Megatron-LM's cached logits),
"nemo_rl" and "verl" have no other teacher. For NeMo-RL's ``kl_type: reverse`` pass
``divergence="reverse_kl"``. Frameworks with a "bucket" compute the student's tail as 1 - Σ p and
clamp it; here it is summed.
"""

from __future__ import annotations

from numbers import Real
from typing import Any, NamedTuple


class Convention(NamedTuple):
    """A framework's defaults, as keywords of KDLoss."""

    hard_weight: float
    soft_weight: float
    divergence: str
    soft_scale: str
    reduction: str = "mean"
    temperature: float = 1.0
    label_smoothing: float = 0.0


# fmt: off
CONVENTIONS = {  # comment: the framework's own entry point
    "automodel":       Convention(0.0, 1.0, "forward_kl", "t2"),    # KDLoss
    "distillkit":      Convention(0.0, 1.0, "forward_kl", "t2"),    # KLDLoss
    "fla":             Convention(0.0, 1.0, "forward_kl", "none"),  # FusedKLDivLoss; no labels
    "kdflow":          Convention(0.5, 0.5, "forward_kl", "none"),  # kd_ratio=0.5
    "liger":           Convention(0.5, 0.5, "jsd", "none"),         # LigerFusedLinearJSDLoss
    "megatron":        Convention(0.5, 0.5, "forward_kl", "none"),  # kd_loss_alpha=0.5
    "model_optimizer": Convention(0.0, 1.0, "forward_kl", "t2", "none"),  # LogitsDistillationLoss
    "nemo_rl":         Convention(0.0, 1.0, "forward_kl", "none"),  # DistillationLossFn
    "swift":           Convention(0.0, 1.0, "jsd", "none"),         # gkd_loss
    "torchdistill":    Convention(0.5, 0.5, "forward_kl", "t2"),    # KDLoss(alpha=0.5)
    "torchtune":       Convention(0.0, 1.0, "forward_kl", "none"),  # ForwardKLLoss
    "trl":             Convention(0.0, 1.0, "jsd", "none"),         # generalized_jsd_loss
    "verl":            Convention(0.0, 1.0, "forward_kl", "none"),  # forward_kl_topk
}
# fmt: on

# fmt: off
#: What each framework's loss of a top-k teacher says of the tokens outside the support: the `tail`
#: of the TopK that computes it. verl's differs by a factor and a constant of each row, and is
#: :func:`fused_kd.integrations.verl.forward_kl_topk`.
TAILS = {  # comment: the framework's own setting or entry point
    "axolotl":         "renormalize",  # kd_normalize_topk: true
    "distillkit":      "zero",         # MissingProbabilityHandling.ZERO
    "megatron":        "bucket",       # topk_kl_div(add_ghost_token=True)
    "model_optimizer": "renormalize",  # TopKLogitsKLLoss
    "nemo_rl":         "renormalize",  # zero_outside_topk: false
    "swift":           "renormalize",  # gkd_loss with a top-k teacher
    "trl":             "bucket",       # ServerDistillationTrainer, loss_add_tail=True
    "verl":            "zero",         # forward_kl_topk
}
# fmt: on


def keywords(name: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """Return a framework's keywords of KDLoss, overridden by those of the caller.

    A caller's `beta` has the framework's meaning, and is translated to that of KDLoss: for "liger",
    "swift" and "trl", 0 and 1 choose forward and reverse KL; for "kdflow", any beta chooses "jsd".
    A `divergence` of the caller overrides this choice.

    Args:
        name: a key of CONVENTIONS.
        overrides: the caller's keywords of KDLoss, not checked here.

    Raises:
        ValueError: No convention has this name.
    """
    if not isinstance(name, str) or name not in CONVENTIONS:
        known = ", ".join(repr(key) for key in CONVENTIONS)
        sparse = (
            ", whose teacher is top-k log-probabilities, not logits: use "
            "fused_kd.integrations.axolotl"
        )
        raise ValueError(
            f"name must be one of {known}; got {name!r}{sparse if name == 'axolotl' else ''}"
        )
    merged = {**CONVENTIONS[name]._asdict(), **overrides}
    if not isinstance(overrides.get("beta"), Real):
        return merged
    beta: float = overrides["beta"]
    if name == "kdflow":
        merged["divergence"] = overrides.get("divergence", "jsd")
        if 0 < beta < 1:
            merged["beta"] = 1 - beta
    elif name in ("liger", "swift", "trl") and beta in (0, 1) and "divergence" not in overrides:
        merged["divergence"] = "forward_kl" if beta == 0 else "reverse_kl"
    return merged
