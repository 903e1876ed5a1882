"""What frameworks make of a server's answer, by their own code, is what our converters read.

Each framework gets the same answer as from_vllm or from_sglang, and its tensors must become the
same TopK. SGLang's own code writes the answer of its test.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from needs import need, need_file, need_functions
from support.answers import (
    RIGHT,
    K,
    Logprob,
    Sequence,
    V,
    aligned,
    as_json,
    dense,
    sequences,
    sglang,
    vllm,
)
from support.logits import INF
from torch import Tensor
from torch.nn import functional as F

from fused_kd.teachers.servers import (
    from_axolotl,
    from_sglang,
    from_swift,
    from_trl,
    from_verl,
)

LEFT = RIGHT.flip(-1)


def same(got: Any, want: Tensor) -> None:
    """Assert that a TopK has the log-probabilities `want` (..., V)."""
    assert torch.equal(dense(got), want)


def test_trl() -> None:
    need("trl")
    from trl.generation.vllm_client import VLLMClient

    batch, prompts = sequences(), [2, 3, 1]
    parts = [
        VLLMClient._format_sequence_logprobs({"prompt_logprobs": as_json(vllm(x))}, x.tokens, n, K)
        for x, n in zip(batch, prompts, strict=True)
    ]
    answer = {key: [part[key] for part in parts] for key in parts[0]}
    same(from_trl(answer, prompts, LEFT), aligned(batch, LEFT, begins=[n - 1 for n in prompts]))


@pytest.mark.parametrize("packed", [False, True])
def test_ms_swift(packed: bool) -> None:
    own = need_functions(
        "ms-swift",
        "swift/rlhf_trainers/utils.py",
        "parse_prompt_logprobs",
        "assemble_teacher_topk_logprobs",
    )
    batch = sequences()
    parsed = [
        own["parse_prompt_logprobs"](SimpleNamespace(prompt_logprobs=as_json(vllm(x))), K)
        for x in batch
    ]
    if packed:
        ends = [0, *torch.tensor([len(x.tokens) for x in batch]).cumsum(0).tolist()]
        where = {"batch_size": 1, "seq_len": ends[-1], "cu_seqlens": ends}
        want = aligned(batch, LEFT)[LEFT != 0][None]
    else:
        offsets = [int(row.nonzero()[0]) for row in LEFT]
        where = {"batch_size": 3, "seq_len": 7, "cu_seqlens": None, "offsets": offsets}
        want = aligned(batch, LEFT)
    logprobs, ids = own["assemble_teacher_topk_logprobs"](parsed, topk=K, device="cpu", **where)
    same(from_swift(ids, logprobs), want)


@pytest.mark.parametrize("k", [0, K])
@pytest.mark.parametrize("server", ["vllm", "sglang"])
def test_verl(server: str, k: int) -> None:
    """Read what verl makes of both; with k = 0 it takes the token itself alone."""
    (pad,) = need_functions(
        "verl", "verl/experimental/teacher_loop/teacher_manager.py", "_pad_teacher_outputs", F=F
    ).values()
    name, path = {
        "vllm": ("extract_prompt_logprobs", "vllm_rollout/utils.py"),
        "sglang": ("_extract_prompt_logprobs_sglang", "sglang_rollout/async_sglang_server.py"),
    }[server]
    own = need_functions("verl", f"verl/workers/rollout/{path}", name)[name]
    batch = sequences()
    rows: list[list[Tensor]] = []
    for x in batch:
        fields: dict[str, Any] = {}
        own_token = [
            [row[t].item(), t, ""] for row, t in zip(x.logprobs, x.tokens[1:], strict=False)
        ]
        if server == "vllm":
            alone = [None, *({t: Logprob(value, 1)} for value, t, _ in own_token)]
            own(SimpleNamespace(prompt_logprobs=vllm(x) if k else alone), k, fields)
        else:
            answer = {
                "input_token_logprobs": [[None, x.tokens[0], ""], *own_token],
                "input_top_logprobs": sglang(x),
            }
            own(answer, k, len(x.tokens), fields)
        rows.append([torch.tensor(fields["prompt_ids"]), torch.tensor(fields["prompt_logprobs"])])

    # as verl's agent loop pads: prompts of 4 on the left, responses of 4 on the right
    prompts, mask = [3, 2, 0], torch.zeros(3, 8, dtype=torch.int64)
    columns = []
    for b, ((ids, logs), n) in enumerate(zip(rows, prompts, strict=True)):
        mask[b, 4 - n : 4 + len(ids) - n] = 1
        columns.append(pad(ids.int(), logs, 4, 4, n, len(ids) - n, pad_token_id=2))
    ids, logs = (torch.cat(x) for x in zip(*columns, strict=True))
    want = aligned(batch, mask) if k else _of_own_tokens(batch, mask)
    same(from_verl(ids, logs, mask), want)
    if k:
        same(from_verl(ids, logs), want)
    jagged = partial(torch.nested.nested_tensor, layout=torch.jagged)
    nested = [jagged([row[i] for row in rows]) for i in (0, 1)]
    same(from_verl(*nested), want[mask != 0][None])


def _of_own_tokens(batch: list[Sequence], mask: Tensor) -> Tensor:
    """Return (B, S, V) with the log-probability of the next token alone."""
    want = aligned(batch, mask, V)
    for b, x in enumerate(batch):
        for token, place in zip(x.tokens[1:], mask[b].nonzero().flatten(), strict=False):
            want[b, place, torch.arange(V) != token] = -INF
    return want


# -------------------------------------------------------------------------------------- axolotl

OWN_AXOLOTL = "axolotl/integrations/kd/"


def _collator(session: Any, normalize: bool) -> Any:
    """Return what the methods of axolotl's OnlineTeacherCollator read of it."""
    utils = need_file("axolotl", f"{OWN_AXOLOTL}utils.py")
    return SimpleNamespace(
        kd_online_server_base_url="http://teacher",
        kd_online_topk=K,
        kd_temperature=2.0,
        kd_online_timeout=1,
        kd_normalize_topk=normalize,
        http_session=session,
        DEFAULT_LABEL_PAD_TOKEN_ID=-100,
        _normalize_logprobs=lambda x: utils.normalize_logprobs(torch.tensor(x), K).tolist(),
    )


def _normalized(logprobs: Tensor, temperature: float = 1.0) -> Tensor:
    """Return (..., V) renormalised at a temperature; rows without entries stay."""
    return (logprobs / temperature).log_softmax(-1).nan_to_num(nan=-INF, neginf=-INF)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("server", ["vllm", "sglang"])
def test_axolotl_online(server: str, normalize: bool) -> None:
    """Read a vLLM's rows, which are in place, and an SGLang's, one position late."""
    requests, name = need("requests"), f"fetch_online_logprobs_{server}"
    fetch = need_functions(
        "axolotl",
        f"{OWN_AXOLOTL}collator_online_teacher.py",
        name,
        orjson=SimpleNamespace(loads=json.loads),
        requests=requests,
        LOG=None,
    )[name]
    batch = sequences()[:2]
    for x in batch:  # axolotl takes the first K of vLLM's K + 1
        x.tokens[1:] = [int(row.argmax()) for row in x.logprobs[:-1]]
    answers = {
        "vllm": {"choices": [{"prompt_logprobs": vllm(x)} for x in batch]},
        "sglang": [{"meta_info": {"input_top_logprobs": sglang(x)}} for x in batch],
    }
    data = as_json(answers[server])
    answer = SimpleNamespace(
        content=json.dumps(data), json=lambda: data, raise_for_status=lambda: None
    )
    collator = _collator(SimpleNamespace(post=lambda *_, **__: answer), normalize)
    labels = [[-100, -100, *x.tokens[2:]] for x in batch]
    fetched = fetch(collator, [x.tokens for x in batch], labels)
    mask = RIGHT[:2]
    want = aligned(batch, mask, begins=1)  # the token after token 0 has no label
    want = _normalized(want) if normalize else want
    for b, x in enumerate(batch):
        columns = [
            torch.tensor(fetched[f"target_{key}"][b]) for key in ("token_ids", "logprobs", "mask")
        ]
        got = from_axolotl(*columns, is_late=server == "sglang")
        torch.testing.assert_close(dense(got), want[b, : len(x.tokens)])


@pytest.mark.parametrize("kd_temperature", [1.0, 2.0])
def test_axolotl_offline_rows_are_late(kd_temperature: float) -> None:
    (transform,) = need_functions(
        "axolotl", f"{OWN_AXOLOTL}chat_template.py", "transform_logprobs"
    ).values()
    (x, *_) = sequences()
    rows = as_json(sglang(x, start=1))[1:]  # of tokens 2 to 5, a server's own completion
    sample = {
        "logprobs": [
            [{"logprob": value, "token": f"token_id:{token}"} for value, token, _ in row]
            for row in rows
        ],
        "input_ids": x.tokens,
        "labels": [-100, -100, *x.tokens[2:]],
    }
    strategy = SimpleNamespace(
        logprobs_field="logprobs", gen_temperature=1.0, kd_temperature=kd_temperature
    )
    columns = transform(strategy, sample)
    tensors = [torch.tensor(columns[f"target_{x}"]) for x in ("token_ids", "logprobs", "mask")]
    got = from_axolotl(*tensors, temperature=kd_temperature, is_late=True)
    want = _normalized(aligned([x], RIGHT[:1], begins=1)[0, :6], kd_temperature)
    torch.testing.assert_close(dense(got), want)
    assert got.temperature == kd_temperature


# --------------------------------------------------------------------------------------- SGLang


@pytest.mark.parametrize("form", [lambda x: x, as_json], ids=["python", "json"])
def test_sglang(form: Callable[[Any], Any]) -> None:
    own = need_functions(
        "sglang",
        "sglang/srt/managers/tokenizer_manager.py",
        "detokenize_logprob_tokens",
        "detokenize_top_logprobs_tokens",
    )
    manager = SimpleNamespace(
        detokenize_logprob_tokens=partial(own["detokenize_logprob_tokens"], None)
    )
    batch = sequences()
    answers = []
    for x in batch:
        top = x.logprobs[:-1].topk(K)
        values, ids = [None, *top.values.tolist()], [None, *top.indices.tolist()]
        answers.append(own["detokenize_top_logprobs_tokens"](manager, values, ids, False))
    same(from_sglang(form(answers), LEFT), aligned(batch, LEFT))
