"""Messages of adapters name an argument as the framework does."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_kd.integrations import automodel, axolotl, liger, model_optimizer

N, V, H = 4, 7, 3
NAN = torch.full((1, N, 1), torch.nan)
ATTACHED = torch.randn(N, V, requires_grad=True)


def logits(*shape: int) -> Tensor:
    return torch.randn(*(shape or (N, V)))


def labels(rows: int = N) -> Tensor:
    return torch.zeros(rows, dtype=torch.int64)


def heads(**changes: Any) -> list[Any]:
    """Return a fused linear loss's inputs: student s, sw, teacher t, tw, with `changes`."""
    usual = {"s": logits(N, H), "sw": logits(V, H), "t": logits(N, H), "tw": logits(V, H)}
    return list({**usual, **changes}.values())


def top_k(**changes: Any) -> list[Any]:
    entries = {"ids": labels(N).view(1, N, 1), "logs": -logits(1, N, 1).abs()}
    usual = {"s": logits(1, N, V), **entries, "mask": torch.ones(1, N, 1)}
    return list({**usual, **changes}.values())


# Each yields calls that are refused, with words that the message must contain.


def of_automodel() -> Iterator[tuple[str, Callable[[], Any]]]:
    loss = automodel.KDLoss()
    for teacher in (ATTACHED, None):
        yield "teacher_logits", lambda teacher=teacher: loss(logits(), teacher, labels())
    yield "student_logits and teacher_logits", lambda: loss(logits(), logits(N, V + 1), labels())
    yield "of student_logits", lambda: loss(logits(), logits(), labels(N + 1))
    yield "labels must be a torch.Tensor", lambda: loss(logits(), logits(), None)
    yield "temperature", lambda: automodel.KDLoss(temperature=0.0)
    yield "tp_group", lambda: automodel.KDLoss(tp_group=object())
    for bad in (-1, float("nan"), True, "4", torch.tensor(-2), torch.ones(2)):
        yield "num_batch_labels", lambda bad=bad: loss(logits(), logits(), labels(), bad)


def of_axolotl() -> Iterator[tuple[str, Callable[[], Any]]]:
    for loss in (axolotl.loss, axolotl.ChunkedTopKKDLoss(2)):
        yield "student_logits", lambda loss=loss: loss(*top_k(s=logits(1, N, V).long()))
        yield "student_logits", lambda loss=loss: loss(*top_k(s=logits()))
        yield "at most their length", lambda loss=loss: loss(*top_k(s=logits(1, N - 1, V)))
        yield "must be (B, S_t, K); got", lambda loss=loss: loss(*top_k(ids=labels()))
        yield "target_mask", lambda loss=loss: loss(*top_k(mask=None))
        yield "target_token_ids", lambda loss=loss: loss(*top_k(ids=labels().int().view(1, N, 1)))
        for logs in (NAN, None, logits(1, N, 2)):
            yield "target_logprobs", lambda loss=loss, logs=logs: loss(*top_k(logs=logs))
        for bad in ("4", None, float("nan"), torch.tensor(torch.nan), torch.ones(2)):
            yield "num_items_in_batch", lambda loss=loss, bad=bad: loss(*top_k(), bad)
        for token in (-100, V):
            ids = torch.full((1, N, 1), token)
            yield "target_token_ids", lambda loss=loss, ids=ids: loss(*top_k(ids=ids))
    yield "kd_temperature", lambda: axolotl.ChunkedTopKKDLoss(kd_temperature=0.0)
    yield "kd_temperature", lambda: axolotl.loss(*top_k(), kd_temperature=0.0)


def of_liger() -> Iterator[tuple[str, Callable[[], Any]]]:
    both, alone = liger.LigerFusedLinearJSDLoss, liger.LigerFusedLinearJSD
    kl = liger.LigerFusedLinearKLDivLoss
    for kind in (both, alone, kl):
        yield "temperature", lambda kind=kind: kind(temperature=0.0)
    for kind in (kl, liger.LigerKLDIVLoss):
        yield "reduction", lambda kind=kind: kind(reduction="none")
    for size in (0, "many"):
        yield "chunk_size", lambda size=size: both(chunk_size=size)
    target = logits().softmax(-1)
    for kind, inputs in ((alone, (*heads(), labels())), (kl, (*heads()[:2], target))):
        for dtype in ("float32", torch.bfloat16):  # the inputs are float32
            yield "accum_dtype", lambda k=kind, d=dtype, x=inputs: k(accum_dtype=d)(*x)
    yield "beta", lambda: both(beta=1.5)
    yield "weight_hard_loss", lambda: both(weight_hard_loss=-1.0)
    yield "weight_soft_loss", lambda: both(weight_soft_loss="1")
    yield "student_input", lambda: both()(*heads(s=logits(N, H).long()), labels())
    yield "teacher_input", lambda: both()(*heads(t=logits(N + 1, H)), labels())
    yield "teacher_input", lambda: both()(*heads(t=None), labels())
    larger = logits(V + 1, H)
    yield "student_weight and teacher_weight", lambda: both()(*heads(tw=larger), labels())
    yield "student_bias", lambda: both()(*heads(), labels(), logits(V + 1))
    yield "true_labels", lambda: both()(*heads(), labels(N + 1))
    yield "true_labels", lambda: both()(*heads(), None)
    yield "teacher_weight", lambda: both()(*heads(tw=None), labels())
    yield "teacher_logits", lambda: liger.LigerFusedCETVDLoss()(logits(), None, labels())
    yield "jsd_beta", lambda: alone(jsd_beta=2.0)
    yield "student_input", lambda: alone()(*heads(s=None), labels())
    yield "teacher_input", lambda: alone()(*heads(t=logits(N, H) * ATTACHED[:, :1]), labels())
    yield "teacher_input", lambda: alone()(*heads(t=None), labels())
    yield "shift_labels", lambda: alone()(*heads(), labels(N + 1))
    yield "student_input", lambda: kl()(logits(N, H + 1), logits(V, H), target)
    for shifted in (labels(N + 1), [1] * N):
        yield "shift_labels", lambda y=shifted: kl()(*heads()[:2], target, y)
    for bad in (None, target.long(), target[:, 1:], ATTACHED, target - 1):
        yield "target", lambda bad=bad: kl()(*heads()[:2], bad)
    jsd = liger.LigerJSD()
    yield "log_q", lambda: jsd(logits().long(), logits())
    for teacher in (ATTACHED.log_softmax(-1), None):
        yield "log_p", lambda teacher=teacher: jsd(logits(), teacher)
    yield "shift_labels", lambda: jsd(logits(), logits(), labels(N + 1))
    yield "y_pred", lambda: liger.LigerKLDIVLoss()(logits().long(), target)
    for teacher, log in itertools.product((ATTACHED, None, target[:, 1:]), (False, True)):
        yield "y_true", lambda t=teacher, x=log: liger.LigerKLDIVLoss(log_target=x)(logits(), t)


def of_model_optimizer() -> Iterator[tuple[str, Callable[[], Any]]]:
    for loss in (model_optimizer.LogitsDistillationLoss(), model_optimizer.MFTLoss()):
        more = (labels(),) if isinstance(loss, model_optimizer.MFTLoss) else ()
        yield "logits_s", lambda loss=loss, more=more: loss(logits().long(), logits(), *more)
        for t in (logits(N, V, 1), None):
            yield "logits_t", lambda loss=loss, more=more, t=t: loss(logits(), t, *more)
    in_place = model_optimizer.LogitsDistillationLoss(inplace=True)
    yield "inplace", lambda: in_place(ATTACHED, logits())


ADAPTERS = (of_automodel, of_axolotl, of_liger, of_model_optimizer)
SIDES = ("student", "teacher")
#: Names of ours, which no message may contain except those that the framework has as well.
OURS = {f"{side}.{part}" for side in SIDES for part in ("hidden", "weight", "bias", "detach")}
OURS |= {"student_logits", "teacher_logits", "labels", "token_weight", "num_items", "hard_weight"}
OURS |= {"soft_weight", "beta", "temperature", "divergence"}
SAME = {
    "of_automodel": {"student_logits", "teacher_logits", "labels", "temperature"},
    "of_axolotl": {"student_logits"},
    "of_liger": {"beta", "temperature", "teacher_logits"},
    "of_model_optimizer": {"labels", "temperature"},
}


def unknown_keywords() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield keywords of ours that the framework does not have, each with a call that passes it."""
    s, y = logits(), labels()
    yield "labels", lambda: liger.LigerJSD()(s, s, labels=y)
    yield "hard_weight", lambda: liger.LigerFusedLinearJSDLoss(hard_weight=1.0)
    yield "temperature", lambda: axolotl.loss(*top_k(), temperature=2.0)
    yield "num_items", lambda: automodel.KDLoss()(s, s, y, num_items=3)
    yield "student_logits", lambda: model_optimizer.MFTLoss()(student_logits=s)


def test_an_unknown_keyword_is_named_as_it_was_given() -> None:
    for name, call in unknown_keywords():
        with pytest.raises(TypeError, match=rf"unexpected keyword argument '{name}'"):
            call()


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_messages_have_the_names_of_the_framework(adapter: Any) -> None:
    names = "|".join(map(re.escape, OURS - SAME[adapter.__name__]))
    strange = re.compile(rf"^(student|teacher) |\bof (student|teacher),|\b({names})\b")
    for name, call in adapter():
        with pytest.raises((TypeError, ValueError)) as error:
            call()
        message = str(error.value)
        assert re.search(rf"\b{re.escape(name)}\b", message), message
        assert not strange.search(message), message
