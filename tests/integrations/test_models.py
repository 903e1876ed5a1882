"""Models that the loss does not fit are refused at once, also inside wrappers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from needs import need
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

transformers = need("transformers")
need("accelerate")
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
#: Labels of these belong to the logits at the same place.
ALIGNED = ["BertForMaskedLM", "BertForTokenClassification", "BertForSequenceClassification"]
SEQ2SEQ = ["T5ForConditionalGeneration", "BartForConditionalGeneration"]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
LAYERS = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
CHANGES: dict[str, dict[str, Any]] = {
    "Bert": {**NO_DROPOUT, "num_labels": 5},
    "T5": {
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 1,
        "num_heads": 2,
        "dropout_rate": 0,
    },
    "Bart": {"d_model": 16, "dropout": 0.0, **LAYERS, **HEADS},
}


def _build(kind: str, seed: int) -> nn.Module:
    family = next(name for name in CHANGES if kind.startswith(name))
    sizes = {"vocab_size": tiny.VOCABULARY, "pad_token_id": 0, "max_position_embeddings": 64}
    start = {"decoder_start_token_id": 2 if family == "Bart" else 0}
    config = getattr(transformers, f"{family}Config")
    if family == "Bert":
        sizes |= {**tiny.LAYERS, "num_attention_heads": 2}
    torch.manual_seed(seed)
    model = getattr(transformers, kind)
    made: nn.Module = model(config(**sizes, **start, **CHANGES[family])).eval()
    return made


def _batch(kind: str) -> dict[str, Tensor]:
    """Return a batch as a collator makes it: with labels that belong to the logits."""
    batch = tiny.padded(tiny.ragged(3))
    draw = torch.Generator().manual_seed(1)
    if "Classification" in kind:
        shape = batch["labels"].shape[: 2 if "Token" in kind else 1]
        batch["labels"] = torch.randint(5, shape, generator=draw)
    if kind in SEQ2SEQ:
        batch["labels"] = torch.randint(3, tiny.VOCABULARY, (3, 5), generator=draw)
        batch["decoder_input_ids"] = torch.randint(3, tiny.VOCABULARY, (3, 5), generator=draw)
    return batch


@ALL
@pytest.mark.parametrize("kind", [*ALIGNED, *SEQ2SEQ])
def test_labels_that_would_be_shifted_by_mistake(adapter: Any, kind: str) -> None:
    student, teacher = (_build(kind, seed) for seed in (0, 1))
    pairs = {"student": (student, tiny.llama(1)), "teacher": (tiny.llama(0), teacher)}
    for name, pair in pairs.items():
        with pytest.raises(ValueError, match=rf"{name} must be .* {kind}.*shift=False.*KDLoss"):
            adapter(*pair)


@pytest.mark.parametrize("kind", [*ALIGNED, *SEQ2SEQ])
def test_shift_false_takes_labels_as_they_are(kind: str) -> None:
    student, teacher = (_build(kind, seed) for seed in (0, 1))
    batch, labels = tiny.split(_batch(kind))
    with torch.no_grad():
        teacher_logits = teacher(**batch).logits
    want = KDLoss()(student(**batch).logits, teacher_logits, labels)
    for heads in (False, True) if "LM" in kind else (False,):
        model = StudentTeacherLoss(student, teacher, heads=heads, shift=False)
        torch.testing.assert_close(model(**batch, labels=labels), want)
    attached = DistillationLoss(student, teacher, shift=False)
    torch.testing.assert_close(attached(student(**batch), labels), want)


@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_an_encoder_decoder_needs_what_its_decoder_reads(kind: str) -> None:
    # without them BART would silently use the shifted input_ids
    student, teacher = (_build(kind, seed) for seed in (0, 1))
    batch = _batch(kind)
    del batch["decoder_input_ids"]
    with pytest.raises(ValueError, match=r"decoder_input_ids must be .*DataCollatorForSeq2Seq"):
        StudentTeacherLoss(student, teacher, shift=False)(**batch)


@pytest.mark.parametrize("kind", ["T5ForSequenceClassification", "BartForSequenceClassification"])
def test_a_classifier_with_a_decoder_needs_no_ids_for_it(kind: str) -> None:
    student, teacher = (_build(kind, seed) for seed in (0, 1))
    end = student.config.eos_token_id  # its place is where the class is read
    batch = {"input_ids": torch.tensor([[5, 6, end], [7, 8, end]])}
    labels = torch.tensor([0, 1])
    with torch.no_grad():
        want = KDLoss()(student(**batch).logits, teacher(**batch).logits, labels)
    found = StudentTeacherLoss(student, teacher, shift=False)(**batch, labels=labels)
    torch.testing.assert_close(found, want)
    attached = DistillationLoss(student, teacher, shift=False)
    torch.testing.assert_close(attached(student(**batch), labels), want)


def test_states_of_one_model_are_refused() -> None:
    student, teacher = (_build("T5ForConditionalGeneration", seed) for seed in (0, 1))
    batch = _batch("T5ForConditionalGeneration")
    states = torch.zeros(3, 5, 16)
    model = StudentTeacherLoss(student, teacher, shift=False)
    for name, value in (("encoder_outputs", (states,)), ("decoder_inputs_embeds", states)):
        with pytest.raises(ValueError, match=f"^{name} must not be in the batch"):
            model(**batch, **{name: value})
    cache = transformers.DynamicCache(config=tiny.llama(0).config)
    with pytest.raises(ValueError, match=r"^past_key_values must not .*pass whole sequences"):
        StudentTeacherLoss(tiny.llama(0), tiny.llama(1))(
            **tiny.padded(tiny.ragged(3)), past_key_values=cache
        )
    assert cache.get_seq_length() == 0


NOT_CAUSAL: dict[str, dict[str, int]] = {
    "XLNetLMHeadModel": {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 32},
    "XLMWithLMHeadModel": {"emb_dim": 16, "n_layers": 1, "n_heads": 2},
    "FlaubertWithLMHeadModel": {"emb_dim": 16, "n_layers": 1, "n_heads": 2},
    "BertLMHeadModel": {**tiny.LAYERS, "num_attention_heads": 2},
}


@pytest.mark.parametrize("kind", NOT_CAUSAL)
def test_generating_models_that_attend_to_what_they_predict(kind: str) -> None:
    model = getattr(transformers, kind)

    def build(**changes: Any) -> nn.Module:
        sizes = {"vocab_size": tiny.VOCABULARY, **NOT_CAUSAL[kind], **changes}
        made: nn.Module = model(model.config_class(**sizes)).eval()
        return made

    with pytest.raises(ValueError, match=f"student must be .*{kind}, which attends to the token"):
        StudentTeacherLoss(build(), tiny.llama(1))
    if kind != "XLNetLMHeadModel":
        StudentTeacherLoss(build(is_decoder=True, causal=True), tiny.llama(1))


def test_a_causal_model_that_does_not_generate_gets_advice() -> None:
    class Own(type(tiny.llama(0))):  # type: ignore[misc]
        @classmethod
        def can_generate(cls) -> bool:
            return False

    student = Own(tiny.llama(0).config)
    with pytest.raises(ValueError, match=r"GenerationMixin.*of a causal model: if you have shif"):
        StudentTeacherLoss(student, tiny.llama(1))


@pytest.mark.parametrize("adapter", [StudentTeacherLoss, DistillationLoss])
def test_labels_of_padding_are_warned_of_once_N_20(adapter: Any) -> None:
    student = tiny.llama(0)
    attached = adapter(student, tiny.llama(1))
    batch = tiny.padded(tiny.ragged(3))

    def call(labels: Tensor, model: Any) -> None:
        inputs, _ = tiny.split(batch)
        if isinstance(model, StudentTeacherLoss):
            model(**inputs, labels=labels)
        else:
            model(student(**inputs), labels)

    with pytest.warns(UserWarning, match=r"padding is trained on.*masked_fill"):
        call(batch["input_ids"], attached)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(batch["input_ids"], attached)
        call(batch["labels"], adapter(student, tiny.llama(2)))


def test_batches_are_checked_until_one_has_padding() -> None:
    # the mask of an encoder is not that of its decoder's labels
    seq2seq = (_build("T5ForConditionalGeneration", seed) for seed in (0, 1))
    ids = torch.full((2, 5), 3)
    mask = torch.ones_like(ids)
    mask[:, 4:] = 0
    model = StudentTeacherLoss(tiny.llama(0), tiny.llama(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        StudentTeacherLoss(*seq2seq, shift=False)(
            input_ids=ids, attention_mask=mask, decoder_input_ids=ids, labels=ids
        )
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    with pytest.warns(UserWarning, match="padding is trained on"):
        model(input_ids=ids, attention_mask=mask, labels=ids)


@ALL
def test_modules_that_both_models_have_are_refused_N_27(adapter: Any) -> None:
    # the teacher's eval() would switch the student's dropout off
    student, teacher = tiny.llama(0).train(), tiny.llama(1)
    student.drop = teacher.drop = nn.Dropout(0.5).train()
    with pytest.raises(ValueError, match="with its own modules; got 1 that are also the stud"):
        adapter(student, teacher)
    assert student.drop.training


def test_modules_without_mode_or_state_may_be_shared() -> None:
    # activations of transformers are made once for all models
    student, teacher = tiny.llama(0), tiny.llama(1)
    student.shared = teacher.shared = nn.Sequential(nn.GELU(), nn.Identity())
    StudentTeacherLoss(student, teacher)
    student.noise = teacher.noise = nn.Sequential(nn.RReLU())
    with pytest.raises(ValueError, match="got 1 that are also the student's"):
        StudentTeacherLoss(student, teacher)


class _Plain(nn.Module):
    """A model with neither a configuration nor can_generate."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return torch.zeros(*input_ids.shape, tiny.VOCABULARY)


def test_plain_modules_and_causal_models_are_accepted() -> None:
    StudentTeacherLoss(_Plain(), _Plain())
    StudentTeacherLoss(tiny.llama(0), tiny.llama(1))


def _peft(model: nn.Module, **changes: Any) -> nn.Module:
    peft = need("peft")
    given = {"r": 2, "target_modules": ["q_proj", "query"], **changes}
    made: nn.Module = peft.get_peft_model(model, peft.LoraConfig(**given))
    return made


@pytest.fixture
def _one_rank(tmp_path: Path) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _fsdp1(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


WRAPPERS = {
    "compiled": partial(torch.compile, backend="eager"),
    "DataParallel": nn.DataParallel,
    "DDP": DistributedDataParallel,
    "FSDP1": _fsdp1,
    "peft": _peft,
    "peft, compiled": lambda model: torch.compile(_peft(model), backend="eager"),
}


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_models_inside_wrappers_are_checked(wrap: Any) -> None:
    inner = _build("BertForSequenceClassification", 0)
    with pytest.raises(ValueError, match=r"student must be .* BertForSequenceClassification"):
        StudentTeacherLoss(wrap(inner), tiny.llama(1))
    StudentTeacherLoss(wrap(tiny.llama(0)), tiny.llama(1))


def test_vocabularies_are_compared_by_size_P13() -> None:
    small, large = tiny.llama(0), tiny.llama(1, vocab_size=99)
    for pair, sizes, larger in (
        ((small, large), "97 in the student and 99 in the teacher", "teacher"),
        ((large, small), "99 in the student and 97 in the teacher", "student"),
    ):
        message = rf"vocab_size is {sizes}.* {larger}\.resize_token_embeddings\(97\)"
        with pytest.raises(ValueError, match=message):
            models.check_vocabularies(*pair)
    models.check_vocabularies(tiny.llama(0), tiny.llama(1, hidden=32, head_dim=16))
