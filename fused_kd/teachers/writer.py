"""Write a cache as the teacher runs, and go on after a kill at any time."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator
from hashlib import sha256
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checks import check_topk, check_topk_values
from ..options import KDOptions, check_count
from ..sides import TAILS, TopK
from .collating import widened
from .fingerprints import NO_TEXT, check_ids, extended, fingerprint, ids_of
from .folder import INDEX, RECORD, Records, Sequences, excess, new_record, read_index, shard_path
from .layout import pack, unpack_ids
from .manifest import MANIFEST, Manifest


class TopKWriter:
    """A cache of a teacher's top k that is written sequence by sequence.

    If the folder has a cache with these settings, it is continued: after an exception or a kill the
    files become byte for byte those of a run without one, provided that the caller goes on with
    sequence ``len(writer)``, as :meth:`missing` does. First everything that is there is checked. Of
    a sequence that was being written, nothing remains. After a power failure the last sequences may
    be damaged: `keep` goes on before them.

    As a context manager it is closed at the end; after an exception the cache stays unfinished.
    One process writes to a folder. Several write to one folder each, whose datasets
    ``torch.utils.data.ConcatDataset`` joins.

    Args:
        folder: a folder, created if missing, that is empty or has a cache with these settings.
        vocabulary: V, the entries of the teacher's logits.
        k: entries of a row, at least 1; a TopK with fewer is filled up.
        temperature: of all rows.
        tail: of all rows, see :class:`fused_kd.TopK`.
        tokenizer: the teacher's, as for :func:`fingerprint`; None: readers cannot check theirs.
        shard_bytes: the size at which a new file is begun.
        keep: go on after this number of sequences and discard all others, damaged or not.

    Raises:
        TypeError: `tokenizer` is none.
        ValueError: A setting is not valid or not that of the cache; a file is damaged or foreign.
        FileNotFoundError: The folder has files, but no cache.
        RuntimeError: Another process writes to this folder.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        vocabulary: int,
        k: int,
        temperature: float = 1.0,
        tail: str = "bucket",
        tokenizer: object = None,
        shard_bytes: int = 2**30,
        keep: int | None = None,
    ) -> None:
        _check_settings(vocabulary, k, temperature, tail)
        check_count("keep", keep, least=0)
        name = fingerprint(tokenizer)
        wanted = Manifest(vocabulary, k, tail, float(temperature), name, shard_bytes)
        self.folder = Path(folder)
        _begin(self.folder, wanted)
        self._index = _opened(self.folder / INDEX)
        try:
            _lock(self._index, self.folder)
            self.manifest = _manifest(self.folder, wanted)
            self._resume(keep)
        except BaseException:
            self._index.close()
            raise

    def __len__(self) -> int:
        """Return the number of sequences on disk."""
        return self._length

    @property
    def rows(self) -> int:
        """Return the number of tokens on disk."""
        return self._rows

    def missing(self, texts: Iterable[Any]) -> Iterator[Any]:
        """Yield the texts that are not in the cache yet, after comparing the others with it.

        Args:
            texts: all of them, in order: token ids (n,), or samples with "input_ids".

        Raises:
            ValueError: A text is not the one that the cache has in its place.
        """
        for number, text in enumerate(texts):
            if number < len(self._found.records):
                stored = unpack_ids(self.manifest, *self._found.read(number))
                check_ids(number, ids_of(text), stored)
            elif number >= self._length:
                yield text

    def write(self, token_ids: Tensor, topk: TopK, mask: Tensor | None = None) -> None:
        """Append a sequence, or every sequence of a batch.

        Args:
            token_ids: (n,) or (B, n), integers: the teacher's input.
            topk: of the same leading shape. Row i is the distribution of the token after token i,
                as in the logits of a causal model; its masses are divided by their sum.
            mask: of the same shape: 0 for padding, as in attention_mask; None: no padding.

        Raises:
            TypeError: An argument has the wrong type or dtype.
            ValueError: Shapes, values, tail or temperature do not fit each other or the cache.
        """
        token_ids, topk = token_ids.cpu(), topk.to("cpu")
        mask = None if mask is None else mask.cpu() != 0
        shape = topk.logprobs.shape[:-1]
        for name, x in (("token_ids", token_ids), ("mask", mask)):
            if x is not None and (x.shape != shape or x.dim() not in (1, 2)):
                raise ValueError(
                    f"{name} must be (n,) or (B, n), the leading shape of topk, {tuple(shape)}; "
                    f"got {tuple(x.shape)}"
                )
        for i in range(shape[0]) if len(shape) == 2 else [...]:
            ids, rows = token_ids[i], topk.rows(i)
            if mask is not None:
                ids, rows = ids[mask[i]], rows.rows(mask[i])
            self._append(ids, rows)

    def close(self) -> None:
        """Write the last manifest, so that the cache can be read. A later writer may append.

        A second call does nothing.
        """
        if self._index.closed:
            return
        self._publish(complete=True)
        self._close_files()

    def __enter__(self) -> TopKWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        self._close_files()

    def _resume(self, keep: int | None) -> None:
        """Check what is on disk, and cut off what is left of a sequence after it."""
        records = read_index(self.folder, self.manifest, keep)
        last = int(records["shard"][-1]) if len(records) else 0
        larger = excess(self.folder, self.manifest, records)
        # a killed writer leaves one such shard: the last, or one that it had just begun
        left = {shard_path(self.folder, last), shard_path(self.folder, last + 1)}
        for path in () if keep is not None else larger:
            if path not in left or len(larger) > 1:
                raise ValueError(
                    f"{path} has more bytes than {INDEX} says: one of the two was truncated, or is "
                    f"of another cache; keep={len(records)} goes on without them"
                )
        for path, size in larger.items():
            os.truncate(path, size)
        self._index.truncate(records.nbytes)
        self._found = Sequences(self.folder, self.manifest, records)
        self._length = self._rows = self._size = 0
        self._text, self._hash, self._shard = NO_TEXT, sha256(), last
        for number in range(len(records)):
            token_ids = unpack_ids(self.manifest, *self._found.read(number))
            self._count(token_ids, records[number : number + 1])
        self._data = _opened(shard_path(self.folder, self._shard))
        if keep is not None:
            self._publish(complete=False)

    def _append(self, token_ids: Tensor, topk: TopK) -> None:
        """Write the bytes of a sequence, then its record."""
        _check_rows(self.manifest, token_ids, topk)
        rows = len(token_ids)
        data = pack(self.manifest, token_ids, widened(topk, rows, self.manifest.k))
        if self.manifest.complete:
            self._publish(complete=False)
        if self._size > 0 and self._size + len(data) > self.manifest.shard_bytes:
            self._publish(complete=False)
            self._data.close()
            self._shard, self._size = self._shard + 1, 0
            self._data = _opened(shard_path(self.folder, self._shard))
        _write(self._data, self._size, data)
        crc = zlib.crc32(data, self.manifest.seed)
        record = new_record(self.manifest, self._shard, rows, self._size, crc)
        _write(self._index, self._length * RECORD.itemsize, record.tobytes())
        self._count(token_ids, record)

    def _count(self, token_ids: Tensor, record: Records) -> None:
        """Count a sequence that is on disk."""
        self._length += 1
        self._rows += len(token_ids)
        self._size = int(record["offset"][0]) + len(token_ids) * self.manifest.row_bytes
        self._text = extended(self._text, token_ids)
        self._hash.update(record.tobytes())

    def _publish(self, complete: bool) -> None:
        """Write a manifest that counts all sequences, after they are on disk."""
        os.fsync(self._data.fileno())
        os.fsync(self._index.fileno())
        self.manifest = self.manifest._replace(
            sequences=self._length,
            rows=self._rows,
            text=self._text,
            index_sha256=self._hash.hexdigest(),
            complete=complete,
        )
        self.manifest.write(self.folder)

    def _close_files(self) -> None:
        self._data.close()
        self._index.close()


def _begin(folder: Path, wanted: Manifest) -> None:
    """Write the first manifest to an empty folder, and check the settings of another one.

    A writer that was killed may have left the file that was to become the first manifest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not any(path.name != f"{MANIFEST}.tmp" for path in folder.iterdir()):
        wanted.write(folder)
    _manifest(folder, wanted)


def _manifest(folder: Path, wanted: Manifest) -> Manifest:
    """Return the manifest of a folder, whose settings must be `wanted`."""
    found = Manifest.read(folder)
    for name, value in wanted.settings.items():
        if value != found.settings[name]:
            raise ValueError(
                f"{name} must be that of the cache in {folder}, {found.settings[name]!r}; got "
                f"{value!r}: go on with the same settings, or choose another folder"
            )
    return found


def _opened(path: Path) -> FileIO:
    """Return a file to read and write, unbuffered; it is created, but not truncated."""
    return FileIO(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+")


def _write(file: FileIO, offset: int, data: bytes) -> None:
    """Write all bytes at an offset, over what a write that failed may have left there."""
    file.seek(offset)
    rest = memoryview(data)
    while len(rest) > 0:
        rest = rest[file.write(rest) :]


def _lock(file: FileIO, folder: Path) -> None:
    """Take the lock of a cache until the file is closed or this process ends."""
    if os.name != "posix":
        return
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise RuntimeError(
            f"another process writes to {folder}: give each process a folder of its own"
        ) from None


def _check_settings(vocabulary: int, k: int, temperature: float, tail: str) -> None:
    if not 1 <= vocabulary <= 2**31:
        raise ValueError(f"vocabulary must be in [1, 2**31]; got {vocabulary}")
    if not 1 <= k <= vocabulary:
        raise ValueError(f"k must be in [1, V] = [1, {vocabulary}]; got {k}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite; got {temperature}")
    if tail not in TAILS:
        raise ValueError(f"tail must be one of {', '.join(map(repr, TAILS))}; got {tail!r}")


def _check_rows(manifest: Manifest, token_ids: Tensor, topk: TopK) -> None:
    """Check a sequence (n,) and its n rows, on the CPU, against the cache."""
    if token_ids.is_floating_point():
        raise TypeError(f"token_ids must be integers; got {token_ids.dtype}")
    if len(token_ids) == 0:
        raise ValueError("token_ids must have at least one token in each sequence; got none")
    outside = (token_ids < 0) | (token_ids >= manifest.vocabulary)
    if bool(outside.any()):
        raise ValueError(
            f"token_ids must be in [0, V) = [0, {manifest.vocabulary}) unless mask is 0; got "
            f"{token_ids[outside][0].item()}"
        )
    k = max(topk.logprobs.shape[-1], manifest.k)  # fewer entries are filled up
    for name, value in (("tail", topk.tail), ("temperature", topk.temperature), ("k", k)):
        if value != manifest.settings[name]:
            raise ValueError(
                f"topk must have the cache's {name}, {manifest.settings[name]!r}; got {value!r}"
            )
    # what the loss checks, for a student that takes no memory
    student = torch.empty(()).expand(len(token_ids), manifest.vocabulary)
    check_topk(student, token_ids.shape, topk, KDOptions(temperature=manifest.temperature))
    check_topk_values(topk, manifest.vocabulary)
