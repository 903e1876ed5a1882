"""Megatron-LM's archives of a teacher (``megatron.training.distillation``), ``cp0_dp0__99.tar``.

An archive has one member for each iteration, tensors (S, B, K) for each micro-batch. It holds no
token ids of the text: the run must read the same samples in the same order. Ids have 17 bits, so
the vocabulary has at most 131072 entries.
"""

from __future__ import annotations

import io
import json
import math
import os
import tarfile
from collections.abc import Iterator
from typing import Any

import torch

from ...sides import TopK

#: The value of an entry that top-p has masked; its id is meaningless.
_MASKED = -1e3


def read_megatron(
    path: str | os.PathLike[str], dataset_hash: str | None = None
) -> Iterator[tuple[int, list[TopK]]]:
    """Yield each iteration of an archive, and the teacher of each of its micro-batches.

    Needs the package zstandard, or pyarrow.

    Args:
        path: the archive.
        dataset_hash: "hash" of the archive's ``_meta.json``, which Megatron-LM computes of seed,
            sequence length, number of samples and data; None: not checked.

    Yields:
        The iteration; and TopKs (B, S, K) with ids int64, log-probabilities in the dtype of the
        archive, and temperature 1.

    Raises:
        ValueError: The hash is another.
    """
    found = None
    with tarfile.open(path, "r|") as archive:
        for member in archive:
            file = archive.extractfile(member)
            if file is None:
                continue
            if member.name == "_meta.json":
                found = json.load(file)["hash"]
            elif member.name.endswith(".pt.zst"):
                if dataset_hash not in (None, found):
                    raise ValueError(f"{path} must be of dataset {dataset_hash}; got {found}")
                payload = torch.load(io.BytesIO(_decompressed(file.read())), weights_only=True)
                fields = (payload[name] for name in ("values", "indices_low", "bit_17"))
                batches = [_topk(*tensors) for tensors in zip(*fields, strict=True)]
                yield int(member.name.removesuffix(".pt.zst")), batches


def _topk(values: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> TopK:
    """Return a micro-batch, (S, B, K) each, with the batch first."""
    ids = low.long() | high.long() << 16
    logprobs = values.masked_fill(values == _MASKED, -math.inf)
    return TopK(ids.transpose(0, 1), logprobs.transpose(0, 1), None, "renormalize", 1.0)


def _decompressed(data: bytes) -> Any:
    try:
        import zstandard
    except ImportError:
        import pyarrow

        return pyarrow.input_stream(pyarrow.py_buffer(data), compression="zstd").read()
    return zstandard.ZstdDecompressor().decompress(data)
