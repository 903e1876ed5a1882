"""Answers of servers and frameworks as TopK: places, sentinels, duplicates, refusals.

tests/integrations/test_server_formats.py reads them with the frameworks' own code, and
tests/integrations/test_vllm_server.py asks a real server.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from support.answers import (
    LENGTHS,
    MASKS,
    RIGHT,
    K,
    Sequence,
    V,
    aligned,
    as_json,
    dense,
    sequences,
    sglang,
    trl,
    vllm,
)
from support.logits import INF
from support.losses import refused
from torch import Tensor

from fused_kd import TopK, kd_loss
from fused_kd.presets import TAILS
from fused_kd.teachers.servers import (
    from_axolotl,
    from_sglang,
    from_swift,
    from_trl,
    from_verl,
    from_vllm,
    from_vllm_token_ids,
    with_tail,
)

# ------------------------------------------------------------------------------ vLLM and SGLang


@pytest.mark.parametrize("mask", MASKS, ids=["right", "left", "inside"])
@pytest.mark.parametrize("form", [lambda x: x, as_json], ids=["python", "json"])
def test_vllm_in_place(mask: Tensor, form: Callable[[Any], Any]) -> None:
    batch = sequences()
    got = from_vllm([form(vllm(x)) for x in batch], mask, k=K)
    assert torch.equal(dense(got), aligned(batch, mask))
    assert got[2:] == (None, "bucket", 1.0)
    assert (got.token_ids.dtype, got.logprobs.dtype) == (torch.int64, torch.float32)


def test_vllm_without_a_mask_and_one_prompt() -> None:
    batch = sequences()
    every = from_vllm([vllm(x) for x in batch], k=K)
    assert torch.equal(dense(every), aligned(batch, RIGHT)[:, :6])
    one = from_vllm(vllm(batch[0]), k=K)
    assert torch.equal(dense(one), aligned(batch, RIGHT)[0, :6])
    assert dense(from_vllm(vllm(batch[2]))).shape == (1, V)  # a prompt of one token: nothing scored


def test_vllm_keeps_the_prompts_own_token() -> None:
    (x, *_) = sequences()
    x.tokens = [int(row.argmin()) for row in x.logprobs]  # never among the top
    x.tokens = [0, *x.tokens[:-1]]
    got = from_vllm(vllm(x))
    assert got.logprobs.shape == (6, K + 1)
    for i in range(5):
        assert dense(got)[i, x.tokens[i + 1]] == x.logprobs[i, x.tokens[i + 1]]
    x.tokens[1:] = [int(row.argmax()) for row in x.logprobs[:-1]]  # always
    assert from_vllm(vllm(x)).logprobs.shape == (6, K)


def test_vllm_an_infinite_entry_and_the_whole_vocabulary() -> None:
    (x, *_) = sequences()
    x.logprobs[:, 3:7] = -INF
    x.logprobs = x.logprobs.log_softmax(-1)
    answer = as_json(vllm(x, V))
    for entry in answer[1:]:
        for value in entry.values():
            value["logprob"] = max(value["logprob"], -9999.0)  # as the HTTP server does
    got = from_vllm(answer, tail="zero")
    assert torch.equal(dense(got)[:-1], x.logprobs[:-1])
    soft = partial(kd_loss, torch.randn(6, V), hard_weight=0.0, soft_weight=1.0, reduction="none")
    found, exact = soft(got), soft(x.logprobs)
    torch.testing.assert_close(found[:-1], exact[:-1])
    assert found[-1] == 0


def test_vllm_checks_the_tokens_that_were_sent() -> None:
    batch = sequences()
    answers = [as_json(vllm(x)) for x in batch]
    mask = RIGHT.flip(-1)
    input_ids = torch.zeros_like(mask).masked_scatter(
        mask.bool(), torch.tensor([t for x in batch for t in x.tokens])
    )
    assert torch.equal(
        from_vllm(answers, mask, input_ids=input_ids, k=K).logprobs,
        from_vllm(answers, mask, k=K).logprobs,
    )
    absent = next(i for i in range(V) if str(i) not in answers[0][3])
    input_ids[0, 4] = absent
    message = rf"must have the prompt's own token .* none for token {absent} at position 3: send"
    refused(ValueError, message, from_vllm, answers, mask, input_ids=input_ids)
    refused(
        ValueError,
        r"input_ids must have the shape of",
        from_vllm,
        answers,
        mask,
        input_ids=input_ids[:2],
    )
    refused(
        ValueError,
        r"input_ids must have shape \(3, S\)",
        from_vllm,
        answers,
        input_ids=input_ids[0],
    )


@pytest.mark.parametrize("start", [0, 2])
def test_vllm_given_tokens(start: int) -> None:
    batch = sequences()[:2]
    mask = RIGHT.flip(-1)[:2]
    ids = [
        torch.stack([torch.randperm(V)[:K] for _ in range(len(x.tokens) - 1 - start)])
        for x in batch
    ]
    rows = [x.logprobs[start:-1].gather(-1, i) for x, i in zip(batch, ids, strict=True)]
    ids[0][0, 1], rows[0][0, 1] = -1, -INF
    want = torch.full((*mask.shape, V), -INF)
    for b, (places, i, row) in enumerate(zip(mask, ids, rows, strict=True)):
        at = places.nonzero().flatten()[start:-1]
        for place, tokens, values in zip(at, i, row, strict=True):
            want[b, place, tokens[tokens >= 0]] = values[tokens >= 0]
    sent = [row.masked_fill(i < 0, -1.0) for row, i in zip(rows, ids, strict=True)]  # padding: any
    text = [base64_of(row.numpy()) for row in sent]
    got = from_vllm_token_ids(text, ids, mask, start=start, tail="renormalize")
    assert torch.equal(dense(got), want)
    as_lists = [[[t for t in row if t >= 0] for row in i.tolist()] for i in ids]
    rows[0][0, 1:] = torch.cat(
        [rows[0][0, 2:], torch.tensor([-INF])]
    )  # the list is padded at its end
    other = from_vllm_token_ids([row.numpy() for row in rows], as_lists, mask, start=[start] * 2)
    assert torch.equal(dense(other), want)
    one = from_vllm_token_ids(text[1], ids[1], start=start)
    assert torch.equal(dense(one), want[1, mask[1] != 0])


def base64_of(array: np.ndarray) -> str:
    file = io.BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize("mask", MASKS, ids=["right", "left", "inside"])
@pytest.mark.parametrize("starts", [0, [3, 1, 0]])
def test_sglang_in_place(mask: Tensor, starts: Any) -> None:
    batch = sequences()
    firsts = [starts] * 3 if isinstance(starts, int) else starts
    answers = [as_json(sglang(x, start=n)) for x, n in zip(batch, firsts, strict=True)]
    answers[0][1][3][0] = None  # JSON's -inf
    want = aligned(batch, mask, begins=firsts)
    first = mask[0].nonzero()[firsts[0]]
    want[0, first, answers[0][1][3][1]] = -INF
    got = from_sglang(answers, mask, start=starts)
    assert torch.equal(dense(got), want)
    one = from_sglang(answers[1], start=firsts[1])
    assert torch.equal(dense(one), want[1, mask[1] != 0])


@pytest.mark.parametrize("mask", MASKS, ids=["right", "left", "inside"])
def test_trl_in_place(mask: Tensor) -> None:
    batch, prompts = sequences(), [2, 4, 1]  # the second and third completion are empty
    got = from_trl(trl(batch, prompts), prompts, mask)
    assert torch.equal(dense(got), aligned(batch, mask, begins=[1, 3, 0]))
    assert got.tail == TAILS["trl"] == "bucket"


# ---------------------------------------------------------------------------- verl, swift, axolotl


def padded(k: int = K) -> tuple[list[Sequence], Tensor, Tensor]:
    """Return sequences, and ids and log-probabilities (3, 7, k) as verl pads them: 0, 0.0."""
    batch, mask = sequences(), RIGHT.flip(-1)
    ids, logs = torch.zeros(3, 7, k, dtype=torch.int32), torch.zeros(3, 7, k)
    for b, x in enumerate(batch):
        for i, place in enumerate(mask[b].nonzero().flatten()[:-1]):
            top = x.logprobs[i].topk(k)
            ids[b, place], logs[b, place] = top.indices, top.values
    return batch, ids, logs


@pytest.mark.parametrize("k", [1, K])
def test_verl_padding_is_no_probability_of_1(k: int) -> None:
    batch, ids, logs = padded(k)
    mask = RIGHT.flip(-1)
    want = aligned(batch, mask, k)
    assert torch.equal(dense(from_verl(ids, logs, mask)), want)
    if k > 1:
        assert torch.equal(dense(from_verl(ids, logs)), want)
    else:
        refused(ValueError, r"attention_mask must be given for K = 1", from_verl, ids, logs)
    jagged = partial(torch.nested.nested_tensor, layout=torch.jagged)
    nested = [jagged([row[m != 0] for row, m in zip(x, mask, strict=True)]) for x in (ids, logs)]
    packed = from_verl(*nested)
    assert packed.logprobs.shape == (1, sum(LENGTHS), k)
    assert torch.equal(dense(packed)[0], want[mask != 0])
    refused(ValueError, "attention_mask must be None for nested", from_verl, *nested, mask)
    refused(TypeError, "must both be nested", from_verl, ids, nested[1])


def test_verl_a_certain_teacher_of_one_entry() -> None:
    ids, logs = torch.full((1, 3, 1), 5), torch.zeros(1, 3, 1)
    got = from_verl(ids, logs, torch.tensor([[0, 1, 1]]))
    assert got.logprobs.flatten().tolist() == [-INF, 0.0, -INF]


def test_swift_needs_no_shift() -> None:
    topk = TopK.from_logits(torch.randn(2, 5, V), K)
    logs = topk.logprobs.clone()
    logs[0, 2:4] = -INF
    got = from_swift(topk.token_ids, logs)
    assert got == TopK(topk.token_ids, logs, None, "renormalize", 1.0)


def columns() -> tuple[Tensor, Tensor, Tensor]:
    """Return axolotl's columns (2, 5, 4), renormalised, with masked entries of any value."""
    logs, ids = torch.randn(2, 5, V).mul(2).log_softmax(-1).topk(K)
    mask = torch.rand(2, 5, K) > 0.3
    mask[..., 0] = True
    mask[0, 2] = False
    logs = logs.masked_fill(~mask, -INF)
    return ids, (logs - logs.logsumexp(-1, True)).masked_fill(~mask, -1e9), mask.int()


def test_axolotl_mask_and_late_rows() -> None:
    ids, logs, mask = columns()
    wild = ids.where(mask.bool(), -100)
    got = from_axolotl(wild, logs.where(mask.bool(), math.nan), mask, temperature=2.0)
    want = torch.full((2, 5, V), -INF).scatter_reduce(
        -1, ids, logs.masked_fill(mask == 0, -INF), "amax"
    )
    assert torch.equal(dense(got), want)
    assert got[2:] == (None, TAILS["axolotl"], 2.0)
    late = dense(from_axolotl(wild, logs, mask, is_late=True))
    assert torch.equal(late[:, :-1], want[:, 1:])
    assert bool((late[:, -1] == -INF).all())
    assert from_axolotl(ids, logs.bfloat16(), mask).logprobs.dtype == torch.float32


def test_axolotl_duplicates_are_merged() -> None:
    ids = torch.tensor([[7, 3, 7, 3, 9], [2, 2, 2, 2, 1], [4, 5, 6, 7, 8]])
    logs = torch.randn(3, 5, dtype=torch.float64).sub(200).float()  # exp underflows
    mask = torch.ones(3, 5).int()
    mask[0, 3] = 0
    got = from_axolotl(ids, logs, mask)
    want = torch.full((3, V), -INF, dtype=torch.float64)
    for row, column in (mask != 0).nonzero().tolist():
        at = want[row, ids[row, column]]
        want[row, ids[row, column]] = torch.logaddexp(at, logs[row, column].double())
    torch.testing.assert_close(dense(got).double(), want, rtol=1e-6, atol=0)
    assert torch.equal(dense(got)[2], want[2].float())  # what is listed once stays as it is


# -------------------------------------------------------------------------------------- the tail


def test_a_tail_with_a_floor() -> None:
    logits = torch.randn(5, V, dtype=torch.float64).mul(2)
    logits[1] = torch.cat([torch.tensor([30.0]), torch.zeros(V - 1)])  # certain: a tail of 1e-12
    exact = TopK.from_logits(logits, K)
    served = TopK(exact.token_ids, exact.logprobs.float().clone())
    served.logprobs[2] = -INF
    refused(ValueError, "below 0.001", kd_loss, torch.randn(5, V), served, hard_weight=0.0)
    got = with_tail(served, 1e-5)
    assert got.tail == "bucket"
    assert got.tail_logprob is not None
    assert got.tail_logprob.dtype == torch.float32
    want = exact.tail_logprob.exp()
    want[1], want[2] = 1e-5, 1.0
    torch.testing.assert_close(got.tail_logprob.double().exp(), want, rtol=1e-4, atol=0)
    soft = partial(kd_loss, torch.randn(5, V), hard_weight=0.0, soft_weight=1.0, reduction="none")
    keep = [0, 1, 3, 4]
    found, truth = soft(got), soft(exact._replace(logprobs=exact.logprobs.float()))
    torch.testing.assert_close(found[keep], truth[keep].float(), rtol=0, atol=2e-4)
    assert found[2] == 0
    refused(TypeError, "must be float32 or float64", with_tail, served.to(torch.float16))
    padded = served._replace(logprobs=torch.zeros_like(served.logprobs))  # as verl pads
    refused(ValueError, "sum is at most 1", with_tail, padded)
    for floor in (0.0, 1.0):
        refused(ValueError, r"floor must be in \(0, 1\)", with_tail, served, floor)


# ------------------------------------------------------------------------------------- refusals


def test_a_mask_that_does_not_fit() -> None:
    batch = sequences()
    answers = [vllm(x) for x in batch]
    wrong = RIGHT.clone()
    wrong[1, 4] = 1
    message = (
        r"one token for each that the server scored, 4 in answer 1; got 5: send the same token"
    )
    refused(ValueError, message, from_vllm, answers, wrong)
    refused(ValueError, r"shape \(3, S\), one row for", from_vllm, answers, RIGHT[:2])
    refused(ValueError, r"shape \(S,\); got \(3, 7\)", from_vllm, answers[0], RIGHT)


BAD: list[tuple[Any, Any, str]] = [
    ({"choices": []}, TypeError, r"must be a list; got dict: pass .*choice\['prompt_logprobs'\]"),
    (None, TypeError, "must be a list; got NoneType"),
    ([[]], ValueError, "must be None, .* got an empty list"),
    ([{"3": {"logprob": -1.0}}], ValueError, "first entry .* got one with 1 entries"),
    ([None, None], ValueError, "must have entries after the first.*prompt_logprobs=K"),
    ([None, {"a": {"logprob": -1.0}}], ValueError, "must map token ids .* at position 1"),
    ([None, {"1": {"rank": 1}}], ValueError, "must map token ids .* at position 1"),
    ([None, [1, 2]], ValueError, "must be a list of None and of mappings"),
    ([[None], "text"], ValueError, "must be a list of None and of mappings"),
    ([None, {"1": {"logprob": math.nan}}], ValueError, "must be finite.*got nan"),
    ([None, {"1": {"logprob": 3.0}}], ValueError, "sum is at most 1 .*got 1 \\+ 19"),
    ([None, {"1": {"logprob": -1e-4}}], ValueError, "below 0.001.*tail='renormalize'"),
]


@pytest.mark.parametrize(("answer", "error", "message"), BAD)
def test_bad_answers_of_vllm(answer: Any, error: Any, message: str) -> None:
    refused(error, message, from_vllm, answer)


BAD_OF_SGLANG: list[tuple[Any, Any, str]] = [
    ({"meta_info": {}}, TypeError, r"must be a list; got dict: pass .*input_top_logprobs"),
    ([], ValueError, "first entry .* must be None"),
    ([[[-1.0, 3, None]]], ValueError, "first entry .* must be None.*logprob_start_len=0"),
    ([None, None], ValueError, "must have entries after the first"),
    ([None, [[-1.0]]], ValueError, "must be a list of .* at position 1"),
    ([None, [[None, 3, ""], [None, 4, ""]]], ValueError, "only null at position 1.*are NaN"),
    ([None, [[-1.0, 3, ""], [-2.0, 3, ""]]], ValueError, "at most once in a row; got 3 twice"),
]


@pytest.mark.parametrize(("answer", "error", "message"), BAD_OF_SGLANG)
def test_bad_answers_of_sglang(answer: Any, error: Any, message: str) -> None:
    refused(error, message, from_sglang, answer)


def test_bad_answers_of_the_others() -> None:
    row = [None, [[-1.0, 3, None]]]
    refused(ValueError, "start must be at least 0", from_sglang, row, start=-1)
    refused(ValueError, "start must have one item for each", from_sglang, [row], start=[1, 2])
    given = partial(from_vllm_token_ids, token_ids=[[3]])
    refused(TypeError, "must be base64 text .* got int", given, 3)
    refused(ValueError, "must be base64 text .* got 'x'", given, "x")
    refused(
        ValueError,
        r"\(rows, K\), as token_ids are; got \(1, 2\) and \(1, 1\)",
        given,
        np.zeros((1, 2)),
    )
    refused(ValueError, "start must be at least 0", given, np.zeros((1, 1)), start=-1)
    refused(ValueError, "one item for each answer", given, [np.zeros((1, 1))], start=[0, 0])
    refused(
        TypeError,
        r"with 'logprob_token_ids' and 'logprobs'; got \['logprobs'\]",
        from_trl,
        {"logprobs": []},
        [],
    )
    answer = trl(sequences(), [2, 4, 1])
    refused(ValueError, "prompt_lengths must have one item for each", from_trl, answer, [2, 4])
    refused(
        ValueError, "prompt_lengths must be at least 1.*got 0 in row 2", from_trl, answer, [2, 4, 0]
    )
    answer["logprobs"][0] = answer["logprobs"][0][1:]
    refused(ValueError, r"must both be \(completion, K\).*in row 0", from_trl, answer, [2, 4, 1])
    ids, logs, mask = columns()
    refused(ValueError, "must have the same shape", from_axolotl, ids, logs, mask[0])
    refused(ValueError, "must be finite", from_axolotl, ids, torch.full_like(logs, torch.nan), mask)
    refused(ValueError, "must have the same shape", from_swift, ids, logs[0])
    refused(ValueError, "must have the same shape", from_verl, ids, logs[0])
    refused(ValueError, "must have the leading shape", from_verl, ids, logs, torch.ones(2, 4))
