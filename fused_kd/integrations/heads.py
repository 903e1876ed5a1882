"""The lm_heads of Hugging Face causal language models: left out, probed, compared.

A model's ``forward`` ends with ``logits = f(lm_head(hidden))``. At the linear level the loss
multiplies by the head itself, chunk by chunk, so the model is asked for ``f(hidden)``: its head
passes on what it is given. For a plain head ``f`` is the identity; for a scaled one (Cohere,
Granite) it is a factor c, and c·h·W = c·(h·W), so the scale is kept. Anything else, a soft-cap
(Gemma-2) above all, does not commute with the product, and :func:`check_head` refuses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

#: The head's output in the probe reaches from minus to plus this: far beyond any soft-cap.
PROBE = 1e4
#: Largest relative deviation from a pure factor; beyond what bfloat16 rounds twice.
TOLERANCE = 0.01
#: Of a label that does not count.
IGNORED = -100


def shifted(labels: Tensor) -> Tensor:  # (B, S) -> (B, S)
    """Labels as a causal language model is trained on: the next token's, none for the last.

    The labels are shifted, never the logits: a slice of the logits costs a second gradient.
    """
    return nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORED)


def head_of(model: nn.Module) -> nn.Linear:
    """The model's lm_head.

    Raises:
        TypeError: it has none, or one that does more than multiply by its weight and add its bias
            (an adapter, a quantised layer).
    """
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        found = "none" if head is None else f"a {type(head).__name__}"
        raise TypeError(
            f"{type(model).__name__}: the linear level needs an lm_head that is a plain nn.Linear; "
            f"found {found}: use the logits level, KDLoss"
        )
    return head


def check_vocabularies(student: nn.Module, teacher: nn.Module) -> None:
    """Refuses two models whose logits cannot be compared.

    Raises:
        ValueError: their vocabularies differ in size.
    """
    of_student, of_teacher = vocabulary_of(student), vocabulary_of(teacher)
    if of_student != of_teacher:
        raise ValueError(
            f"student and teacher must share a vocabulary: vocab_size is {of_student} in the "
            f"student and {of_teacher} in the teacher. If they have one tokenizer and only their "
            f"padding differs, teacher.resize_token_embeddings({of_student}) makes them equal"
        )


def vocabulary_of(model: nn.Module) -> int:
    """Entries of the model's logits; its head, where there is one, over its configuration."""
    find = getattr(model, "get_output_embeddings", None)
    weight = getattr(find() if find is not None else None, "weight", None)
    if weight is not None and weight.dim() == 2:
        return int(weight.shape[0])
    config: Any = getattr(model, "config", None)
    if config is None:
        raise TypeError(
            f"a Hugging Face model is expected, with config; got {type(model).__name__}"
        )
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(text.vocab_size)


def leave_out_head(model: nn.Module, when: Callable[[], bool]) -> Callable[[], None]:
    """Makes the lm_head pass on what it is given, whenever `when()`; returns what undoes it.

    The head's weight stays in the graph, without gradient from here: or DistributedDataParallel,
    looking for unused parameters from the model's outputs, would not wait for the loss's.
    """
    head = head_of(model)
    forward = head.forward

    def forward_or_pass(hidden: Tensor) -> Tensor:
        if when():
            passed: Tensor = _Pass.apply(hidden, head.weight, head.bias)
            return passed
        return forward(hidden)

    return _set_forward(head, forward_or_pass)


def _set_forward(head: nn.Module, forward: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """Returns what puts back what was there: the class's, or that of a hook (as accelerate's)."""
    before = vars(head).get("forward")
    vars(head)["forward"] = forward

    def undo() -> None:
        if before is None:
            del vars(head)["forward"]
        else:
            vars(head)["forward"] = before

    return undo


@contextmanager
def headless(model: nn.Module) -> Iterator[None]:
    """Within, ``model(...).logits`` are the hidden states that its head is to be applied to."""
    undo = leave_out_head(model, lambda: True)
    try:
        yield
    finally:
        undo()


def check_head(model: nn.Module) -> None:
    """Refuses a model whose logits are not a multiple of its head's output, by one tiny forward.

    Raises:
        TypeError: as :func:`head_of`.
        ValueError: the model caps, cuts or otherwise changes its logits; or scales the sum of
            product and bias.
    """
    head, was_training = head_of(model), model.training
    ramp = torch.linspace(-PROBE, PROBE, head.out_features, device=head.weight.device)
    ramp = torch.stack([torch.zeros_like(ramp), ramp])[None].to(head.weight.dtype)  # (1, 2, V)
    undo = _set_forward(head, lambda hidden: ramp)
    try:
        model.eval()
        ids = torch.zeros(1, 2, dtype=torch.int64, device=ramp.device)
        with torch.no_grad():
            given = model(input_ids=ids).logits
    finally:
        model.train(was_training)
        undo()
    _check_scaled(type(model).__name__, ramp.double(), given.double(), head.bias is not None)


def _check_scaled(name: str, ramp: Tensor, given: Tensor, has_bias: bool) -> None:
    """Whether `given` is a multiple of `ramp`, and the same where a bias is added before."""
    is_scaled = ramp.shape == given.shape
    if is_scaled:
        scale = (given * ramp).sum() / ramp.square().sum()
        deviation = (given - scale * ramp).norm(dim=-1)  # nothing may be added to the zeros
        is_scaled = bool((deviation <= TOLERANCE * given.norm(dim=-1)).all())
        if is_scaled and has_bias and abs(scale.item() - 1.0) > TOLERANCE:
            raise ValueError(
                f"{name} multiplies its logits, bias included, by {scale:.4g}: the linear level "
                "cannot; use the logits level, KDLoss"
            )
    if not is_scaled:
        raise ValueError(
            f"{name} changes its logits after the lm_head by more than a factor (soft-capping, as "
            "in Gemma-2, does): the linear level would drop that; use the logits level, KDLoss"
        )


class _Pass(torch.autograd.Function):
    """The first input; the others are in the graph, and get no gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None
