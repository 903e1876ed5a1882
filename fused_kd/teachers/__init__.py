"""Top-k teachers that are not in training memory.

:class:`TopKWriter` writes a cache as the teacher runs, :class:`TopKDataset` reads it, and
:func:`collate` makes batches of its samples. :func:`measure` returns the top k of a teacher with
the exact mass of all other tokens. :mod:`fused_kd.teachers.formats` reads other caches. See
``docs/howto/cached_teacher.md``.
"""

from .collating import collate
from .dataset import TopKDataset
from .fingerprints import fingerprint, text_fingerprint
from .measuring import measure
from .writer import TopKWriter

__all__ = [
    "TopKDataset",
    "TopKWriter",
    "collate",
    "fingerprint",
    "measure",
    "text_fingerprint",
]
