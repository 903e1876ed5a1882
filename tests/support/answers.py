"""A teacher's answers as servers send them, and the TopK that they must become."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_kd import TopK

from .logits import INF

V, K = 31, 4
LENGTHS = (6, 4, 1)
#: Of sequences padded to seven tokens on either side, and one with tokens left out inside.
RIGHT = torch.tensor([[1] * n + [0] * (7 - n) for n in LENGTHS])
MASKS = [
    RIGHT,
    RIGHT.flip(-1),
    torch.tensor([[1, 1, 0, 1, 1, 1, 1], [0, 1, 0, 1, 1, 1, 0], [0] * 6 + [1]]),
]


@dataclass
class Sequence:
    """The tokens of a sequence, and the teacher's log-probabilities after each of them (S, V)."""

    tokens: list[int]
    logprobs: Tensor


def sequences() -> list[Sequence]:
    return [
        Sequence(torch.randint(V, (n,)).tolist(), torch.randn(n, V).mul(2).log_softmax(-1))
        for n in LENGTHS
    ]


def dense(topk: TopK) -> Tensor:
    """Return log-probabilities (..., V), -inf outside the support."""
    ids = topk.token_ids.long().where(topk.logprobs > -INF, 0)
    empty = torch.full((*ids.shape[:-1], V), -INF)
    # an absent entry's id may be that of another
    return empty.scatter_reduce(-1, ids, topk.logprobs.float(), "amax")


def aligned(batch: list[Sequence], mask: Tensor, k: int = K, begins: Any = 0) -> Tensor:
    """Return what a batch of answers must be: (B, S, V), row i for the token after token i.

    begins: of each sequence, the first row of logits that is scored; the last one never is.
    """
    want = torch.full((*mask.shape, V), -INF)
    firsts = [begins] * len(batch) if isinstance(begins, int) else begins
    for row, (x, tokens, begin) in enumerate(zip(batch, mask, firsts, strict=True)):
        places = tokens.nonzero().flatten()
        for i in range(begin, len(x.tokens) - 1):
            top = x.logprobs[i].topk(k)
            want[row, places[i], top.indices] = top.values
    return want


# -------------------------------------------------------------- answers, as the producers send them


@dataclass
class Logprob:
    """An entry of vLLM's Python interface."""

    logprob: float
    rank: int


def vllm(x: Sequence, k: int = K, own: bool = True) -> list[dict[int, Logprob] | None]:
    """Return prompt_logprobs: the prompt's own token first, then the top k."""
    answer: list[dict[int, Logprob] | None] = [None]
    for token, row in zip(x.tokens[1:], x.logprobs, strict=False):
        top = row.topk(k)
        entry = (
            {token: Logprob(row[token].item(), int((row > row[token]).sum()) + 1)} if own else {}
        )
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        answer.append(entry | {i: Logprob(v, r) for r, (i, v) in enumerate(pairs, 1)})
    return answer


def as_json(answer: Any) -> Any:
    """Return what an HTTP client reads: objects for Logprobs, text for integer keys."""
    return json.loads(json.dumps(answer, default=vars))


def sglang(x: Sequence, k: int = K, start: int = 0) -> list[Any]:
    """Return input_top_logprobs: None, then [logprob, id, text] of the tokens after `start`."""
    tops = [row.topk(k) for row in x.logprobs[start:-1]]
    pairs = [zip(t.values.tolist(), t.indices.tolist(), strict=True) for t in tops]
    return [None, *([[value, i, None] for value, i in row] for row in pairs)]


def trl(batch: list[Sequence], prompts: list[int], k: int = K) -> dict[str, Any]:
    """Return get_sequence_logprobs: rows of the completions, padded with one absent entry."""
    rows = [
        [row.topk(k) for row in x.logprobs[n - 1 : -1]] for x, n in zip(batch, prompts, strict=True)
    ]
    return {
        "logprobs": [[[*t.values.tolist(), -math.inf] for t in row] for row in rows],
        "logprob_token_ids": [[[*t.indices.tolist(), 0] for t in row] for row in rows],
    }
