"""Bad input of a Head: messages name the tensor, what was expected and what came."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from head_helpers import make_heads
from torch import Tensor

from fused_kd import Head, KDLoss, kd_loss
from fused_kd.sides import Side
from fused_kd.testing import cpu_peak

HEADS = make_heads(rows=6, vocabulary=19)
GOOD: dict[str, Any] = {
    "student": HEADS.student_side,
    "teacher": HEADS.teacher_side,
    "labels": HEADS.labels,
}
LOGITS = torch.randn(6, 19)
GROWN = torch.randn(6, 19, requires_grad=True) * 1.0
PARTITIONED = torch.nn.Parameter(torch.empty(0))  # as DeepSpeed ZeRO-3 leaves it outside a forward
PARTITIONED.ds_id = 0
QUANTISED = torch.quantize_per_tensor(HEADS.teacher_weight, 0.1, 0, torch.qint8)


def student(**fields: Any) -> dict[str, Side]:
    return {"student": HEADS.student_side._replace(**fields)}


def teacher(**fields: Any) -> dict[str, Side]:
    return {"teacher": HEADS.teacher_side._replace(**fields)}


# error, arguments in place of GOOD's, what the message contains
BAD: list[tuple[type[Exception], dict[str, Any], list[str]]] = [
    (ValueError, student(weight=torch.randn(19, 25)), ["student.hidden", "H = 24", "H = 25"]),
    (ValueError, student(weight=PARTITIONED), ["got (0,)", "ZeRO-3", "GatheredParameters"]),
    (ValueError, teacher(weight=PARTITIONED), ["teacher.weight", "got (0,)", "ZeRO-3"]),
    (ValueError, student(weight=torch.empty(0)), ["got (0,)", "sharded by FSDP"]),
    (ValueError, teacher(hidden=torch.randn(6, 41)), ["teacher.hidden", "H = 41", "H = 40"]),
    (ValueError, teacher(weight=torch.randn(21, 40)), ["V = 19", "V = 21", "weight[:V]"]),
    (ValueError, teacher(hidden=torch.randn(5, 40)), ["teacher.hidden", "(6,)", "(5,)"]),
    (ValueError, {"teacher": None}, ["teacher", "None", "soft_weight=0"]),
    (TypeError, teacher(weight=None), ["teacher.weight", "torch.Tensor", "NoneType"]),
    (ValueError, {"teacher": torch.randn(6, 18)}, ["V = 19", "V = 18", "logits[..., :V]"]),
    (ValueError, {"teacher": torch.randn(5, 19)}, ["teacher must", "student.hidden", "(5,)"]),
    (ValueError, {"student": torch.randn(5, 19)}, ["teacher.hidden", "of student,", "(6,)"]),
    (ValueError, {"teacher": LOGITS.clone().requires_grad_()}, ["teacher", "detach"]),
    (TypeError, student(hidden=None), ["student.hidden", "torch.Tensor", "NoneType"]),
    (TypeError, student(weight=None), ["student.weight", "torch.Tensor", "NoneType"]),
    (
        ValueError,
        student(hidden=torch.randn(6, 0), weight=torch.randn(19, 0)),
        ["student.weight", "H > 0"],
    ),
    (ValueError, student(hidden=torch.tensor(1.0)), ["student.hidden", "(..., H)", "0 dim"]),
    (ValueError, {"memory_budget": 2**70}, ["memory_budget", "64 bits"]),
    (ValueError, {"chunk_rows": 2**63}, ["chunk_rows", "64 bits"]),
    (TypeError, student(hidden=HEADS.hidden.double()), ["student.hidden", "float64", "float32"]),
    (ValueError, student(bias=torch.randn(18)), ["student.bias", "(19,)", "(18,)"]),
    (ValueError, teacher(bias=torch.randn(19, 1)), ["teacher.bias", "(19,)", "(19, 1)"]),
    (ValueError, {"memory_budget": 100}, ["memory_budget", "one row", "100"]),
    (ValueError, {"memory_budget": 0}, ["memory_budget", "at least 1"]),
    (ValueError, {"chunk_rows": 0}, ["chunk_rows", "at least 1", "0"]),
    (ValueError, {"chunk_rows": -3}, ["chunk_rows", "-3"]),
    (TypeError, {"chunk_rows": 2.5}, ["chunk_rows", "int", "2.5"]),
    (TypeError, {"memory_budget": "1G"}, ["memory_budget", "int", "1G"]),
    (ValueError, {"chunk_rows": 2, "memory_budget": 2**30}, ["chunk_rows", "memory_budget"]),
    (TypeError, {"grad_accum_dtype": "float32"}, ["grad_accum_dtype", "torch.dtype"]),
    (ValueError, {"grad_accum_dtype": torch.float16}, ["grad_accum_dtype", "float16"]),
    (
        ValueError,
        {"student": LOGITS, "grad_accum_dtype": torch.float32},
        ["grad_accum_dtype", "the student's logits", "leave it out"],
    ),
    (ValueError, {"kept_rows": 5}, ["kept_rows", "6", "5"]),
    (TypeError, {"kept_rows": 5.0}, ["kept_rows", "int"]),
    (TypeError, student(hidden=HEADS.hidden.to("meta")), ["student.hidden", "meta"]),
    (TypeError, student(weight=HEADS.weight.to("meta")), ["student.weight", "meta"]),
    (TypeError, teacher(weight=QUANTISED), ["teacher.weight", "quantised"]),
    (TypeError, student(weight=HEADS.weight.to_sparse()), ["student.weight", "layout"]),
    (TypeError, student(weight="lm_head"), ["student.weight", "torch.Tensor", "str"]),
    (TypeError, student(hidden=HEADS.hidden.int()), ["student.hidden", "int32"]),
    (TypeError, student(weight=HEADS.weight.bfloat16()), ["float32", "bfloat16", "autocast"]),
    (TypeError, teacher(weight=HEADS.teacher_weight.half()), ["teacher.hidden", "float16"]),
    (ValueError, student(weight=HEADS.weight.flatten()), ["student.weight", "inside the forward"]),
    (ValueError, student(weight=HEADS.weight[:0]), ["student.weight", "V > 0"]),
    (
        ValueError,
        teacher(hidden=HEADS.teacher_hidden.clone().requires_grad_() * 1),
        ["teacher.hidden", "detach"],
    ),
    (ValueError, {"labels": HEADS.labels[:5]}, ["labels", "student.hidden", "(6,)", "(5,)"]),
    (ValueError, {"labels": HEADS.labels + 19}, ["labels", "[0, 19)"]),
    (ValueError, {"labels": None}, ["labels", "hard_weight"]),
    (ValueError, {"token_weight": torch.ones(5)}, ["token_weight", "student.hidden"]),
    (ValueError, {"reduction": "batchmean"}, ["batchmean", "mean"]),
    (RuntimeError, {"backend": "cuda"}, ["backend='cuda'", "cannot run"]),
    (
        ValueError,
        {"inplace": True},
        ["inplace=True", "student's logits", "student as a Head", "pass inplace=False"],
    ),
    (ValueError, student(softcap=30.0), ["student.softcap must be None", "got 30.0", "logits"]),
    (ValueError, teacher(softcap=30.0), ["teacher.softcap must be None", "got 30.0"]),
    (ValueError, student(scale=math.inf), ["student.scale must", "finite", "got inf"]),
    (ValueError, teacher(scale=math.nan), ["teacher.scale must", "finite", "got nan"]),
    (TypeError, student(scale="2"), ["student.scale must be a Python number", "str"]),
    (TypeError, student(scale=torch.tensor(2.0)), ["student.scale", "Tensor", "x.item()"]),
    (TypeError, student(scale=True), ["student.scale must be a Python number", "bool"]),
    (
        TypeError,
        {"student": tuple(HEADS.student)},
        ["student must be a torch.Tensor of logits or a fused_kd.Head", "plain tuple", "Head("],
    ),
    (
        ValueError,
        {"student": GROWN, **teacher(weight=GROWN.detach()[:, :4], hidden=torch.randn(6, 4))},
        ["same vocabulary size"],
    ),
]


@pytest.mark.parametrize(("kind", "change", "told"), BAD, ids=lambda x: None)
def test_message(kind: type[Exception], change: dict[str, Any], told: list[str]) -> None:
    with pytest.raises(kind) as error:
        kd_loss(**{**GOOD, **change})
    for words in told:
        assert words in str(error.value), f"{words!r} is not in: {error.value}"


def test_a_head_is_made_with_a_weight() -> None:
    with pytest.raises(TypeError, match="'weight'"):
        Head(HEADS.hidden)  # type: ignore[call-arg]


def test_the_module_refuses_when_it_is_made() -> None:
    for keywords in ({"chunk_rows": 0}, {"memory_budget": -1}, {"temperature": 0}):
        with pytest.raises(ValueError, match=next(iter(keywords))):
            KDLoss(**keywords)


def test_a_teachers_head_in_the_memory_that_is_written_is_refused() -> None:
    both = torch.randn(19, 19, requires_grad=True) * 1.0
    before = both.detach().clone()
    labels = torch.zeros(6, dtype=torch.int64)
    for name, head in (
        ("hidden", Head(both.detach()[1:7], torch.randn(19, 19))),
        ("weight", Head(torch.randn(6, 19), both.detach())),
        ("bias", Head(torch.randn(6, 3), torch.randn(19, 3), both.detach()[5])),
    ):
        with pytest.raises(ValueError, match="needs a teacher in its own memory"):
            kd_loss(both[:6], head, labels, inplace=True)
        assert torch.equal(both, before), name


def test_a_budget_that_holds_no_row_says_what_one_needs_and_the_next_byte_works() -> None:
    with pytest.raises(ValueError, match="which needs") as error:
        kd_loss(**GOOD, memory_budget=1)
    needed = int(str(error.value).split("needs ")[1].split(" ")[0].replace(",", ""))
    with pytest.raises(ValueError, match="at least one row"):
        kd_loss(**GOOD, memory_budget=needed - 1)
    kd_loss(**GOOD, memory_budget=needed)
    ignored = torch.where(torch.arange(6) == 2, -100, HEADS.labels)  # rows are gathered
    kd_loss(**{**GOOD, "labels": ignored}, memory_budget=needed)


def test_nothing_is_allocated_before_the_checks_have_passed() -> None:
    weight = torch.empty(1).expand(2**20, 24)  # 4 GiB of logits for a thousand rows
    hidden, labels = torch.randn(1000, 24), torch.zeros(1000, dtype=torch.int64)
    wrong = Head(torch.randn(1000, 40), HEADS.teacher_weight)

    def call() -> None:
        with pytest.raises(ValueError, match="same vocabulary size"):
            kd_loss(Head(hidden, weight), wrong, labels)

    assert cpu_peak(call).highest < 2**20


def test_nothing_is_written_before_the_checks_have_passed() -> None:
    before, version = GROWN.detach().clone(), GROWN._version
    bad: list[tuple[Any, dict[str, Tensor]]] = [
        (teacher(weight=torch.randn(21, 40))["teacher"], {"labels": HEADS.labels}),
        (teacher(scale=math.nan)["teacher"], {"labels": HEADS.labels}),
        (HEADS.teacher_side, {"labels": HEADS.labels + 19}),
    ]
    for side, rows in bad:
        with pytest.raises(ValueError, match="must"):
            kd_loss(GROWN, side, **rows, inplace=True)
    assert torch.equal(GROWN, before)
    assert GROWN._version == version
