"""Batches of samples with TopKs, in a DataLoader; and the top k of a teacher, chunk by chunk."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.caches import LENGTHS, V, logits_of, teacher_of, texts, write
from torch.utils.data import ConcatDataset, DataLoader

from fused_kd import Head, TopK, kd_loss
from fused_kd.engines import memory
from fused_kd.teachers import TopKDataset, collate, measure
from fused_kd.testing.memory import cpu_peak

# ----------------------------------------------------------------------------------------- collate


def test_a_batch_has_the_loss_of_its_samples() -> None:
    sequences = texts()
    topks = [teacher_of(x, k) for x, k in zip(sequences, (4, 2, 0, 7), strict=True)]
    batch = collate([{"labels": x, "teacher": t} for x, t in zip(sequences, topks, strict=True)])
    assert batch["teacher"].logprobs.shape == (4, max(LENGTHS), 7)
    student = torch.randn(4, max(LENGTHS), V, dtype=torch.float64)
    options: dict[str, Any] = {"temperature": 1.0, "reduction": "none", "backend": "reference"}
    got = kd_loss(student, batch["teacher"], batch["labels"], **options)
    for i, (x, topk) in enumerate(zip(sequences, topks, strict=True)):
        n = len(x)
        torch.testing.assert_close(got[i, :n], kd_loss(student[i, :n], topk, x, **options))
        assert (got[i, n:] == 0).all()
    soft = kd_loss(student, batch["teacher"], **options, hard_weight=0.0)
    assert (soft[1, 1:] == 0).all()  # rows that pad have no soft term, without labels either


def test_what_else_a_sample_may_have() -> None:
    topk = teacher_of(texts()[0])
    other = topk.rows(slice(1))
    samples = [
        {
            "input_ids": [1, 2, 3],
            "labels": torch.tensor([1, 2, 3]),
            "id": 7,
            "name": "a",
            "t": topk,
        },
        {"input_ids": [4], "labels": torch.tensor([4]), "id": 8, "name": "b", "t": other},
    ]
    batch = collate(samples, length=5)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 0, 0], [4, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [[1, 2, 3, -100, -100], [4, -100, -100, -100, -100]]
    assert batch["id"].tolist() == [7, 8]
    assert batch["name"] == ["a", "b"]
    assert batch["t"].tail_logprob.shape == (2, 5)
    assert (batch["t"].tail_logprob[1, 1:] == 0).all()
    assert (batch["t"].logprobs[1, 1:] == -math.inf).all()
    pair = collate([(torch.ones(2, 2), topk), (torch.ones(2, 2), other)])
    assert isinstance(pair[1], TopK)
    assert pair[0].shape == (2, 2, 2)


@pytest.mark.parametrize(
    "change", [{"tail": "zero"}, {"temperature": 2.0}, {"tail_logprob": None}], ids=str
)
def test_teachers_that_differ_are_not_stacked(change: dict[str, Any]) -> None:
    topk = teacher_of(texts()[0])
    with pytest.raises(ValueError, match="must have the same tail and temperature"):
        collate([topk, topk._replace(**change)])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader_of_two_caches(tmp_path: Path, workers: int) -> None:
    data = texts(seed=0), texts(seed=1)
    folders = [write(tmp_path / str(i), x) for i, x in enumerate(data)]
    caches = ConcatDataset([TopKDataset(f, x) for f, x in zip(folders, data, strict=True)])
    loader = DataLoader(caches, batch_size=3, collate_fn=collate, num_workers=workers)
    batches = list(loader)
    ids = [row for batch in batches for row in batch["input_ids"]]
    lengths = 2 * LENGTHS
    assert [x[:n].tolist() for x, n in zip(ids, lengths, strict=True)] == [
        x.tolist() for x in data[0] + data[1]
    ]
    assert all(isinstance(batch["teacher"], TopK) for batch in batches)


# ----------------------------------------------------------------------------------------- measure


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_head_is_measured_as_its_logits(
    dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "FEWEST_ROWS", 3)  # several chunks
    monkeypatch.setattr(memory, "CPU_BUDGET", 0)
    hidden, weight = torch.randn(2, 5, 8, dtype=dtype), torch.randn(V, 8, dtype=dtype)
    bias = torch.randn(V, dtype=dtype)
    got = measure(Head(hidden.transpose(0, 1), weight, bias, 0.5), 6, 2.0, backend=backend)
    logits = 0.5 * F.linear(*(x.double() for x in (hidden.transpose(0, 1), weight, bias)))
    want = TopK.from_logits(logits, 6, 2.0)
    assert torch.equal(got.token_ids, want.token_ids)
    assert (got.tail, got.temperature) == ("bucket", 2.0)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    assert want.tail_logprob is not None
    for x, y in ((got.logprobs, want.logprobs), (got.tail_logprob, want.tail_logprob)):
        torch.testing.assert_close(x, y.to(exact), rtol=1e-6, atol=2e-6)


def test_the_logits_of_all_rows_are_never_stored() -> None:
    rows, size = 2048, 2048
    head = Head(torch.randn(rows, 8), torch.randn(size, 8))
    peak = cpu_peak(lambda: measure(head, 4, memory_budget=5 * 2**20))
    assert peak.highest < rows * size * 4
    assert peak.largest <= rows * size


def test_gradients_and_autocast() -> None:
    hidden, weight = torch.randn(4, 8), torch.randn(V, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = measure(Head(hidden, weight), 3)
    want = measure(F.linear(hidden.bfloat16().float(), weight.bfloat16().float()), 3)
    assert not got.logprobs.requires_grad
    assert not want.logprobs.requires_grad
    torch.testing.assert_close(got.logprobs, want.logprobs, rtol=1e-6, atol=2e-6)


def test_sides_that_cannot_be_measured() -> None:
    logits = logits_of(texts()[0])
    head = Head(torch.randn(3, 8), torch.randn(V, 8))
    for teacher, k, error in (
        (logits, V + 1, "k must be in"),
        (head, -1, "k must be in"),
        (logits.long(), 1, "teacher must be float32"),
        (head._replace(weight=torch.randn(V, 7)), 1, "the same hidden size"),
        (teacher_of(texts()[0]), 1, "teacher must be a torch.Tensor of logits or"),
    ):
        with pytest.raises((TypeError, ValueError), match=error):
            measure(teacher, k)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="temperature must be positive"):
        measure(head, 1, 0.0)
    empty = measure(head._replace(hidden=torch.randn(0, 8)), 2)
    assert empty.logprobs.shape == (0, 2)
