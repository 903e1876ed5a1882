"""Bad input at the linear level: messages name the argument, what was expected and what came."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from linear_helpers import make_heads

from fused_kd import LinearKDLoss, linear_kd_loss
from fused_kd.testing.memory import cpu_peak

HEADS = make_heads(rows=6, vocabulary=19)
GOOD: dict[str, Any] = {
    "student_hidden": HEADS.hidden,
    "student_weight": HEADS.weight,
    "teacher_hidden": HEADS.teacher_hidden,
    "teacher_weight": HEADS.teacher_weight,
    "labels": HEADS.labels,
}
LOGITS = torch.randn(6, 19)
PARTITIONED = torch.nn.Parameter(torch.empty(0))  # as DeepSpeed ZeRO-3 leaves it outside a forward
PARTITIONED.ds_id = 0
QUANTISED = torch.quantize_per_tensor(HEADS.teacher_weight, 0.1, 0, torch.qint8)

BAD: list[tuple[type[Exception], dict[str, Any], list[str]]] = [
    (ValueError, {"student_weight": torch.randn(19, 25)}, ["student_hidden", "H = 24", "H = 25"]),
    (ValueError, {"student_weight": PARTITIONED}, ["got (0,)", "ZeRO-3", "GatheredParameters"]),
    (ValueError, {"teacher_weight": PARTITIONED}, ["teacher_weight", "got (0,)", "ZeRO-3"]),
    (ValueError, {"student_weight": torch.empty(0)}, ["got (0,)", "sharded by FSDP"]),
    (ValueError, {"teacher_hidden": torch.randn(6, 41)}, ["teacher_hidden", "H = 41", "H = 40"]),
    (ValueError, {"teacher_weight": torch.randn(21, 40)}, ["V = 19", "V = 21", "weight[:V]"]),
    (ValueError, {"teacher_hidden": torch.randn(5, 40)}, ["teacher_hidden", "(6,)", "(5,)"]),
    (ValueError, {"teacher_logits": LOGITS}, ["teacher_logits", "teacher_hidden and", "leave one"]),
    (
        ValueError,
        {"teacher_hidden": None, "teacher_weight": None},
        ["teacher_logits", "None", "soft_weight=0"],
    ),
    (ValueError, {"teacher_weight": None}, ["teacher_weight=None"]),
    (
        ValueError,
        {"teacher_hidden": None, "teacher_weight": None, "teacher_logits": torch.randn(6, 18)},
        ["teacher_logits", "(6, 19)", "(6, 18)"],
    ),
    (
        ValueError,
        {
            "teacher_hidden": None,
            "teacher_weight": None,
            "teacher_logits": LOGITS.clone().requires_grad_(),
        },
        ["teacher_logits", "detach"],
    ),
    (TypeError, {"student_hidden": None}, ["student_hidden", "torch.Tensor", "NoneType"]),
    (TypeError, {"student_weight": None}, ["student_weight", "torch.Tensor", "NoneType"]),
    (
        ValueError,
        {"student_hidden": torch.randn(6, 0), "student_weight": torch.randn(19, 0)},
        ["student_weight", "H > 0"],
    ),
    (ValueError, {"memory_budget": 2**70}, ["memory_budget", "64 bits"]),
    (ValueError, {"chunk_rows": 2**63}, ["chunk_rows", "64 bits"]),
    (
        TypeError,
        {"student_hidden": HEADS.hidden.double()},
        ["student_hidden", "float64", "float32"],
    ),
    (ValueError, {"student_bias": torch.randn(18)}, ["student_bias", "(19,)", "(18,)"]),
    (ValueError, {"teacher_bias": torch.randn(19, 1)}, ["teacher_bias", "(19,)", "(19, 1)"]),
    (ValueError, {"memory_budget": 100}, ["memory_budget", "one row", "100"]),
    (ValueError, {"memory_budget": 0}, ["memory_budget", "at least 1"]),
    (ValueError, {"chunk_rows": 0}, ["chunk_rows", "at least 1", "0"]),
    (ValueError, {"chunk_rows": -3}, ["chunk_rows", "-3"]),
    (TypeError, {"chunk_rows": 2.5}, ["chunk_rows", "int", "2.5"]),
    (TypeError, {"memory_budget": "1G"}, ["memory_budget", "int", "1G"]),
    (ValueError, {"chunk_rows": 2, "memory_budget": 2**30}, ["chunk_rows", "memory_budget"]),
    (TypeError, {"grad_accum_dtype": "float32"}, ["grad_accum_dtype", "torch.dtype"]),
    (ValueError, {"grad_accum_dtype": torch.float16}, ["grad_accum_dtype", "float16"]),
    (ValueError, {"kept_rows": 5}, ["kept_rows", "6", "5"]),
    (TypeError, {"kept_rows": 5.0}, ["kept_rows", "int"]),
    (TypeError, {"student_hidden": HEADS.hidden.to("meta")}, ["student_hidden", "meta"]),
    (TypeError, {"student_weight": HEADS.weight.to("meta")}, ["student_weight", "meta"]),
    (TypeError, {"teacher_weight": QUANTISED}, ["teacher_weight", "quantised"]),
    (TypeError, {"student_weight": HEADS.weight.to_sparse()}, ["student_weight", "layout"]),
    (TypeError, {"student_weight": "lm_head"}, ["student_weight", "torch.Tensor", "str"]),
    (TypeError, {"student_hidden": HEADS.hidden.int()}, ["student_hidden", "int32"]),
    (TypeError, {"student_weight": HEADS.weight.bfloat16()}, ["float32", "bfloat16", "autocast"]),
    (TypeError, {"teacher_weight": HEADS.teacher_weight.half()}, ["teacher_hidden", "float16"]),
    (
        ValueError,
        {"student_weight": HEADS.weight.flatten()},
        ["student_weight", "inside the forward"],
    ),
    (ValueError, {"student_weight": HEADS.weight[:0]}, ["student_weight", "V > 0"]),
    (ValueError, {"teacher_hidden": HEADS.teacher_hidden.requires_grad_() * 1}, ["detach"]),
    (ValueError, {"labels": HEADS.labels[:5]}, ["labels", "student_hidden", "(6,)", "(5,)"]),
    (ValueError, {"labels": HEADS.labels + 19}, ["labels", "[0, 19)"]),
    (ValueError, {"labels": None}, ["labels", "hard_weight"]),
    (ValueError, {"token_weight": torch.ones(5)}, ["token_weight", "student_hidden"]),
    (ValueError, {"reduction": "batchmean"}, ["batchmean", "mean"]),
    (RuntimeError, {"backend": "cuda"}, ["backend='cuda'", "cannot run"]),
]


@pytest.mark.parametrize(("kind", "change", "told"), BAD, ids=lambda x: None)
def test_message(kind: type[Exception], change: dict[str, Any], told: list[str]) -> None:
    with pytest.raises(kind) as error:
        linear_kd_loss(**{**GOOD, **change})
    for words in told:
        assert words in str(error.value), f"{words!r} is not in: {error.value}"


def test_inplace_is_not_offered() -> None:
    with pytest.raises(TypeError, match="inplace"):
        linear_kd_loss(**GOOD, inplace=True)  # type: ignore[call-arg]


def test_the_module_refuses_when_it_is_made() -> None:
    for keywords in ({"chunk_rows": 0}, {"memory_budget": -1}, {"temperature": 0}):
        with pytest.raises(ValueError, match=next(iter(keywords))):
            LinearKDLoss(**keywords)


def test_a_budget_that_holds_no_row_says_what_one_needs_and_the_next_byte_works() -> None:
    with pytest.raises(ValueError, match="which needs") as error:
        linear_kd_loss(**GOOD, memory_budget=1)
    needed = int(str(error.value).split("needs ")[1].split(" ")[0].replace(",", ""))
    with pytest.raises(ValueError, match="at least one row"):
        linear_kd_loss(**GOOD, memory_budget=needed - 1)
    linear_kd_loss(**GOOD, memory_budget=needed)
    ignored = torch.where(torch.arange(6) == 2, -100, HEADS.labels)  # rows are gathered
    linear_kd_loss(**{**GOOD, "labels": ignored}, memory_budget=needed)


def test_nothing_is_allocated_before_the_checks_have_passed() -> None:
    weight = torch.empty(1).expand(2**20, 24)  # 4 GiB of logits for a thousand rows

    def call() -> None:
        with pytest.raises(ValueError, match="teacher_weight"):
            linear_kd_loss(
                torch.randn(1000, 24), weight, torch.randn(1000, 40), HEADS.teacher_weight,
                torch.zeros(1000, dtype=torch.int64),
            )  # fmt: skip

    assert cpu_peak(call).highest < 2**20
