"""Checks of a student and a teacher before they train, and of what they are called with."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..checks import may_look_at_values
from .heads import IGNORED, is_left_out, output_of

#: What models call the weight of their router's aux_loss.
ROUTER_WEIGHTS = ("router_aux_loss_coef", "aux_loss_coef")
#: Children under which torch.compile and FSDP1 keep the module that they wrap.
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module")
#: What a model that generates is called with, under its names in versions of transformers.
CACHES = ("past_key_values", "cache", "cache_params")
#: Endings of the arguments that carry one model's own embeddings or encoder states; not
#: encoder_hidden_states, which a decoder without an encoder has from a third model.
_STATES = ("inputs_embeds", "encoder_outputs")
#: Model types with BERT's is_decoder, beside those that are called so; with XLM's causal.
_LIKE_BERT = ("big_bird", "data2vec-text", "electra", "ernie", "roformer", "xmod")
_LIKE_XLM = ("xlm", "flaubert")
#: For a loop or adapter that has the argument shift.
SHIFT_FALSE = (
    "if labels[i] belongs to logits[i] (of a causal model: if you have shifted them), pass "
    "shift=False, or call KDLoss in a training loop of your own"
)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside DDP, DataParallel, FSDP1, torch.compile and PEFT."""
    inner = _inside(model)
    return model if inner is None else unwrapped(inner)


def _inside(model: nn.Module) -> nn.Module | None:
    """Return what a wrapper holds; None of what is none."""
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
    """Return how the model's positional arguments are called, in their order.

    A wrapper whose forward has ``*args`` passes them on. PEFT's, for a task, has names of its own.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    inner = _inside(model)
    if inner is not None and any(x.kind is x.VAR_POSITIONAL for x in parameters):
        return names_of_arguments(inner)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [x.name for x in parameters if x.kind in kinds]


def check_models(student: nn.Module, teacher: nn.Module, *, shift: bool) -> None:
    """Refuse two models between which the loss would not be what it seems.

    Args:
        student: the model to train, wrapped or not.
        teacher: the model to learn from, wrapped or not.
        shift: whether labels are shifted to the next token, which only causal models predict.

    Raises:
        ValueError: A parameter or a module that both models have; a model that is not causal, if
            labels are shifted; vocabularies that differ in size; a student whose lm_head is
            bypassed already, or whose own loss has a term that would be lost.
    """
    _check_shared("parameters", student.parameters(), teacher.parameters())
    _check_shared("modules", *(filter(_has_mode_or_state, x.modules()) for x in (student, teacher)))
    student, teacher = unwrapped(student), unwrapped(teacher)
    if shift:
        check_causal(student, teacher, SHIFT_FALSE)
    if _are_comparable(student, teacher, shift):
        check_vocabularies(student, teacher)
    if is_left_out(student):
        raise ValueError(
            "student's lm_head is already bypassed by another DistillationLoss, or student is a "
            "copy of such a model: call remove() on that loss first (loss.remove())"
        )
    _check_router(student)


def check_causal(student: nn.Module, teacher: nn.Module, way_out: str) -> None:
    """Refuse a model whose labels must not be shifted to the next token.

    Args:
        student: a model, wrapped or not; one without can_generate(), such as a plain module, is
            taken to be causal.
        teacher: the same.
        way_out: what to do instead, for the message.

    Raises:
        ValueError: A masked language model, a classifier, an encoder-decoder, or a model that
            sees the next token.
    """
    for name, model in (("student", unwrapped(student)), ("teacher", unwrapped(teacher))):
        reason = _why_not_causal(model)
        if reason is not None:
            raise ValueError(
                f"{name} must be a causal language model, since labels are shifted to the next "
                f"token here; got {type(model).__name__}, {reason}: {way_out}"
            )


def _why_not_causal(model: nn.Module) -> str | None:
    """Return why a model's labels must not be shifted; None if they may."""
    can_generate: Any = getattr(model, "can_generate", None)
    config: Any = getattr(model, "config", None)
    if _is_encoder_decoder(model):
        return "an encoder-decoder, whose labels are aligned with its decoder's logits"
    if callable(can_generate) and not can_generate():
        return (
            "which does not predict the next token (can_generate() is False; if it is causal "
            "nevertheless, derive its class from transformers.GenerationMixin too)"
        )
    if _attends_to_later_tokens(config):
        return (
            "which attends to the token that it predicts (a BERT is causal with is_decoder=True in "
            "its config, an XLM with causal=True)"
        )
    return None


def _attends_to_later_tokens(config: Any) -> bool:
    """Return whether a model of transformers that generates is not causal all the same."""
    kind = str(getattr(config, "model_type", ""))
    if kind in _LIKE_XLM:
        return not config.causal
    if "bert" in kind or kind in _LIKE_BERT:
        return not getattr(config, "is_decoder", True)
    return kind == "xlnet"


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def check_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Refuse inputs of the student that mean something else to the teacher.

    Args:
        model: the student, or whatever is called with them; wrapped or not.
        inputs: its arguments, by name.

    Raises:
        ValueError: Embeddings, encoder states or a cache, which are one model's own; an
            encoder-decoder that makes tokens, without decoder_input_ids.
    """
    for name, value in inputs.items():
        if value is not None and name.endswith(_STATES):
            raise ValueError(
                f"{name} must not be in the batch: the teacher is called with what the student is "
                "called with, and has embeddings of its own; pass input_ids"
            )
        if value is not None and name in CACHES:
            raise ValueError(
                f"{name} must not be in the batch: the teacher is called with what the student is "
                "called with, and would read and extend a cache of the student's keys; pass whole "
                "sequences"
            )
    model = unwrapped(model)
    needs_ids = _is_encoder_decoder(model) and output_of(model) is not None  # a classifier: None
    if needs_ids and inputs.get("decoder_input_ids") is None:
        raise ValueError(
            "decoder_input_ids are absent from the batch: an encoder-decoder is called without "
            "labels here, so it cannot make them; DataCollatorForSeq2Seq(tokenizer, model=student) "
            "makes them from the labels"
        )


def check_vocabularies(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse two models whose logits cannot be compared.

    Raises:
        ValueError: Their vocabularies differ in size.
    """
    of_student, of_teacher = vocabulary_of(student), vocabulary_of(teacher)
    if of_student != of_teacher:
        larger = "student" if of_student > of_teacher else "teacher"
        raise ValueError(  # enlarging the other one would give probability to no token
            f"student and teacher must share a vocabulary: vocab_size is {of_student} in the "
            f"student and {of_teacher} in the teacher. If they have one tokenizer and only their "
            f"padding differs, {larger}.resize_token_embeddings({min(of_student, of_teacher)}) "
            "makes them equal"
        )


def vocabulary_of(model: nn.Module) -> int:
    """Return the number of the model's logits: by its head if it has one, else by its config."""
    weight = getattr(output_of(model), "weight", None)
    if weight is not None and weight.dim() == 2:
        return int(weight.shape[0])
    config: Any = getattr(model, "config", None)
    if config is None:
        raise TypeError(
            f"a Hugging Face model is expected, with config; got {type(model).__name__}"
        )
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(text.vocab_size)


class PaddingCheck:
    """Warn, at the first batch with padding on a CPU, of labels that are not -100 there."""

    def __init__(self) -> None:
        self._is_done = False

    def __call__(self, labels: Tensor | None, inputs: Mapping[str, Any]) -> None:
        """Look at the values of a batch: labels (B, S) as they came, and what the models read."""
        mask: Tensor | None = inputs.get("attention_mask")
        if self._is_done or labels is None or mask is None or not may_look_at_values(labels):
            return
        if inputs.get("decoder_input_ids") is not None or labels.shape != mask.shape:
            return  # the mask is not that of the labels
        is_padding = mask == 0
        self._is_done = bool(is_padding.any())
        if ((labels != IGNORED) & is_padding).any():
            warnings.warn(
                "labels count tokens whose attention_mask is 0: padding is trained on; labels "
                "should be -100 there, labels.masked_fill(attention_mask == 0, -100)",
                UserWarning,
                stacklevel=2,
            )


def _check_shared(kind: str, of_student: Iterable[Any], of_teacher: Iterable[Any]) -> None:
    """Refuse what both models have, which a step or a mode of the one would change in the other."""
    shared = {id(x) for x in of_student} & {id(x) for x in of_teacher}
    if shared:
        raise ValueError(
            f"teacher must be another model than the student, with {kind} of its own; got "
            f"{len(shared)} that are also the student's: copy.deepcopy the teacher, before "
            "get_peft_model makes a student of it"
        )


def _has_mode_or_state(module: nn.Module) -> bool:
    """Return whether a module shared by two models would matter: transformers shares activations.

    eval() of the one would switch the dropout of the other off; a norm counts what both see.
    """
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    code = getattr(inspect.unwrap(module.forward), "__code__", None)
    return bool(own) or code is None or "training" in code.co_names


def _are_comparable(student: nn.Module, teacher: nn.Module, shift: bool) -> bool:
    """Return whether both models say how many logits they make, as a classifier does not."""
    if not shift:
        return all(output_of(model) is not None for model in (student, teacher))
    return all(hasattr(model, "get_output_embeddings") for model in (student, teacher))


def _check_router(student: nn.Module) -> None:
    """Refuse a mixture of experts that adds a term to its loss only if it is given labels."""
    config: Any = getattr(student, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = [getattr(x, n, None) for n in ROUTER_WEIGHTS for x in (student, text, config)]
    weight = next((x for x in found if x is not None), 0.0)
    if weight and any(getattr(x, "output_router_logits", False) for x in (text, config)):
        raise ValueError(
            f"student has output_router_logits=True: {type(student).__name__} would add its "
            f"router's aux_loss, times {weight}, to a loss of its own, which is not used here; set "
            "output_router_logits=False in its config to train without aux_loss"
        )
