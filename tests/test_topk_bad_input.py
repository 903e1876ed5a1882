"""What a TopK must be: every refusal with its message; and nothing is written before."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.logits import grown

from fused_kd import Head, TopK, kd_loss
from fused_kd.testing import cpu_peak

VALUE, TYPE = ValueError, TypeError
Row = tuple[dict[str, Any], dict[str, Any], type[Exception], str]

# two rows of a vocabulary of six; masses 0.5, 0.25, 0.125
IDS = torch.tensor([[0, 2, 5], [4, 1, 3]])
LOGPROBS = torch.tensor([[0.5, 0.25, 0.125]] * 2).log()
TAIL = torch.tensor([0.125, 0.125]).log()
STUDENT, LABELS = torch.randn(2, 6), torch.tensor([1, 4])
HALF = LOGPROBS.half()
CERTAIN = torch.tensor([[0.9998, 1e-4, 1e-4]] * 2).log()
DRAWN = torch.full((2, 3), 1 / 3).log()


def at(x: torch.Tensor, value: float) -> torch.Tensor:
    """Return a copy with a value in row 1, entry 2."""
    other = x.clone()
    other[1, 2] = value
    return other


# fields of the TopK and keywords of the loss that are replaced; the error, and words of its message
ROWS: list[Row] = [
    ({"token_ids": IDS.float()}, {}, TYPE, "teacher.token_ids must be int32 or int64 | float32"),
    ({"token_ids": IDS.short()}, {}, TYPE, "teacher.token_ids must be int32 or int64 | int16"),
    ({"token_ids": IDS.tolist()}, {}, TYPE, "teacher.token_ids must be a torch.Tensor; got list"),
    ({"logprobs": None}, {}, TYPE, "teacher.logprobs must be a torch.Tensor; got NoneType"),
    ({"logprobs": IDS}, {}, TYPE, "teacher.logprobs must be float32, | got torch.int64"),
    ({"logprobs": LOGPROBS.to_sparse()}, {}, TYPE, "teacher.logprobs must be a dense"),
    ({"token_ids": IDS[:, :2]}, {}, VALUE, "the same shape (..., K); got (2, 2) and (2, 3)"),
    (
        {"token_ids": IDS[:1], "logprobs": LOGPROBS[:1]},
        {},
        VALUE,
        "teacher.logprobs must have the leading shape of student, (2,); got (1,) and K = 3",
    ),
    ({"tail_logprob": TAIL[:1]}, {}, VALUE, "teacher.tail_logprob must | (2,); got (1,)"),
    ({"tail_logprob": TAIL[:, None]}, {}, VALUE, "teacher.tail_logprob must | got (2, 1)"),
    ({"tail_logprob": -2.0}, {}, TYPE, "teacher.tail_logprob must be a torch.Tensor; got float"),
    ({"tail_logprob": TAIL.half()}, {}, TYPE, "float32 or float64; got torch.float16 | measure"),
    ({"tail_logprob": TAIL.bfloat16()}, {}, TYPE, "float32 or float64; got torch.bfloat16"),
    (
        {"token_ids": IDS.repeat(1, 3), "logprobs": LOGPROBS.repeat(1, 3)},
        {},
        VALUE,
        "teacher.logprobs must have at most V = 6 entries a row; got K = 9",
    ),
    ({"token_ids": at(IDS, 6)}, {}, VALUE, "in [0, V) = [0, 6); got 6 at position (1, 2) | -inf"),
    ({"token_ids": at(IDS, -1)}, {}, VALUE, "in [0, V) = [0, 6); got -1 at position (1, 2)"),
    ({"token_ids": at(IDS, -(2**62))}, {}, VALUE, "got -4611686018427387904 at position"),
    ({"token_ids": at(IDS, 4)}, {}, VALUE, "at most once in a row; got 4 twice in row 1 | sampled"),
    (
        {"logprobs": at(LOGPROBS, math.nan)},
        {},
        VALUE,
        "finite, or -inf | got nan at position (1, 2)",
    ),
    (
        {"logprobs": at(LOGPROBS, math.inf)},
        {},
        VALUE,
        "finite, or -inf | got inf at position (1, 2)",
    ),
    # probability 1, as verl pads; a sum that is too large; with the tail that was measured
    (
        {"logprobs": at(LOGPROBS, 0.0)},
        {},
        VALUE,
        "got 1 + 0.875 (first in row 1) | verl pads | -inf",
    ),
    (
        {"logprobs": LOGPROBS + 0.2, "tail_logprob": None},
        {},
        VALUE,
        "sum is at most 1 in each row, to 2.0e-06; got 1 + 0.0687 | log_softmax | renormalises",
    ),
    ({"tail_logprob": TAIL + 0.1}, {}, VALUE, "teacher.tail_logprob must hold | got 1 + 0.013"),
    ({"tail_logprob": TAIL * math.nan}, {}, VALUE, "teacher.tail_logprob must be finite or -inf"),
    ({"tail_logprob": -TAIL * math.inf}, {}, VALUE, "teacher.tail_logprob must be finite or -inf"),
    (
        {"logprobs": HALF, "tail_logprob": None},
        {},
        TYPE,
        "teacher.tail_logprob must be given for log-probabilities of 16 bits | torch.float16",
    ),
    (
        {"logprobs": CERTAIN, "tail_logprob": None},
        {},
        VALUE,
        "teacher.tail_logprob must be given if the mass outside the support is below 0.001 | "
        "from_logits | renormalize",
    ),
    (
        {},
        {"divergence": "mse"},
        VALUE,
        "divergence='mse' compares logits | TopK | teacher's logits",
    ),
    (
        {},
        {"temperature": 2.0},
        VALUE,
        "must be the loss's, 2.0, | tail='bucket'; got 1.0: the mass",
    ),
    ({"temperature": 2.0}, {}, VALUE, "must be the loss's, 1.0, | got 2.0 | measure tail_logprob"),
    (
        {"tail": "sampled", "logprobs": DRAWN, "temperature": 2.0},
        {},
        VALUE,
        "must be the loss's, 1.0 | tail='sampled'; got 2.0: the entries must be drawn",
    ),
    (
        {"tail": "sampled", "logprobs": DRAWN},
        {"divergence": "jsd"},
        VALUE,
        "tail='sampled' is for divergence='forward_kl' | got divergence='jsd'",
    ),
    ({"tail": "sampled"}, {}, VALUE, "counts over the number of draws | got a sum of 1 - 0.125"),
    (
        {"tail": "zero"},
        {"divergence": "reverse_kl"},
        VALUE,
        "divergence='reverse_kl' is infinite for every student | 'bucket' or 'renormalize'",
    ),
    ({"tail": "ghost"}, {}, VALUE, "'bucket', 'renormalize', 'zero', 'sampled'; got 'ghost'"),
    ({"tail": None}, {}, VALUE, "teacher.tail must be one of | got None"),
    ({"tail": TAIL}, {}, VALUE, "teacher.tail must be one of | got tensor("),
    ({"temperature": "2"}, {}, TYPE, "teacher.temperature must be a Python number; got str"),
    ({"temperature": True}, {}, TYPE, "teacher.temperature must be a Python number; got bool"),
    ({"temperature": 0.0}, {}, VALUE, "teacher.temperature must be | got 0.0"),
    ({"temperature": math.nan}, {}, VALUE, "teacher.temperature must be | got nan"),
    ({"logprobs": grown(2, 3)}, {}, VALUE, "teacher.logprobs must not require grad | detach it"),
    ({"tail_logprob": grown(2)}, {}, VALUE, "teacher.tail_logprob must not require grad"),
    *(
        ({name: x.to("meta")}, {}, VALUE, f"teacher.{name} must be on the device of student, cpu")
        for name, x in (("token_ids", IDS), ("logprobs", LOGPROBS), ("tail_logprob", TAIL))
    ),
    ({"logprobs": LOGPROBS.double()}, {"backend": "cpu"}, RuntimeError, "float64"),
    ({}, {"chunk_rows": 2}, VALUE, "chunk_rows is for a student or teacher given as a Head"),
    (
        {},
        {"student": TopK(IDS, LOGPROBS)},
        TYPE,
        "student must be | a TopK, which only the teacher",
    ),
    ({}, {"teacher": (IDS, LOGPROBS)}, TYPE, "a plain tuple | of a teacher TopK(token_ids, logpro"),
]


@pytest.mark.parametrize(("fields", "keywords", "error", "words"), ROWS, ids=lambda x: None)
def test_message(
    fields: dict[str, Any], keywords: dict[str, Any], error: type[Exception], words: str
) -> None:
    teacher = TopK(IDS, LOGPROBS, TAIL)._replace(**fields)
    arguments = {"student": STUDENT, "teacher": teacher, "labels": LABELS, **keywords}
    for head in (
        (False, True) if "student" not in keywords and "chunk_rows" not in keywords else (False,)
    ):
        if head:
            arguments["student"] = Head(torch.randn(2, 4), torch.randn(6, 4))
        with pytest.raises(error) as caught:
            kd_loss(**arguments)
        for word in words.replace("student,", "student.hidden," if head else "student,").split(
            " | "
        ):
            assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


def test_what_is_no_error() -> None:
    topk = TopK(IDS, LOGPROBS, TAIL)
    for teacher, keywords in (
        (topk._replace(tail_logprob=None), {}),
        (
            topk._replace(
                token_ids=at(IDS, -7), logprobs=at(LOGPROBS, -math.inf), tail_logprob=TAIL
            ),
            {},
        ),
        (topk._replace(logprobs=HALF, tail="renormalize", tail_logprob=None), {"temperature": 2.0}),
        (topk._replace(logprobs=LOGPROBS + 100, tail="zero", temperature=0.5), {}),
        (topk._replace(token_ids=at(IDS, 4), logprobs=DRAWN, tail="sampled"), {}),
        (topk._replace(temperature=3.0), {"soft_weight": 0.0, "divergence": "mse"}),
        # float16 log-probabilities round up
        (topk._replace(logprobs=HALF + 5e-4), {}),
        # all of V, and a certain row
        (TopK.from_logits(STUDENT, 6)._replace(tail_logprob=None), {}),
    ):
        assert kd_loss(STUDENT, teacher, LABELS, **keywords).isfinite()


def test_nothing_is_written_before_the_checks_have_passed(backend: str) -> None:
    student = grown(2, 6)
    before, version = student.detach().clone(), student._version
    for teacher in (
        TopK(at(IDS, 6), LOGPROBS, TAIL),
        TopK(at(IDS, 4), LOGPROBS, TAIL),
        TopK(IDS, at(LOGPROBS, math.nan), TAIL),
        TopK(IDS, LOGPROBS, TAIL, temperature=2.0),
    ):
        with pytest.raises(ValueError, match="teacher"):
            kd_loss(student, teacher, LABELS, inplace=True, backend=backend)
    assert torch.equal(student, before)
    assert student._version == version


def test_nothing_of_the_size_of_the_logits_is_made(backend: str) -> None:
    if backend == "reference":
        pytest.skip("the specification")
    rows, size = 8, 2**17
    student = torch.randn(rows, size)
    topk = TopK.from_logits(torch.randn(rows, size), 64)
    with torch.no_grad():
        peak = cpu_peak(lambda: kd_loss(student, topk, backend=backend, hard_weight=0.0))
    assert peak.highest < 2**20
