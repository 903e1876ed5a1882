"""Read a cache, and check that it belongs to the training data."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from .fingerprints import check_ids, fingerprint, ids_of
from .folder import INDEX, Sequences, excess, read_index
from .layout import unpack, unpack_ids
from .manifest import MANIFEST, Manifest


class TopKDataset(Dataset[dict[str, Any]]):
    """The sequences of a cache, as samples for :func:`fused_kd.teachers.collate`.

    A sample is that of `texts` with an entry "teacher": the TopK of its n tokens, whose row i is
    the distribution of the token after token i, as in the logits of a causal model. Whenever a
    sample is read, its token ids are compared with those in the cache, and the checksum of its
    bytes is tested. Without `texts`, a sample has "input_ids" and "labels", both from the cache.
    Files are mapped into memory, not loaded. The dataset can be pickled.

    Args:
        folder: a cache that :class:`TopKWriter` has finished.
        texts: the training data in the order of the cache: samples with "input_ids", or token ids
            (n,).
        vocabulary: V, which must be the cache's; None: not checked.
        tokenizer: the student's, which must be the cache's, as for :func:`fingerprint`; None: not
            checked.

    Raises:
        FileNotFoundError: The folder has no cache.
        TypeError: `tokenizer` is none.
        ValueError: The cache is unfinished, damaged or truncated, or has another vocabulary,
            tokenizer or number of texts.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        texts: Sequence[Any] | None = None,
        *,
        vocabulary: int | None = None,
        tokenizer: object = None,
    ) -> None:
        path = Path(folder)
        self.manifest, self.texts = Manifest.read(path), texts
        if not self.manifest.complete:
            raise ValueError(
                f"the cache in {path} must be finished; its {MANIFEST} says that it is not: go on "
                "with TopKWriter, and close it"
            )
        records = read_index(path, self.manifest)
        larger = {path / INDEX: records.nbytes, **excess(path, self.manifest, records)}
        for file, size in larger.items():
            if file.stat().st_size > size or len(records) > self.manifest.sequences:
                raise ValueError(
                    f"{file} must be smaller, by its {MANIFEST}: it is of another cache"
                )
        self._sequences = Sequences(path, self.manifest, records)
        for name, value in (("vocabulary", vocabulary), ("tokenizer", fingerprint(tokenizer))):
            found = getattr(self.manifest, name)
            if value is not None and found is None:
                raise ValueError(
                    f"{name} must be None, since the cache in {path} was written without one; got "
                    "one: there is nothing to compare it with"
                )
            if value not in (None, found):
                raise ValueError(
                    f"{name} must be that of the cache in {path}, {found}; got {value}: token ids "
                    "of another vocabulary mean other tokens"
                )
        if texts is not None and len(texts) != len(self):
            raise ValueError(
                f"texts must be the {len(self)} sequences of the cache in {path}; got {len(texts)}"
            )

    def __len__(self) -> int:
        """Return the number of sequences."""
        return self.manifest.sequences

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Return a sample; a negative number counts from the end.

        Raises:
            IndexError: There is no such sequence.
            ValueError: Its bytes are damaged, or the text is another than the cache's.
        """
        if not -len(self) <= number < len(self):
            raise IndexError(f"the cache has {len(self)} sequences; got index {number}")
        number %= len(self)
        data, rows = self._sequences.read(number)
        token_ids = unpack_ids(self.manifest, data, rows)
        sample: Any = {"input_ids": token_ids, "labels": token_ids}
        if self.texts is not None:
            text = self.texts[number]
            check_ids(number, ids_of(text), token_ids)
            sample = text if isinstance(text, Mapping) else {"input_ids": token_ids}
        return {**sample, "teacher": unpack(self.manifest, data, rows)}

    def verify(self) -> None:
        """Read all samples.

        Raises:
            ValueError: Bytes are damaged, or a text is another than the cache's.
        """
        for number in range(len(self)):
            self[number]
