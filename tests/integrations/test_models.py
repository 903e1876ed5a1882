"""Models that do not fit the loss are refused at once, also inside wrappers."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import tiny
import torch
import transformers
from needs import need
from support.losses import refused
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

need("lightning")

from fused_kd import KDLoss  # noqa: E402
from fused_kd.integrations._common import models  # noqa: E402
from fused_kd.integrations.lightning import KDModule  # noqa: E402
from fused_kd.integrations.student_teacher import StudentTeacherLoss  # noqa: E402
from fused_kd.integrations.transformers import DistillationLoss  # noqa: E402

ADAPTERS = {
    "Trainer": DistillationLoss,
    "StudentTeacherLoss": StudentTeacherLoss,
    "Lightning": partial(KDModule, optimizer=torch.optim.SGD),
}
ALL = pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
SEQ2SEQ = ["T5ForConditionalGeneration", "BartForConditionalGeneration"]
#: Labels of these belong to the logits at the same place.
ALIGNED = ["BertForMaskedLM", "BertForTokenClassification", "BertForSequenceClassification"]
ALIGNED += SEQ2SEQ
CLASSIFIERS = ["T5ForSequenceClassification", "BartForSequenceClassification"]
BERT = {**tiny.LAYERS, "num_attention_heads": 2, "num_labels": 5}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "dropout_rate": 0}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
BART = {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
BART |= {f"{side}_layers": 1 for side in ("encoder", "decoder")}
BART |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "decoder_start_token_id": 2, "dropout": 0}
CHANGES: dict[str, dict[str, Any]] = {
    "Bert": BERT,
    "T5": {**T5, "decoder_start_token_id": 0},
    "Bart": {"d_model": 16, **BART},
}


def _build(kind: str, seed: int) -> nn.Module:
    family = next(name for name in CHANGES if kind.startswith(name))
    sizes = {"vocab_size": tiny.VOCABULARY, "pad_token_id": 0, "max_position_embeddings": 64}
    config = getattr(transformers, f"{family}Config")(**sizes, **NO_DROPOUT, **CHANGES[family])
    torch.manual_seed(seed)
    model: nn.Module = getattr(transformers, kind)(config).eval()
    return model


def _pair(kind: str) -> tuple[nn.Module, nn.Module]:
    return _build(kind, 0), _build(kind, 1)


def _batch(kind: str) -> dict[str, Tensor]:
    """Return a batch as a collator makes it, with labels aligned with the model's logits."""
    batch = tiny.padded(tiny.ragged(3))
    draw = torch.Generator().manual_seed(1)
    if "Classification" in kind:
        shape = batch["labels"].shape[: 2 if "Token" in kind else 1]
        batch["labels"] = torch.randint(2 if kind in CLASSIFIERS else 5, shape, generator=draw)
    if kind in CLASSIFIERS:  # the class is read at the end of the text
        batch["input_ids"][:, 2] = 1 if kind.startswith("T5") else 2
    if kind in SEQ2SEQ:
        batch["labels"] = torch.randint(3, tiny.VOCABULARY, (3, 5), generator=draw)
        batch["decoder_input_ids"] = torch.randint(3, tiny.VOCABULARY, (3, 5), generator=draw)
    return batch


@ALL
@pytest.mark.parametrize("kind", ALIGNED)
def test_labels_that_would_be_shifted_by_mistake(adapter: Any, kind: str) -> None:
    student, teacher = _pair(kind)
    pairs = {"student": (student, tiny.llama(1)), "teacher": (tiny.llama(0), teacher)}
    for name, pair in pairs.items():
        refused(ValueError, rf"{name} must be .* {kind}.*shift=False.*KDLoss", adapter, *pair)


@pytest.mark.parametrize("kind", [*ALIGNED, *CLASSIFIERS])
def test_shift_false_takes_labels_as_they_are(kind: str) -> None:
    student, teacher = _pair(kind)
    batch, labels = tiny.split(_batch(kind))
    with torch.no_grad():
        teacher_logits = teacher(**batch).logits
    want = KDLoss()(student(**batch).logits, teacher_logits, labels)
    for heads in tiny.BOTH if "LM" in kind else (False,):
        model = StudentTeacherLoss(student, teacher, heads=heads, shift=False)
        torch.testing.assert_close(model(**batch, labels=labels), want)
    attached = DistillationLoss(student, teacher, shift=False)
    torch.testing.assert_close(attached(student(**batch), labels), want)


@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_what_an_encoder_decoder_reads(kind: str) -> None:
    model, batch = StudentTeacherLoss(*_pair(kind), shift=False), _batch(kind)
    states = torch.zeros(3, 5, 16)  # of one model
    for name, value in (("encoder_outputs", (states,)), ("decoder_inputs_embeds", states)):
        message = f"^{name} must not be in the batch"
        refused(ValueError, message, model, **batch, **{name: value})
    del batch["decoder_input_ids"]  # without them BART would silently use the shifted input_ids
    refused(ValueError, r"decoder_input_ids must be .*DataCollatorForSeq2Seq", model, **batch)


def test_a_cache_is_refused() -> None:
    cache = transformers.DynamicCache(config=tiny.llama(0).config)
    model, batch = StudentTeacherLoss(tiny.llama(0), tiny.llama(1)), tiny.padded(tiny.ragged(3))
    message = r"^past_key_values must not .*pass whole sequences"
    refused(ValueError, message, model, **batch, past_key_values=cache)
    assert cache.get_seq_length() == 0


NOT_CAUSAL: dict[str, dict[str, int]] = {
    "XLNetLMHeadModel": {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 32},
    "XLMWithLMHeadModel": {"emb_dim": 16, "n_layers": 1, "n_heads": 2},
    "FlaubertWithLMHeadModel": {"emb_dim": 16, "n_layers": 1, "n_heads": 2},
    "BertLMHeadModel": BERT,
}


@pytest.mark.parametrize("kind", NOT_CAUSAL)
def test_generating_models_that_attend_to_what_they_predict(kind: str) -> None:
    model = getattr(transformers, kind)
    config = partial(model.config_class, vocab_size=tiny.VOCABULARY, **NOT_CAUSAL[kind])
    message = f"student must be .*{kind}, which attends to the token"
    refused(ValueError, message, StudentTeacherLoss, model(config()).eval(), tiny.llama(1))
    if kind != "XLNetLMHeadModel":
        StudentTeacherLoss(model(config(is_decoder=True, causal=True)).eval(), tiny.llama(1))


def test_a_causal_model_that_does_not_generate_gets_advice() -> None:
    class Own(type(tiny.llama(0))):  # type: ignore[misc]
        @classmethod
        def can_generate(cls) -> bool:
            return False

    message = r"GenerationMixin.*of a causal model: if you have shif"
    refused(ValueError, message, StudentTeacherLoss, Own(tiny.llama(0).config), tiny.llama(1))


@pytest.mark.parametrize("adapter", [StudentTeacherLoss, DistillationLoss])
def test_labels_of_padding_are_warned_of_once_N_20(adapter: Any) -> None:
    student, batch = tiny.llama(0), tiny.padded(tiny.ragged(3))
    attached = adapter(student, tiny.llama(1))
    wrong = {**batch, "labels": batch["input_ids"]}
    with pytest.warns(UserWarning, match=r"padding is trained on.*masked_fill"):
        tiny.loss_of(attached, student, wrong)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny.loss_of(attached, student, wrong)
        tiny.loss_of(adapter(student, tiny.llama(2)), student, batch)


def test_batches_are_checked_until_one_has_padding() -> None:
    # the mask of an encoder is not that of its decoder's labels
    ids = torch.full((2, 5), 3)
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    padded = {**whole, "attention_mask": (torch.arange(5) < 4).long().expand(2, 5)}
    model = StudentTeacherLoss(tiny.llama(0), tiny.llama(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        StudentTeacherLoss(*_pair(SEQ2SEQ[0]), shift=False)(**padded, decoder_input_ids=ids)
        model(**whole)
    with pytest.warns(UserWarning, match="padding is trained on"):
        model(**padded)


@ALL
def test_modules_that_both_models_have_are_refused_N_27(adapter: Any) -> None:
    # the teacher's eval() would switch the student's dropout off
    student, teacher = tiny.llama(0).train(), tiny.llama(1)
    # activations of transformers are made once for all models
    student.shared = teacher.shared = nn.Sequential(nn.GELU(), nn.Identity())
    StudentTeacherLoss(student, teacher)
    for module in (nn.Dropout(0.5).train(), nn.Sequential(nn.RReLU())):
        student.drop = teacher.drop = module
        message = "with its own modules; got 1 that are also the student's"
        refused(ValueError, message, adapter, student, teacher)
        assert student.drop.training


def _peft(model: nn.Module) -> nn.Module:
    peft = need("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "query"])
    adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted


CPU = torch.device("cpu")
WRAPPERS = {
    "compiled": partial(torch.compile, backend="eager"),
    "DataParallel": nn.DataParallel,
    "DDP": DistributedDataParallel,
    "FSDP1": partial(FullyShardedDataParallel, use_orig_params=True, device_id=CPU),
    "peft": _peft,
    "peft, compiled": lambda model: torch.compile(_peft(model), backend="eager"),
}


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_models_inside_wrappers_are_checked(wrap: Any) -> None:
    inner = wrap(_build("BertForSequenceClassification", 0))
    message = r"student must be .* BertForSequenceClassification"
    refused(ValueError, message, StudentTeacherLoss, inner, tiny.llama(1))
    StudentTeacherLoss(wrap(tiny.llama(0)), tiny.llama(1))


def test_vocabularies_are_compared_by_size_P13() -> None:
    small, large = tiny.llama(0), tiny.llama(1, vocab_size=99)
    for pair, sizes, larger in (
        ((small, large), "97 in the student and 99 in the teacher", "teacher"),
        ((large, small), "99 in the student and 97 in the teacher", "student"),
    ):
        message = rf"vocab_size is {sizes}.* {larger}\.resize_token_embeddings\(97\)"
        refused(ValueError, message, models.check_vocabularies, *pair)
    models.check_vocabularies(tiny.llama(0), tiny.llama(1, hidden=32, head_dim=16))
