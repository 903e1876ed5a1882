"""Answers of servers and tensors of other frameworks, as :class:`fused_kd.TopK` teachers.

One function for each producer, without a client: send the request as you like, and pass the answer.
All return rows that are aligned with the logits, as the loss expects its labels: row i scores the
token after token i, so that nothing is shifted in the loss. A row that the producer did not score,
such as the last of a sequence or padding, has no entries: its soft term is 0. Since it still counts
as a row, give it the label -100.

Values are checked here, while they are on the CPU: the loss does not read those of a GPU.

**Which tail.** No producer sends the mass outside the support.

* "bucket" is the better objective if that mass is large. It is computed as 1 - Σ exp(logprobs),
  and refused if a row's is below 1e-3: there it is mostly rounding. Confident teachers have such
  rows: :func:`with_tail` sets a floor.
* "zero" teaches the student that this mass is 0, which is nearly so in those rows. The student
  becomes more confident than the teacher by the mass that is left out.
* "renormalize" teaches nothing about this mass: use it with a hard term, or if the entries are the
  whole vocabulary.

With "zero" and "renormalize" the loss may have any temperature: what was measured at 1 is changed
exactly. A "bucket" cannot be changed.
"""

from .axolotl import from_axolotl
from .scored import with_tail
from .sglang import from_sglang
from .swift import from_swift
from .trl import from_trl
from .verl import from_verl
from .vllm import from_vllm, from_vllm_token_ids

__all__ = [
    "from_axolotl",
    "from_sglang",
    "from_swift",
    "from_trl",
    "from_verl",
    "from_vllm",
    "from_vllm_token_ids",
    "with_tail",
]
