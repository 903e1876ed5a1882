"""DistillKit's Parquet files (``distillkit.compression``): bit-packed ids, compressed values.

The largest ``exact_k`` values of a row are stored, of the others a polynomial in their rank, and
optionally quantised residuals. A row of a file is a sequence; it may have one token more than
values, since vLLM returns none for the first token.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...sides import TopK

_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


def read_distillkit(
    folder: str | os.PathLike[str], config: Mapping[str, Any] | None = None
) -> Iterator[tuple[Tensor, TopK]]:
    """Yield token ids (n,) and their TopK (n, K) of all files of a folder; needs pyarrow.

    Args:
        folder: what ``distillkit.sample_logits_vllm`` has written.
        config: as for :func:`from_distillkit`; None: of ``compression_config.yaml``, needs PyYAML.
    """
    import pyarrow.parquet as parquet

    if config is None:
        import yaml

        config = yaml.safe_load((Path(folder) / "compression_config.yaml").read_text())
    files = sorted(Path(folder).glob("*.parquet"), key=lambda path: (len(path.name), path.name))
    for path in files:
        for batch in parquet.ParquetFile(path).iter_batches(64):
            for i in range(batch.num_rows):
                row = {name: _rows(batch.column(name)[i].values) for name in batch.schema.names}
                topk = from_distillkit(row, config)
                ids = row["input_ids"].astype(np.int64)[: topk.logprobs.shape[0]]
                yield torch.from_numpy(ids), topk


def from_distillkit(
    row: Mapping[str, Any], config: Mapping[str, Any], temperature: float = 1.0
) -> TopK:
    """Return the teacher of a sequence, ids int64 and values float32 (n, K).

    Args:
        row: "compressed_logprobs" and "bytepacked_indices"; or, as older versions wrote,
            "packed_indices", "exact_values" and "coeffs"; or "token_ids" and "top_values".
        config: DistillKit's ``logprob_compressor``, or ``legacy_logit_compression`` for the second
            kind; not read for the third.
        temperature: at which the values were measured.

    Raises:
        ValueError: `row` has none of these columns, or fewer bytes than `config` says.
    """
    if "compressed_logprobs" in row:
        bits = math.ceil(math.log2(config["d"]))
        ids = _unpacked(_bytes(row["bytepacked_indices"]), config["k"], bits)
        values = _values(_bytes(row["compressed_logprobs"]), config)
    elif "packed_indices" in row:
        ids, values = _legacy(row, config)
    elif "top_values" in row:
        ids = torch.from_numpy(np.asarray(row["token_ids"], np.int64))
        values = torch.as_tensor(row["top_values"])
    else:
        raise ValueError(f"row must have columns of DistillKit; got {', '.join(row)}")
    # differences after an absent entry, of -inf and -inf, are NaN: these are absent too
    values = values.float().nan_to_num(nan=-math.inf, neginf=-math.inf)
    return TopK(ids.long(), values, None, "renormalize", temperature)


def _values(data: np.ndarray[Any, Any], config: Mapping[str, Any]) -> Tensor:
    """Return the log-probabilities (n, k), float64, of their bytes."""
    used = 0

    def take(size: int) -> np.ndarray[Any, Any]:
        nonlocal used
        used += size
        if used > data.shape[1]:
            raise ValueError(f"config needs {used} bytes a token; got {data.shape[1]}")
        return np.ascontiguousarray(data[:, used - size : used])

    def numbers(dtype: str, count: int) -> Tensor:
        kind = _DTYPES[dtype]
        return torch.from_numpy(take(count * kind.itemsize)).view(kind).double()

    k, exact = config["k"], config["exact_k"]
    values = torch.zeros(len(data), k, dtype=torch.float64)
    values[:, :exact] = numbers(config.get("exact_dtype", "float32"), exact)
    if terms := config.get("polynomial_terms"):
        is_unit = config.get("normalize_t", False)
        ranks = np.linspace(0, 1, k - exact) if is_unit else np.arange(k - exact, dtype=float)
        values[:, exact:] = numbers(config.get("term_dtype", "float32"), len(terms)) @ _powers(
            ranks, terms
        )
    for part in config["residual_bins"]:
        bits, count = part["element_bits"], part["num_elements"]
        scale = numbers(part["scale_dtype"], 1)
        steps = _unpacked(take(-(-bits * count // 8)), count, bits).double()
        steps = 2 * steps - 1 if bits == 1 else steps - 2 ** (bits - 1)
        values[:, exact : exact + count] += steps * scale
        exact += count
    return values.cumsum(-1) if config.get("delta_encoding", True) else values


def _legacy(row: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return ids and centred logits (n, k) of the older format: ids in 64-bit words."""
    k, bits = config["k"], math.ceil(math.log2(config["vocab_size"]))
    words = np.asarray(row["packed_indices"], np.int64)[:, :, None]
    ids = words >> (bits * np.arange(64 // bits)) & (2**bits - 1)
    exact = torch.as_tensor(row["exact_values"], dtype=torch.float64)
    ranks = np.arange(1.0, k - exact.shape[1] + 1)
    sign = -1 if config.get("invert_polynomial", True) else 1
    terms: list[Any] = [sign * i for i in range(config["polynomial_degree"] + 1)]
    terms += ["sqrt"] if config.get("with_sqrt_term", False) else []
    coefficients = torch.as_tensor(row["coeffs"], dtype=torch.float64)
    rest = (
        coefficients.reshape(len(exact), -1) @ _powers(ranks, terms) if len(ranks) else exact[:, :0]
    )
    return torch.from_numpy(ids.reshape(len(exact), -1)[:, :k]), torch.cat([exact, rest], -1)


def _powers(ranks: np.ndarray[Any, Any], terms: list[Any]) -> Tensor:
    """Return the terms of the polynomial at each rank, (terms, ranks)."""
    rows = [getattr(np, x)(ranks) if isinstance(x, str) else ranks ** float(x) for x in terms]
    return torch.from_numpy(np.stack(rows))


def _rows(values: Any) -> np.ndarray[Any, Any]:
    """Return a list of pyarrow as (n,), or a list of lists of equal lengths as (n, k)."""
    flat = values.flatten() if hasattr(values, "flatten") else values
    array = np.array(flat.to_numpy(zero_copy_only=False))
    return array if flat is values else array.reshape(len(values), -1)


def _bytes(column: Any) -> np.ndarray[Any, Any]:
    return np.asarray(column).astype(np.uint8)


def _unpacked(data: np.ndarray[Any, Any], count: int, bits: int) -> Tensor:
    """Return `count` integers a row, int64, of `bits` bits each, the highest bit first."""
    if data.shape[1] * 8 < count * bits:
        raise ValueError(f"config needs {count * bits} bits a token; got {data.shape[1] * 8}")
    each = np.unpackbits(data, -1)[:, : count * bits].reshape(len(data), count, bits)
    return torch.from_numpy(each.astype(np.int64) @ (1 << np.arange(bits - 1, -1, -1)))
