"""Readers of other frameworks' caches, as :class:`fused_kd.TopK`.

No such cache stores the mass outside the support in 32 bits, so all teachers have
``tail="renormalize"``. Row i of a result is the distribution of the token after token i, as in the
logits of a causal model. ``TopKWriter.write(token_ids, topk)`` makes a cache of ours of each, if
it was created with ``tail="renormalize"``.
"""

from .axolotl import from_axolotl
from .distillkit import from_distillkit, read_distillkit
from .megatron import read_megatron

__all__ = ["from_axolotl", "from_distillkit", "read_distillkit", "read_megatron"]
