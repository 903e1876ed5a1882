"""Checks of a student and a teacher before training, and of the inputs of both."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ...checks import may_read_values
from .heads import is_bypassed, output_of
from .labels import IGNORE_INDEX

#: Names of the weight of a router's aux_loss.
ROUTER_WEIGHTS = ("router_aux_loss_coef", "aux_loss_coef")
#: Names of the child that torch.compile and FSDP1 wrap.
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module")
#: Names of the cache argument of generate(), in different versions of transformers.
CACHES = ("past_key_values", "cache", "cache_params")
#: Endings of the arguments that carry one model's own embeddings or encoder states. Not
#: encoder_hidden_states, which a decoder without an encoder gets from a third model.
_STATES = ("inputs_embeds", "encoder_outputs")
#: Model types with BERT's is_decoder, in addition to those named bert; with XLM's causal.
_LIKE_BERT = ("big_bird", "data2vec-text", "electra", "ernie", "roformer", "xmod")
_LIKE_XLM = ("xlm", "flaubert")
#: End of the message of an adapter that has the argument shift.
SHIFT_FALSE = (
    "if labels[i] belongs to logits[i] (of a causal model: if you have shifted them), pass "
    "shift=False, or call KDLoss in your own training loop"
)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside all wrappers (DDP, DataParallel, FSDP1, torch.compile, PEFT).

    Adapters stay in it. DeepSpeed's engine is not unwrapped.
    """
    inner = _inside(model)
    return model if inner is None else unwrapped(inner)


def _inside(model: nn.Module) -> nn.Module | None:
    """Return the module inside one wrapper; None if the model is not wrapped."""
    if isinstance(model, (DistributedDataParallel, nn.DataParallel)):
        inner: nn.Module = model.module
        return inner
    for name in _WRAPPED:
        if name in dict(model.named_children()):
            return model.get_submodule(name)
    if hasattr(type(model), "get_base_model"):  # of PEFT's models
        return model.get_base_model()  # type: ignore[operator,no-any-return]
    return None


def names_of_arguments(model: nn.Module) -> list[str]:
    """Return the names of the model's positional arguments, in order.

    Those of a wrapper whose forward has ``*args`` are the names of the model inside it.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    inner = _inside(model)
    if inner is not None and any(x.kind is x.VAR_POSITIONAL for x in parameters):
        return names_of_arguments(inner)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [x.name for x in parameters if x.kind in kinds]


def check_models(student: nn.Module, teacher: nn.Module | None, *, shift: bool) -> None:
    """Refuse two models between which the loss would not be the intended one.

    Args:
        student: the model to train, wrapped or not.
        teacher: the model to learn from, wrapped or not; None: it is in the batches, and what
            concerns it is not checked.
        shift: whether labels are shifted to the next token, which only causal models predict.

    Raises:
        TypeError: Vocabularies are compared, but a model has neither an lm_head nor a config.
        ValueError: Both models have the same parameter or module; a model is not causal, if labels
            are shifted; the vocabularies differ in size (compared if both models have
            get_output_embeddings(); without `shift`, if both have an lm_head); the student's
            lm_head is already bypassed, or a router's aux_loss would be lost.
    """
    if teacher is not None:
        _check_shared("parameters", student.parameters(), teacher.parameters())
        with_state = (filter(_has_mode_or_state, x.modules()) for x in (student, teacher))
        _check_shared("modules", *with_state)
        teacher = unwrapped(teacher)
    student = unwrapped(student)
    if shift:
        check_causal(student, teacher, SHIFT_FALSE)
    if teacher is not None and _are_comparable(student, teacher, shift):
        check_vocabularies(student, teacher)
    if is_bypassed(student):
        raise ValueError(
            "student's lm_head is already bypassed by another DistillationLoss, or student is a "
            "copy of such a model: call remove() on that loss first (loss.remove()), before copying"
        )
    _check_router(student)


def check_causal(student: nn.Module, teacher: nn.Module | None, way_out: str) -> None:
    """Refuse a model whose labels must not be shifted to the next token.

    Args:
        student: a model, wrapped or not; one without can_generate(), such as a plain module, is
            assumed to be causal.
        teacher: the same, or None.
        way_out: what to do instead, for the message.

    Raises:
        ValueError: A model is a masked language model, a classifier, an encoder-decoder, or attends
            to the token that it predicts.
    """
    for name, wrapped in (("student", student), ("teacher", teacher)):
        model = None if wrapped is None else unwrapped(wrapped)
        reason = None if model is None else _why_not_causal(model)
        if reason is not None:
            raise ValueError(
                f"{name} must be a causal language model, since labels are shifted to the next "
                f"token here; got {type(model).__name__}, {reason}: {way_out}"
            )


def _why_not_causal(model: nn.Module) -> str | None:
    """Return, for a message, why a model's labels must not be shifted; None if they may be."""
    can_generate: Any = getattr(model, "can_generate", None)
    config: Any = getattr(model, "config", None)
    if _is_encoder_decoder(model):
        return "an encoder-decoder, whose labels are aligned with its decoder's logits"
    if callable(can_generate) and not can_generate():
        return (
            "which does not predict the next token (can_generate() is False; if the model is "
            "causal, derive its class from transformers.GenerationMixin too)"
        )
    if _attends_to_later_tokens(config):
        return (
            "which attends to the token that it predicts (a BERT is causal with is_decoder=True in "
            "its config, an XLM with causal=True)"
        )
    return None


def _attends_to_later_tokens(config: Any) -> bool:
    """Return whether the config is of a model that is not causal, although it can generate."""
    kind = str(getattr(config, "model_type", ""))
    if kind in _LIKE_XLM:
        return not config.causal
    if "bert" in kind or kind in _LIKE_BERT:
        return not getattr(config, "is_decoder", True)
    return kind == "xlnet"


def _is_encoder_decoder(model: nn.Module) -> bool:
    """Return whether the model's config says that it is an encoder-decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def check_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Refuse inputs of the student that the teacher cannot be called with.

    Args:
        model: the model that gets the inputs, usually the student; wrapped or not.
        inputs: the arguments of the model, by name; one that is None counts as absent.

    Raises:
        ValueError: The inputs include embeddings, encoder states or a cache, which belong to one
            model; or they lack decoder_input_ids, which an encoder-decoder with an lm_head needs.
    """
    for name, value in inputs.items():
        if value is not None and name.endswith(_STATES):
            raise ValueError(
                f"{name} must not be in the batch, since the teacher is called with the student's "
                f"inputs but has its own embeddings and encoder; got {name}: pass input_ids"
            )
        if value is not None and name in CACHES:
            raise ValueError(
                f"{name} must not be in the batch, since the teacher is called with the student's "
                f"inputs and would read and extend a cache of the student's keys; got {name}: pass "
                "whole sequences"
            )
    model = unwrapped(model)
    needs_ids = _is_encoder_decoder(model) and output_of(model) is not None  # a classifier: None
    if needs_ids and inputs.get("decoder_input_ids") is None:
        raise ValueError(
            "decoder_input_ids must be in the batch, since an encoder-decoder is called without "
            "labels here and cannot make them; got none: make them from the labels with "
            "DataCollatorForSeq2Seq(tokenizer, model=student)"
        )


def check_vocabularies(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse two unwrapped models whose vocabularies differ in size.

    Raises:
        TypeError: A model has neither an lm_head nor a config.
        ValueError: The sizes differ.
    """
    student_size, teacher_size = vocabulary_of(student), vocabulary_of(teacher)
    if student_size != teacher_size:
        larger = "student" if student_size > teacher_size else "teacher"
        raise ValueError(  # enlarging the other one would give probability to no token
            f"student and teacher must share a vocabulary: vocab_size is {student_size} in the "
            f"student and {teacher_size} in the teacher. If they have one tokenizer and only their "
            f"padding differs, {larger}.resize_token_embeddings({min(student_size, teacher_size)}) "
            "makes them equal"
        )


def vocabulary_of(model: nn.Module) -> int:
    """Return an unwrapped model's vocabulary size: rows of the lm_head's weight, else its config's.

    Raises:
        TypeError: The model has neither an lm_head nor a config.
    """
    weight = getattr(output_of(model), "weight", None)
    if weight is not None and weight.dim() == 2:
        return int(weight.shape[0])
    config: Any = getattr(model, "config", None)
    if config is None:
        raise TypeError(
            "a model must have a config with vocab_size, as Hugging Face models do, or "
            f"get_output_embeddings() that returns its lm_head; got {type(model).__name__}"
        )
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(text.vocab_size)


class PaddingCheck:
    """A check of the first batch with padding: it warns if labels are not -100 in the padding.

    Padding is where attention_mask is 0. Batches whose values cannot be read without blocking (on a
    GPU), or at all (under ``torch.compile``), are skipped.
    """

    def __init__(self) -> None:
        self._is_done = False

    def __call__(self, labels: Tensor | None, inputs: Mapping[str, Any]) -> None:
        """Check the labels of a batch, (B, S), not shifted; `inputs` are the models', by name.

        Skipped too are batches without labels or attention_mask, with labels of another shape, or
        with decoder_input_ids.
        """
        mask: Tensor | None = inputs.get("attention_mask")
        if self._is_done or labels is None or mask is None or not may_read_values(labels):
            return
        if inputs.get("decoder_input_ids") is not None or labels.shape != mask.shape:
            return  # the mask is not that of the labels
        is_padding = mask == 0
        self._is_done = bool(is_padding.any())
        if ((labels != IGNORE_INDEX) & is_padding).any():
            warnings.warn(
                "labels should be -100 where attention_mask is 0; got others there, so padding is "
                "trained on: use labels.masked_fill(attention_mask == 0, -100)",
                UserWarning,
                stacklevel=2,
            )


def _check_shared(kind: str, student_parts: Iterable[Any], teacher_parts: Iterable[Any]) -> None:
    """Refuse models that share parts: a step or mode of one would change the other.

    Raises:
        ValueError: A part of the student is also the teacher's; the message calls parts `kind`.
    """
    shared = {id(x) for x in student_parts} & {id(x) for x in teacher_parts}
    if shared:
        raise ValueError(
            f"teacher must be another model than the student, with its own {kind}; got "
            f"{len(shared)} that are also the student's: copy.deepcopy the teacher, and before "
            "get_peft_model if that makes the student of the same model"
        )


def _has_mode_or_state(module: nn.Module) -> bool:
    """Return whether a module has parameters, buffers or a mode, so that models must not share it.

    Shared dropout would be switched off by eval() of one model. A shared norm would average over
    the inputs of both. An activation, which models of transformers share, has none of the three.
    """
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    code = getattr(inspect.unwrap(module.forward), "__code__", None)
    return bool(own) or code is None or "training" in code.co_names


def _are_comparable(student: nn.Module, teacher: nn.Module, shift: bool) -> bool:
    """Return whether vocabulary_of() is the number of logits of both models, which are unwrapped.

    It is not for classifiers: with `shift`, check_causal() must have refused them before. Models
    without get_output_embeddings() are not compared.
    """
    if not shift:
        return all(output_of(model) is not None for model in (student, teacher))
    return all(hasattr(model, "get_output_embeddings") for model in (student, teacher))


def _check_router(student: nn.Module) -> None:
    """Refuse a mixture of experts whose aux_loss, a term of the model's loss only, would be lost.

    Raises:
        ValueError: Its config has output_router_logits=True and a weight of aux_loss that is not 0.
    """
    config: Any = getattr(student, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    weights = [getattr(x, n, None) for n in ROUTER_WEIGHTS for x in (student, text, config)]
    weight = next((x for x in weights if x is not None), 0.0)
    if weight and any(getattr(x, "output_router_logits", False) for x in (text, config)):
        raise ValueError(
            f"student's config must not have output_router_logits=True, since the loss of "
            f"{type(student).__name__}, to which it adds its router's aux_loss, times {weight}, is "
            "not used here; got True: set output_router_logits=False to train without aux_loss"
        )
