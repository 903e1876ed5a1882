"""The manifest of a cache: its settings, how far its writer came, and a checksum of both."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from .fingerprints import NO_TEXT

MANIFEST = "manifest.json"
FORMAT = "fused_kd top-k cache, version 1"


class Manifest(NamedTuple):
    """What manifest.json says: six settings, which never change, and what is on disk."""

    vocabulary: int
    k: int  # entries of a row; absent ones are -inf
    tail: str  # of the TopK, as the temperature
    temperature: float
    tokenizer: str | None  # fingerprint(); None: not known
    shard_bytes: int  # a shard is larger only if a single sequence is

    sequences: int = 0  # those that are counted here; further ones may follow unless complete
    rows: int = 0  # their tokens
    text: str = NO_TEXT  # their text_fingerprint()
    index_sha256: str = NO_TEXT  # that of their records
    complete: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """Return the first six fields."""
        return dict(zip(self._fields[:6], self, strict=False))

    @property
    def seed(self) -> int:
        """Return where every CRC-32 begins: the file of a cache with other settings has another."""
        return zlib.crc32(json.dumps(self.settings).encode())

    @property
    def id_bytes(self) -> int:
        """Return the bytes of a token id."""
        return max(1, -(-(self.vocabulary - 1).bit_length() // 8))

    @property
    def row_bytes(self) -> int:
        """Return the bytes of a token: 327 for K = 64 and V = 151936 with a bucket."""
        tail = 4 if self.tail == "bucket" else 0
        return self.id_bytes * (1 + self.k) + 2 * self.k + tail

    def to_bytes(self) -> bytes:
        """Return the content of the file, whose last line is the CRC-32 of the others."""
        text = json.dumps({"format": FORMAT, **self._asdict()}, indent=1) + "\n"
        return f"{text}{zlib.crc32(text.encode()):08x}\n".encode()

    def write(self, folder: Path) -> None:
        """Replace manifest.json atomically, and wait until it is on disk."""
        temporary = folder / f"{MANIFEST}.tmp"
        with open(temporary, "wb") as file:
            file.write(self.to_bytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / MANIFEST)
        if os.name == "posix":
            directory = os.open(folder, os.O_RDONLY)
            os.fsync(directory)
            os.close(directory)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Return the manifest of a folder.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is damaged, or no manifest of this version.
        """
        path = folder / MANIFEST
        if not path.exists():
            raise FileNotFoundError(f"{folder} must be a cache of TopKWriter; it has no {MANIFEST}")
        data = path.read_bytes()
        try:
            fields = json.loads(data.rpartition(b"}")[0] + b"}")
            found = fields.pop("format")
            manifest = cls(**fields) if found == FORMAT else None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path} is damaged, or no manifest of a top-k cache") from None
        if manifest is None:
            raise ValueError(f"{path} must have the format {FORMAT!r}; it has {found!r}")
        if manifest.to_bytes() != data:
            raise ValueError(f"{path} is damaged: its checksum does not match")
        return manifest
