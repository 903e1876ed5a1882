"""Other frameworks' caches, as their own code wrote them, are read as what their code reads.

The bytes and numbers of DistillKit and axolotl are results of their code (DistillKit a61c2e7,
axolotl 067b021). Megatron-LM's archive is written here by its schema (d98e8a6).
"""

from __future__ import annotations

import io
import json
import math
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_kd import TopK, kd_loss
from fused_kd.teachers import TopKDataset, TopKWriter, collate
from fused_kd.teachers.formats import from_axolotl, from_distillkit, read_distillkit, read_megatron

IDS = [[999, 0, 17, 512, 3, 256], [5, 8, 600, 1, 2, 700]]
PACKED = ["f9c000460000d000", "014089600100abc0"]
SIZES = {"d": 1000, "k": 6, "exact_k": 2, "term_dtype": "float32"}
BINS = [
    {"scale_dtype": "float16", "element_bits": 5, "num_elements": 3},
    {"scale_dtype": "float32", "element_bits": 1, "num_elements": 1},
]
DISTILLKIT: dict[str, tuple[dict[str, Any], list[str], list[list[float]]]] = {
    "polynomial": (
        {"exact_dtype": "bfloat16", "polynomial_terms": [0, 1, "sqrt"], "residual_bins": []}
        | {"delta_encoding": False},
        ["00bfa0bf546623c02499e7bf5252853f", "80bd60c02d0286c0251bc1bfd04a463e"],
        [
            [-0.5, -1.25, -2.5531, -3.3209, -4.6988, -6.1771],
            [-0.0625, -3.5, -4.1878, -5.5028, -6.9312, -8.3783],
        ],
    ),
    "differences": (
        {"exact_dtype": "float32", "polynomial_terms": [0, 2], "residual_bins": []}
        | {"delta_encoding": True, "normalize_t": True},
        ["000000bf000040bfbc6d5bbfabe095bf", "000080bd00005cc00500a0bf5992a43e"],
        [
            [-0.5, -1.25, -2.1071, -3.0944, -4.4719, -6.5],
            [-0.0625, -3.5, -4.75, -5.9643, -7.0714, -8.0],
        ],
    ),
    "quantised": (
        {"exact_dtype": "bfloat16", "polynomial_terms": None, "residual_bins": BINS}
        | {"delta_encoding": False},
        ["00bfa0bf003430400000d04000", "80bd60c0c03739800000004100"],
        [
            [-0.5, -1.25, -2.5, -3.75, -4.0, -6.5],
            [-0.0625, -3.5, -4.3594, -4.8438, -7.75, -8.0],  # theirs, in bfloat16: -4.375
        ],
    ),
}


def hexed(rows: list[str]) -> list[list[int]]:
    return [list(bytes.fromhex(row)) for row in rows]


# -------------------------------------------------------------------------------------- DistillKit


@pytest.mark.parametrize("kind", DISTILLKIT)
def test_distillkit(kind: str) -> None:
    config, values, want = DISTILLKIT[kind]
    row = {"bytepacked_indices": hexed(PACKED), "compressed_logprobs": hexed(values)}
    got = from_distillkit(row, SIZES | config)
    assert got.token_ids.tolist() == IDS
    torch.testing.assert_close(got.logprobs, torch.tensor(want), rtol=0, atol=6e-5)
    assert got[2:] == (None, "renormalize", 1.0)
    with pytest.raises(ValueError, match=r"config needs .* bytes a token"):
        from_distillkit(row, SIZES | config | {"exact_k": 6, "exact_dtype": "float64"})


def test_distillkit_of_older_versions() -> None:
    config = {"k": 6, "polynomial_degree": 2, "vocab_size": 1000, "with_sqrt_term": True}
    row = {
        "packed_indices": [[288234224460235751], [788132135515987973]],
        "exact_values": [[-0.5, -1.25], [-0.0625, -3.5]],
        "coeffs": [
            [80.00143432617188, -103.7402114868164, 53.18401336669922, -31.945175170898438],
            [-72.802978515625, 104.12674713134766, -56.73234939575195, 21.158519744873047],
        ],
    }
    want = [[-0.5, -1.25, -2.5, -3.75, -4.0, -6.5], [-0.0625, -3.5, -4.25, -5.0, -7.75, -8.0]]
    got = from_distillkit(row, config)
    assert got.token_ids.tolist() == IDS
    torch.testing.assert_close(got.logprobs, torch.tensor(want), rtol=0, atol=1e-4)
    raw = from_distillkit({"token_ids": IDS, "top_values": want}, {}, temperature=2.0)
    assert (raw.token_ids.tolist(), raw.temperature) == (IDS, 2.0)
    with pytest.raises(ValueError, match="must have columns of DistillKit; got text"):
        from_distillkit({"text": "a"}, {})


def test_distillkit_entries_that_the_server_left_out_are_absent() -> None:
    values = torch.tensor([[-0.5, -1.0, -math.inf, math.nan]])
    got = from_distillkit({"token_ids": [[1, 2, 0, 0]], "top_values": values}, {})
    assert got.logprobs.tolist() == [[-0.5, -1.0, -math.inf, -math.inf]]


def test_distillkit_files_become_a_cache_of_ours(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("yaml")
    config, values, _ = DISTILLKIT["polynomial"]
    lists = arrow.list_(arrow.list_(arrow.uint8()))
    schema = arrow.schema(
        {
            "input_ids": arrow.list_(arrow.uint64()),
            "compressed_logprobs": lists,
            "bytepacked_indices": lists,
        }
    )
    for number in (0, 2, 10):  # data_10 comes last
        text = {"input_ids": [number, 1, 2]}  # one more than rows: vLLM has none for the first
        row = text | {"compressed_logprobs": hexed(values), "bytepacked_indices": hexed(PACKED)}
        path = tmp_path / f"data_{number}.parquet"
        parquet.write_table(arrow.Table.from_pylist([row, row], schema=schema), path)
    (tmp_path / "compression_config.yaml").write_text(json.dumps(SIZES | config))  # which is YAML
    with TopKWriter(tmp_path / "ours", vocabulary=1000, k=6, tail="renormalize") as writer:
        for ids, topk in read_distillkit(tmp_path):
            writer.write(ids, topk)
    dataset = TopKDataset(tmp_path / "ours")
    assert [x["input_ids"].tolist() for x in dataset] == [[n, 1] for n in (0, 0, 2, 2, 10, 10)]
    want = from_distillkit(row, SIZES | config)
    got = dataset[5]["teacher"]
    torch.testing.assert_close(got.logprobs, want.logprobs.log_softmax(-1), rtol=0, atol=5e-3)


# ----------------------------------------------------------------------------------------- Megatron


def archive(path: Path, batches: list[TopK], arrow: Any) -> Path:
    """Write an iteration as Megatron-LM does: (S, B, K), ids of 16 + 1 bits, -1000 is masked."""
    fields: dict[str, list[torch.Tensor]] = {"values": [], "indices_low": [], "bit_17": []}
    for topk in batches:
        ids = topk.token_ids.transpose(0, 1)
        values = topk.logprobs.transpose(0, 1).half()
        fields["values"].append(values.masked_fill(values == -math.inf, -1e3))
        fields["indices_low"].append((ids & 0xFFFF).to(torch.uint16))
        fields["bit_17"].append(ids >= 2**16)
    payload = io.BytesIO()
    torch.save(fields, payload)
    data = arrow.compress(payload.getvalue(), codec="zstd", asbytes=True)
    with tarfile.open(path, "w") as tar:
        for name, content in (
            ("_meta.json", json.dumps({"hash": "abc"}).encode()),
            ("7.pt.zst", data),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_megatron(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    batches = [TopK.from_logits(3 * torch.randn(2, 5, 131072), 4) for _ in range(3)]
    batches[1].logprobs[0, 2, 1:] = -math.inf
    path = archive(tmp_path / "cp0_dp0__7.tar", batches, arrow)
    ((iteration, got),) = read_megatron(path, "abc")
    assert (iteration, len(got)) == (7, 3)
    for x, want in zip(got, batches, strict=True):
        present = want.logprobs > -math.inf
        assert torch.equal(x.token_ids[present], want.token_ids[present])
        assert torch.equal(x.logprobs, want.logprobs.half())
        assert x[2:] == (None, "renormalize", 1.0)
    with pytest.raises(ValueError, match="must be of dataset abd; got abc"):
        next(read_megatron(path, "abd"))


# ------------------------------------------------------------------------------------------ axolotl

#: Three generated tokens, 3 to 5, whose distributions are rows 2 to 4; kd_temperature = 2.
AXOLOTL = {
    "input_ids": [0, 1, 2, 3, 4, 5],
    "labels": [-100, -100, -100, 3, 4, 5],
    "target_token_ids": [[0, 1], [0, 1], [0, 1], [34, 22], [32, 36], [25, 44]],
    "target_logprobs": [[-math.inf] * 2] * 3 + [[-0.5, -0.9328], [-0.25, -1.5087], [-0.1, -2.3522]],
    "target_mask": [[0, 0]] * 3 + [[1, 1]] * 3,
}


def test_axolotl_prepared_data_moves_to_the_logits() -> None:
    got = from_axolotl(AXOLOTL, 2.0)
    assert got.token_ids[2:5].tolist() == AXOLOTL["target_token_ids"][3:]
    assert (got.logprobs[[0, 1, 5]] == -math.inf).all()
    torch.testing.assert_close(got.logprobs[2:5], torch.tensor(AXOLOTL["target_logprobs"][3:]))
    assert got[2:] == (None, "renormalize", 2.0)
    labels = torch.tensor([*AXOLOTL["labels"][1:], -100])  # of the next token
    assert torch.equal(labels != -100, (got.logprobs > -math.inf).any(-1))


def test_axolotl_batches_that_are_aligned_already() -> None:
    batch = {name: torch.tensor([x, x]) for name, x in AXOLOTL.items() if "target" in name}
    batch["target_logprobs"] = batch["target_logprobs"].masked_fill(batch["target_mask"] == 0, -1e9)
    got = from_axolotl(batch, 1.0, shift=False)
    assert got.logprobs.shape == (2, 6, 2)
    assert torch.equal(got.logprobs[1], torch.tensor(AXOLOTL["target_logprobs"]))


def test_a_student_learns_from_each() -> None:
    config, values, _ = DISTILLKIT["quantised"]
    row = {"bytepacked_indices": hexed(PACKED), "compressed_logprobs": hexed(values)}
    teachers = [from_distillkit(row, SIZES | config), from_axolotl(AXOLOTL, 1.0)]
    batch = collate([x._replace(temperature=1.0) for x in teachers])
    student = torch.randn(2, 6, 1000, requires_grad=True)
    loss = kd_loss(student, batch, temperature=2.0, hard_weight=0.0, backend="reference")
    loss.backward()
    assert student.grad is not None
    rows = (student.grad != 0).any(-1)
    assert rows.tolist() == [[True] * 2 + [False] * 4, [False] * 2 + [True] * 3 + [False]]
