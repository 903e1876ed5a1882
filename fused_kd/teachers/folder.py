"""The files of a cache, and what detects that one was changed, truncated or exchanged.

``shard-00000.bin`` and so on hold the sequences (:mod:`.layout`), ``index.bin`` a record for each,
``manifest.json`` the rest (:mod:`.manifest`). A sequence exists when its record does, which is
written after its bytes. A CRC-32, which detects any flipped byte, ends a manifest and a record, and
a record has that of its sequence. The manifest has the SHA-256 of the records that it counts: a
CRC-32 of records that end with their own would be the same for all.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from .manifest import Manifest

INDEX = "index.bin"
#: A sequence: its shard, tokens and first byte there, the CRC-32 of its bytes and of this record.
RECORD = np.dtype(
    [("shard", "<u4"), ("rows", "<u4"), ("offset", "<u8"), ("crc", "<u4"), ("check", "<u4")]
)
Records = np.ndarray[Any, Any]  # (n,) of RECORD
#: Shards that are mapped at a time; each mapping holds a file handle.
MAPPED = 16


def shard_path(folder: Path, shard: int) -> Path:
    """Return the path of a shard."""
    return folder / f"shard-{shard:05d}.bin"


def new_record(manifest: Manifest, *fields: int) -> Records:
    """Return a record (1,), given all fields but the last."""
    record = np.array([(*fields, 0)], RECORD)
    record["check"] = zlib.crc32(record.tobytes()[:-4], manifest.seed)
    return record


def read_index(folder: Path, manifest: Manifest, keep: int | None = None) -> Records:
    """Return the records of all sequences, or of the first `keep`, (n,), after checking them.

    Bytes of a record that is not whole are skipped: its writer was killed.

    Raises:
        ValueError: A record was changed, or there are fewer than the manifest says or than `keep`.
    """
    path = folder / INDEX
    data = path.read_bytes() if path.exists() else b""
    records = np.frombuffer(data[: len(data) - len(data) % RECORD.itemsize], RECORD)[:keep]
    counted = manifest.sequences if keep is None else 0
    if len(records) < max(counted, keep or 0):
        raise ValueError(
            f"{path} must have the records of {max(counted, keep or 0)} sequences; it has "
            f"{len(records)}: it was truncated"
        )
    if counted and sha256(records[:counted].tobytes()).hexdigest() != manifest.index_sha256:
        raise ValueError(f"{path} is damaged, or of another cache: its checksum does not match")
    for i in range(counted, len(records)):  # after the last manifest; the others are too many
        if new_record(manifest, *records[i].tolist()[:-1]) != records[i : i + 1]:
            raise ValueError(f"{path} is damaged in record {i}: its checksum does not match")
    return records


def excess(folder: Path, manifest: Manifest, records: Records) -> dict[Path, int]:
    """Return the shards that are larger than the index says, and the bytes that they should have.

    Raises:
        ValueError: A shard is smaller.
    """
    ends = records["offset"] + records["rows"].astype(np.uint64) * np.uint64(manifest.row_bytes)
    shards = len(list(folder.glob("shard-*.bin"))) + int(records["shard"].max(initial=0))
    sizes = np.zeros(shards + 1)  # the first shard may be missing
    np.maximum.at(sizes, records["shard"], ends)
    larger = {}
    for shard, size in enumerate(sizes.astype(int).tolist()):
        path = shard_path(folder, shard)
        here = path.stat().st_size if path.exists() else 0
        if here < size:
            raise ValueError(f"{path} must have {size} bytes; it has {here}: it was truncated")
        if here > size:
            larger[path] = size
    return larger


class Sequences:
    """The sequences of a cache, mapped into memory. It can be pickled."""

    def __init__(self, folder: Path, manifest: Manifest, records: Records) -> None:
        self.folder, self.manifest, self.records = folder, manifest, records
        self._mapped: OrderedDict[int, Any] = OrderedDict()  # the last used is the last

    def read(self, number: int) -> tuple[memoryview, int]:
        """Return the bytes of a sequence and the number of its tokens.

        Raises:
            ValueError: The bytes are not those that were written.
        """
        shard, rows, begin, crc, _ = self.records[number].tolist()
        data = self._shard(shard)[begin : begin + rows * self.manifest.row_bytes]
        if zlib.crc32(data, self.manifest.seed) != crc:
            path = shard_path(self.folder, shard)
            raise ValueError(
                f"{path} is damaged: the checksum of sequence {number}, at byte {begin}, does not "
                "match"
            )
        return data, rows

    def _shard(self, shard: int) -> memoryview:
        if shard not in self._mapped:
            self._mapped[shard] = np.memmap(shard_path(self.folder, shard), np.uint8, "r")
            if len(self._mapped) > MAPPED:
                self._mapped.popitem(last=False)
        self._mapped.move_to_end(shard)
        return memoryview(self._mapped[shard])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": OrderedDict()}  # else shards are copied
