"""How the rows of a sequence become bytes, and what float16 costs.

A sequence of n tokens is four arrays, one after the other, little-endian: its token ids (n,), the
ids of the support (n, K), its log-probabilities (n, K), and for ``tail="bucket"`` the logarithm of
the tail (n,). Ids have the fewest whole bytes that hold V - 1; the tail is float32.

Log-probabilities are float16, relative to the largest of the row, so that the offset of a row costs
no digits: of an entry whose probability is r times the largest, log r has a relative error of at
most 2^-11. The largest is not stored: Σ exp(logprobs) = 1 - exp(tail), and float32 holds both to
1e-7. So the masses that are read have the sum 1, and that of the support is not rounded to 16 bits.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..sides import TopK
from .manifest import Manifest


def pack(manifest: Manifest, token_ids: Tensor, topk: TopK) -> bytes:
    """Return the bytes of a sequence: ids (n,) and n rows of K entries, checked, on the CPU."""
    z = topk.logprobs.detach().double()
    largest = z.amax(-1, keepdim=True)
    is_empty = largest == -math.inf
    relative = (z - largest.masked_fill(is_empty, 0)).half()
    size = manifest.id_bytes
    arrays = [
        _narrowed(token_ids, size),
        _narrowed(topk.token_ids.where(z > -math.inf, 0), size),
        relative.numpy().astype("<f2"),
    ]
    if manifest.tail == "bucket":
        inside = z.logsumexp(-1)
        tail = (-inside.expm1()).log() if topk.tail_logprob is None else topk.tail_logprob.double()
        share = tail - torch.logaddexp(inside, tail)
        arrays.append(share.masked_fill(is_empty[:, 0], 0).numpy().astype("<f4"))
    return b"".join(array.tobytes() for array in arrays)


def unpack(manifest: Manifest, data: memoryview, rows: int) -> TopK:
    """Return the TopK of a sequence of n rows: ids int32 (n, K), the others float32."""
    k, size = manifest.k, manifest.id_bytes
    begin, middle, end = (np.cumsum([size, size * k, 2 * k]) * rows).tolist()
    ids = _widened(data[begin:middle], size).view(rows, k)
    relative = np.frombuffer(data[middle:end], "<f2").astype(np.float32)
    logprobs = torch.from_numpy(relative).view(rows, k)
    total = logprobs.logsumexp(-1, keepdim=True)
    logprobs = (logprobs - total).masked_fill(total == -math.inf, -math.inf)
    tail = None
    if manifest.tail == "bucket":
        tail = torch.from_numpy(np.frombuffer(data[end:], "<f4").astype(np.float32))
        logprobs += (-tail.expm1()).log()[:, None]
    return TopK(ids, logprobs, tail, manifest.tail, manifest.temperature)


def unpack_ids(manifest: Manifest, data: memoryview, rows: int) -> Tensor:
    """Return the token ids of a sequence (n,), int64."""
    return _widened(data[: rows * manifest.id_bytes], manifest.id_bytes).long()


def _narrowed(ids: Tensor, size: int) -> np.ndarray:
    """Return integers as `size` bytes each, one more dimension."""
    return ids.numpy().astype("<u4")[..., None].view(np.uint8)[..., :size]


def _widened(data: memoryview, size: int) -> Tensor:
    """Return integers of `size` bytes each as int32 (n,)."""
    wide = np.zeros((len(data) // size, 4), np.uint8)
    wide[:, :size] = np.frombuffer(data, np.uint8).reshape(-1, size)
    return torch.from_numpy(wide.view("<i4")[:, 0].astype(np.int32))
