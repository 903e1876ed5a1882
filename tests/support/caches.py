"""Small caches of a random teacher, and their bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_kd import TopK
from fused_kd.teachers import TopKWriter
from fused_kd.teachers.fingerprints import ids_of

V, K = 300, 4
LENGTHS = (3, 1, 5, 2)
SETTINGS: dict[str, Any] = {"vocabulary": V, "k": K, "tokenizer": {"a": 0, "b": 1}}


def texts(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(V, (n,), generator=generator) for n in lengths]


def logits_of(text: Tensor, size: int = V) -> Tensor:
    """Return a teacher's logits (n, V) of a text: the same for the same text."""
    generator = torch.Generator().manual_seed(int(text.sum()))
    return 4 * torch.randn(len(text), size, generator=generator)


def teacher_of(text: Tensor, k: int = K) -> TopK:
    return TopK.from_logits(logits_of(text), k)


def write(folder: Path, sequences: list[Any] | None = None, **settings: Any) -> Path:
    """Write, or finish, the cache of these texts; return its folder."""
    with TopKWriter(folder, **{**SETTINGS, **settings}) as writer:
        for text in writer.missing(texts() if sequences is None else sequences):
            ids = ids_of(text)
            writer.write(ids, teacher_of(ids))
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
