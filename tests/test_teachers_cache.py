"""A cache returns what was written, to float16, and refuses whatever was changed or is foreign."""

from __future__ import annotations

import math
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.caches import LENGTHS, SETTINGS, K, V, files, logits_of, teacher_of, texts, write

from fused_kd import TopK, kd_loss
from fused_kd.sides import TAILS
from fused_kd.teachers import TopKDataset, TopKWriter, fingerprint, text_fingerprint
from fused_kd.teachers.folder import MAPPED
from fused_kd.teachers.manifest import Manifest

pytestmark = pytest.mark.usefixtures("no_fsync")


def one(folder: Path, topk: TopK, **settings: Any) -> TopK:
    """Return a TopK (n, K) after it was written to a cache of its own, and read."""
    rows, k = topk.logprobs.shape
    ids = torch.arange(rows) % 3
    kind = {"tail": topk.tail, "temperature": topk.temperature}
    with TopKWriter(folder, **{"vocabulary": V, "k": k, **kind, **settings}) as writer:
        writer.write(ids, topk)
    sample = TopKDataset(folder)[0]
    assert torch.equal(sample["input_ids"], ids)
    teacher = sample["teacher"]
    assert isinstance(teacher, TopK)
    return teacher


# ------------------------------------------------------------------------------------ round trip


def test_sequences_come_back(tmp_path: Path) -> None:
    dataset = TopKDataset(write(tmp_path / "cache", shard_bytes=100), texts())
    assert len(dataset) == len(LENGTHS)
    assert dataset.manifest.rows == sum(LENGTHS)
    assert dataset.manifest.text == text_fingerprint(texts())
    for text, sample in zip(texts(), (dataset[i] for i in range(len(dataset))), strict=True):
        want, got = teacher_of(text), sample["teacher"]
        assert torch.equal(sample["input_ids"], text)
        assert torch.equal(got.token_ids.long(), want.token_ids)
        torch.testing.assert_close(got.tail_logprob, want.tail_logprob, rtol=1e-6, atol=0)
        assert (got.tail, got.temperature) == ("bucket", 1.0)
    assert torch.equal(dataset[-1]["input_ids"], texts()[-1])
    with pytest.raises(IndexError):
        dataset[len(dataset)]


@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
def test_the_error_of_float16_is_that_of_the_ratio_to_the_largest(
    tmp_path: Path, spread: float
) -> None:
    logits = spread * torch.randn(40, V, dtype=torch.float64)
    want = TopK.from_logits(logits, 32)
    got = one(tmp_path / "cache", want)
    ratio, stored = (x.logprobs - x.logprobs.amax(-1, keepdim=True) for x in (want, got))
    assert ((stored - ratio).abs() <= -ratio / 2**11 + 1e-6).all()
    assert want.tail_logprob is not None
    assert got.tail_logprob is not None
    assert ((got.tail_logprob - want.tail_logprob).abs() <= 1e-6 * want.tail_logprob.abs()).all()
    inside, mass = (x.logprobs.double().logsumexp(-1) for x in (want, got))
    assert ((mass - inside).abs() < 1e-6).all()  # the support's mass is not rounded to 16 bits


def test_an_offset_of_raw_logits_costs_no_digits(tmp_path: Path) -> None:
    exact = TopK.from_logits(3 * torch.randn(20, V, dtype=torch.float64), 16)
    shifted = exact._replace(logprobs=exact.logprobs + 1e4, tail="renormalize")
    got = one(tmp_path / "cache", shifted)
    ratio, stored = (x.logprobs - x.logprobs.amax(-1, keepdim=True) for x in (exact, got))
    assert ((stored - ratio).abs() <= -ratio / 2**11 + 1e-6).all()


@pytest.mark.parametrize("tail", TAILS)
def test_every_tail_and_absent_entries(tmp_path: Path, tail: str) -> None:
    ids = torch.tensor([[5, 2, 7], [299, 0, -9], [-1, -1, 10**6]])
    q = torch.tensor([[0.5, 0.25, 0.25], [0.75, 0.25, 0.0], [0.0, 0.0, 0.0]])
    mass = torch.tensor([0.9, 1e-12, 0.0]) if tail == "bucket" else torch.zeros(3)
    bucket = mass.log() if tail == "bucket" else None
    topk = TopK(ids, (q * (1 - mass[:, None])).log(), bucket, tail, 2.0)
    got = one(tmp_path / "cache", topk, k=5)  # two more entries, absent
    present = q > 0
    assert torch.equal(got.token_ids[:, :3][present].long(), ids[present])
    torch.testing.assert_close(got.logprobs[:, :3], topk.logprobs, rtol=1e-3, atol=1e-6)
    assert (got.logprobs[:, 3:] == -math.inf).all()
    assert ((got.token_ids >= 0) & (got.token_ids < V)).all()
    assert (got.tail, got.temperature) == (tail, 2.0)
    if bucket is None:
        assert got.tail_logprob is None
    else:
        torch.testing.assert_close(got.tail_logprob[:2], bucket[:2])
        assert got.tail_logprob[2] == 0  # a row without entries is all tail
    loss = kd_loss(torch.randn(3, V), got, temperature=2.0, hard_weight=0.0, backend="reference")
    assert loss.isfinite()


@pytest.mark.parametrize("inside", [1e-12, 1e-6, 0.5, 1 - 1e-6, 1 - 1e-12])
def test_the_masses_of_the_support_and_of_the_tail_are_exact(tmp_path: Path, inside: float) -> None:
    mass = torch.tensor(inside, dtype=torch.float64)
    logprobs = (mass * torch.tensor([[0.75, 0.25]], dtype=torch.float64)).log()
    tail = torch.log1p(-mass)
    got = one(tmp_path, TopK(torch.tensor([[3, 1]]), logprobs, tail.view(1)))
    assert got.tail_logprob is not None
    torch.testing.assert_close(got.tail_logprob[0].double(), tail, rtol=1e-6, atol=0)
    found = got.logprobs[0].double().logsumexp(0)
    torch.testing.assert_close(found, mass.log(), rtol=0, atol=3e-6)


def test_a_tail_that_is_not_given_is_the_rest(tmp_path: Path) -> None:
    want = TopK.from_logits(torch.randn(9, V), K)
    got = one(tmp_path / "cache", want._replace(tail_logprob=None))
    torch.testing.assert_close(got.tail_logprob, want.tail_logprob, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "most"), [("forward_kl", 2e-7), ("reverse_kl", 2e-7), ("jsd", 1e-7), ("tvd", 3e-4)]
)
def test_divergences_of_a_cache_and_its_teacher(tmp_path: Path, kind: str, most: float) -> None:
    """Compare them with 0, and with what the documentation states."""
    logits = 5 * torch.randn(50, V, dtype=torch.float64)
    rows = kd_loss(
        logits,
        one(tmp_path / "cache", TopK.from_logits(logits, 64)),
        temperature=1.0,
        hard_weight=0.0,
        soft_weight=1.0,
        divergence=kind,
        reduction="none",
        backend="reference",
    )
    assert (rows >= 0).all()
    assert (rows <= most).all()


@pytest.mark.parametrize(
    ("vocabulary", "size"), [(1, 1), (256, 1), (257, 2), (65537, 3), (2**24 + 1, 4)]
)
def test_ids_take_the_fewest_bytes(tmp_path: Path, vocabulary: int, size: int) -> None:
    ids = torch.tensor([[vocabulary - 1], [0]])
    half = torch.full((2, 1), 0.5).log()
    with TopKWriter(tmp_path, vocabulary=vocabulary, k=1) as writer:
        writer.write(ids[:, 0], TopK(ids, half, half[:, 0]))
    dataset = TopKDataset(tmp_path)
    assert (tmp_path / "shard-00000.bin").stat().st_size == 2 * (2 * size + 2 + 4)
    assert torch.equal(dataset[0]["input_ids"], ids[:, 0])
    assert torch.equal(dataset[0]["teacher"].token_ids.long(), ids)


def test_the_bytes_of_a_token_are_those_that_the_documentation_states() -> None:
    page = (Path(__file__).parents[1] / "docs" / "internals" / "teacher_cache.md").read_text()
    size = Manifest(151936, 64, "bucket", 1.0, None, 1).row_bytes
    assert size == 327
    assert f"| fused_kd | {size} |" in page
    howto = Path(__file__).parents[1] / "docs" / "howto" / "cached_teacher.md"
    assert f"takes {size} bytes" in howto.read_text()


def test_a_batch_is_written_without_its_padding(tmp_path: Path) -> None:
    first, second = texts((5, 3))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    batch = torch.stack([first, torch.cat([second, torch.tensor([-100, -100])])])
    both = TopK.from_logits(torch.stack([logits_of(first), torch.randn(5, V)]), K)
    both.logprobs[1, 3:] = math.nan  # what is padding is not read
    with TopKWriter(tmp_path, **SETTINGS) as writer:
        writer.write(batch, both, mask)
    dataset = TopKDataset(tmp_path, [first, second])
    assert dataset[1]["teacher"].logprobs.shape == (3, K)
    assert torch.equal(dataset[1]["teacher"].token_ids.long(), both.token_ids[1, :3])


def test_samples_keep_what_the_training_data_has(tmp_path: Path) -> None:
    data = [
        {"input_ids": x.tolist(), "labels": [-100] * len(x), "id": i} for i, x in enumerate(texts())
    ]
    dataset = TopKDataset(write(tmp_path, data), data)
    assert {name: x for name, x in dataset[2].items() if name != "teacher"} == data[2]


@pytest.mark.skipif(sys.platform != "linux", reason="counts the files in /proc")
def test_few_files_are_open_whatever_the_number_of_shards(tmp_path: Path) -> None:
    lengths = (1,) * (3 * MAPPED)
    dataset = TopKDataset(write(tmp_path, texts(lengths), shard_bytes=1))
    assert len(list(tmp_path.glob("shard-*"))) == len(lengths)
    before = len(os.listdir("/proc/self/fd"))
    dataset.verify()
    dataset.verify()
    assert len(os.listdir("/proc/self/fd")) <= before + MAPPED
    pickled = pickle.dumps(dataset)
    assert b"memmap" not in pickled  # it would copy a shard
    pickle.loads(pickled).verify()


# ---------------------------------------------------------------------------------------- damage


def places(folder: Path) -> list[tuple[str, int]]:
    """Return every byte of the manifest and of the index, and every fourth of the shards."""
    return [
        (name, i)
        for name, data in files(folder).items()
        for i in range(0, len(data), 4 if name.startswith("shard") else 1)
    ]


def flip(folder: Path, name: str, place: int) -> None:
    """Replace a byte in place by one with another bit; the second call restores it."""
    with open(folder / name, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << place % 8]))


def test_any_flipped_byte_is_refused_and_named(tmp_path: Path) -> None:
    write(tmp_path, shard_bytes=100)
    for name, place in places(tmp_path):
        flip(tmp_path, name, place)
        with pytest.raises(ValueError, match=name):
            TopKDataset(tmp_path).verify()
        flip(tmp_path, name, place)
    TopKDataset(tmp_path, texts()).verify()


@pytest.mark.parametrize("change", ["truncated", "longer", "missing", "foreign"])
def test_a_file_that_is_not_that_of_the_cache_is_refused(tmp_path: Path, change: str) -> None:
    write(tmp_path / "cache", shard_bytes=100)
    others = files(write(tmp_path / "other", texts(seed=1), shard_bytes=100))
    for name, data in files(tmp_path / "cache").items():
        path = tmp_path / "cache" / name
        if change == "missing":
            path.unlink()
        else:
            path.write_bytes(
                {"truncated": data[:-1], "longer": data + b"\0", "foreign": others[name]}[change]
            )
        # another cache's manifest says that the index is wrong
        match = "index" if (change, name) == ("foreign", "manifest.json") else name
        with pytest.raises((ValueError, FileNotFoundError), match=match):
            TopKDataset(tmp_path / "cache").verify()
        path.write_bytes(data)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data_0.parquet").write_bytes(b"PAR1")
    with pytest.raises(FileNotFoundError, match=r"manifest\.json"):
        TopKDataset(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"manifest\.json"):
        TopKWriter(tmp_path, **SETTINGS)
    assert list(files(tmp_path)) == ["data_0.parquet"]
    (tmp_path / "manifest.json").write_text('{"format": "fused_kd top-k cache, version 9"}')
    with pytest.raises(ValueError, match="version 9"):
        TopKDataset(tmp_path)


# --------------------------------------------------------------------------------------- mismatch


def test_training_data_that_is_not_that_of_the_cache_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    changed, shorter, swapped = texts(), texts(), texts()
    changed[2][3] += 1
    shorter[2] = shorter[2][:-1]
    swapped[1:] = reversed(swapped[1:])
    for data, why in (
        (
            changed,
            rf"sequence 2 has token {changed[2][3]} at position 3 instead of {changed[2][3] - 1}",
        ),
        (shorter, "sequence 2 has 4 tokens instead of 5"),
        (swapped, "sequence 1 has token"),
    ):
        with pytest.raises(ValueError, match=why):
            TopKDataset(tmp_path, data).verify()
    with pytest.raises(ValueError, match=r"4 sequences .* got 3"):
        TopKDataset(tmp_path, texts()[:3])
    assert text_fingerprint(changed) != text_fingerprint(texts())


def test_another_vocabulary_or_tokenizer_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    tokenizer: Any = SETTINGS["tokenizer"]
    TopKDataset(tmp_path, vocabulary=V, tokenizer=tokenizer)
    TopKDataset(tmp_path, tokenizer=fingerprint(tokenizer))
    with pytest.raises(ValueError, match=f"vocabulary .* {V}; got {V + 1}"):
        TopKDataset(tmp_path, vocabulary=V + 1)
    with pytest.raises(ValueError, match="tokenizer must be that of the cache"):
        TopKDataset(tmp_path, tokenizer={"a": 1, "b": 0})
    with pytest.raises(TypeError, match="tokenizer must have get_vocab"):
        TopKDataset(tmp_path, tokenizer=3)


def test_closing_twice_and_a_negative_keep(tmp_path: Path) -> None:
    with TopKWriter(tmp_path, **SETTINGS) as writer:
        writer.write(texts()[0], teacher_of(texts()[0]))
    writer.close()
    with pytest.raises(ValueError, match="keep must be at least 0; got -1"):
        TopKWriter(tmp_path, **SETTINGS, keep=-1)
    assert len(TopKDataset(tmp_path)) == 1


def test_the_only_shard_is_missing(tmp_path: Path) -> None:
    write(tmp_path)
    for path in tmp_path.glob("shard-*.bin"):
        path.unlink()
    with pytest.raises(ValueError, match="it has 0: it was truncated"):
        TopKDataset(tmp_path)


def test_a_cache_without_a_tokenizer_cannot_be_checked(tmp_path: Path) -> None:
    write(tmp_path, tokenizer=None)
    with pytest.raises(ValueError, match="tokenizer must be None, since"):
        TopKDataset(tmp_path, tokenizer=SETTINGS["tokenizer"])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"vocabulary": V - 1}, "vocabulary must be that of the cache"),
        ({"k": 3}, "k must be that of the cache"),
        ({"temperature": 2.0}, "temperature must be that"),
        ({"tail": "zero"}, "tail must be that"),
        ({"tokenizer": {"a": 1}}, "tokenizer must be that"),
        ({"shard_bytes": 5}, "shard_bytes must be that"),
        ({"k": V + 1}, "k must be in"),
        ({"vocabulary": 0}, "vocabulary must be in"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"tail": "ghost"}, "tail must be one of"),
    ],
)
def test_a_writer_with_other_settings_is_refused(
    tmp_path: Path, change: dict[str, Any], why: str
) -> None:
    write(tmp_path)
    with pytest.raises(ValueError, match=why):
        TopKWriter(tmp_path, **{**SETTINGS, **change})


def test_rows_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    text = texts()[0]
    good = teacher_of(text)
    duplicate = good.token_ids.clone()
    duplicate[:, 1] = duplicate[:, 0]
    cases: list[tuple[Any, str, Any]] = [
        (text[:2], "leading shape of topk", good),
        (text[:0], "at least one token", good.rows(slice(0))),
        (text - V, r"token_ids must be in \[0, V\)", good),
        (text.float(), "token_ids must be integers", good),
        (text, "must have the cache's tail, 'bucket'", good._replace(tail="zero")),
        (text, "must have the cache's temperature, 1.0", good._replace(temperature=2.0)),
        (text, f"must have the cache's k, {K}", teacher_of(text, K + 1)),
        (text, "must be in", good._replace(token_ids=good.token_ids + V)),
        (text, "at most once", good._replace(token_ids=duplicate)),
        (text, "sum is at most 1", good._replace(logprobs=good.logprobs + 1)),
        (text, "tail_logprob must be given", good.to(torch.float16)._replace(tail_logprob=None)),
    ]
    with TopKWriter(tmp_path, **SETTINGS) as writer:
        for ids, why, topk in cases:
            with pytest.raises((ValueError, TypeError), match=why):
                writer.write(ids, topk)
        assert len(writer) == 0
