"""What a side of the loss may be: logits, which are a tensor, a Head, or for a teacher a TopK."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Head(NamedTuple):
    """A side given by hidden states and the lm_head, so that its logits are never stored whole.

    It represents the logits ``scale * F.linear(hidden, weight, bias)``, (..., V); the loss computes
    them for one chunk of rows at a time. As a NamedTuple of tensors it passes through
    ``torch.compile``, DDP, FSDP and activation checkpointing. The constructor checks nothing; the
    loss does. Of a student's head, hidden, weight and bias get gradients if they require grad.

    Args:
        hidden: (..., H), float32, bfloat16, float16 or float64: the input of the lm_head; 1-D is a
            single row.
        weight: (V, H): the weight of the lm_head, or of a tied embedding; in the dtype of `hidden`,
            unless autocast is on.
        bias: (V,), of any of these dtypes; or None.
        scale: a factor of the logits, bias included; a Python number, not 0 (Cohere's
            ``logit_scale``, the inverse of Granite's ``logits_scaling``).
        softcap: must be None; a soft-capped head is not supported yet.
    """

    hidden: Tensor  # (..., H)
    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0
    softcap: float | None = None

    def to(self, *args: Any, **kwargs: Any) -> Head:
        """Return a head whose three tensors are moved or cast, as by :meth:`torch.Tensor.to`.

        Tensors that have this device and dtype already are shared; this head is not modified.
        """
        bias = None if self.bias is None else self.bias.to(*args, **kwargs)
        hidden, weight = self.hidden.to(*args, **kwargs), self.weight.to(*args, **kwargs)
        return self._replace(hidden=hidden, weight=weight, bias=bias)

    def rows(self, index: Any) -> Head:
        """Return the same head with the hidden states ``hidden[index]``.

        Any index of a tensor's leading dimensions; a view or a copy, as by torch.
        """
        return self._replace(hidden=self.hidden[index])


#: What a :class:`TopK` says of the entries outside its support.
TAILS = ("bucket", "renormalize", "zero", "sampled")
#: Entries whose log-softmax :meth:`TopK.from_logits` computes at a time: 64 MiB in float32.
_ENTRIES_AT_A_TIME = 2**24


class TopK(NamedTuple):
    """A teacher given by the log-probabilities of K tokens in each row, its support.

    It comes from a cache on disk (:mod:`fused_kd.teachers`), from a server, or from
    :meth:`from_logits`. Nothing of size (..., V) is made of it. The soft term is the divergence
    between classes: each token of the support is one, and `tail` says what the others are:

    * "bucket": together one class of mass ``exp(tail_logprob)``; in the student, the mass that its
      own softmax gives them. The masses are divided by their sum.
    * "renormalize": no class. Both sides are renormalised on the support; the soft gradient is 0
      outside of it.
    * "zero": a class of mass 0 for the teacher, whose support is renormalised; "reverse_kl" is then
      infinite for every student, and refused.
    * "sampled": as "zero", for entries drawn from the teacher: ``exp(logprobs)`` are their counts
      over the number of draws, and a token may be listed several times. Only for "forward_kl". The
      value is -Σ q̂·log p, since the teacher's entropy is not known; the expectation of its gradient
      is that of the dense teacher.

    An entry of log-probability -inf is absent, and its id is not read: rows may have any number of
    entries. A row without any has a soft term of 0, and counts. The constructor checks nothing; the
    loss does.

    Args:
        token_ids: (..., K), int32 or int64, in [0, V), each at most once in a row (but "sampled").
            K is from 0 to V.
        logprobs: (..., K), float32, bfloat16, float16 or float64: the teacher's log-probabilities.
            With "renormalize" and "zero" they may have any offset: logits do as well.
        tail_logprob: (...), float32 or float64: the logarithm of the mass outside the support; read
            by "bucket" only. None: 1 - Σ exp(logprobs), which needs float32 or float64 and is
            refused below 1e-3, where it is mostly rounding.
        tail: one of the four names above.
        temperature: the temperature at which log-probabilities and tail were measured (servers: 1).
            With "bucket" and "sampled" it must be the loss's; with the others the loss changes it
            exactly.
    """

    token_ids: Tensor  # (..., K)
    logprobs: Tensor  # (..., K)
    tail_logprob: Tensor | None = None  # (...)
    tail: str = "bucket"
    temperature: float = 1.0

    @classmethod
    def from_logits(cls, logits: Tensor, k: int, temperature: float = 1.0) -> TopK:
        """Return the k largest entries of each row of a teacher's logits, with the exact tail.

        Args:
            logits: (..., V), of a floating dtype; not modified.
            k: K, from 0 to V.
            temperature: of the log-probabilities and of the loss.

        Returns:
            A TopK with ``tail="bucket"``: ids int64, log-probabilities and tail float32 (float64 if
            the logits are), without grad. The tail is summed over the other entries, never as 1
            minus the support.

        Raises:
            TypeError: The logits are not floating.
            ValueError: They have no dimension or V = 0, `k` is not in [0, V], or `temperature` is
                not positive and finite.
        """
        if not logits.is_floating_point():
            raise TypeError(f"logits must be of a floating dtype; got {logits.dtype}")
        if logits.dim() == 0 or logits.shape[-1] == 0:
            raise ValueError(
                f"logits must have shape (..., V) with V > 0; got {tuple(logits.shape)}"
            )
        vocabulary = logits.shape[-1]
        if not 0 <= k <= vocabulary:
            raise ValueError(f"k must be in [0, V] = [0, {vocabulary}]; got {k}")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite; got {temperature}")
        rows = logits.detach().reshape(-1, vocabulary)
        height = max(1, _ENTRIES_AT_A_TIME // vocabulary)
        parts = [_top_k(part, k, temperature) for part in torch.split(rows, height)]
        ids, logprobs, tail = (torch.cat(x) for x in zip(*parts, strict=True))
        shape = logits.shape[:-1]
        return cls(
            ids.view(*shape, k), logprobs.view(*shape, k), tail.view(shape), "bucket", temperature
        )

    def to(self, *args: Any, **kwargs: Any) -> TopK:
        """Return a TopK whose tensors are moved, as by :meth:`torch.Tensor.to`.

        A dtype is that of the log-probabilities alone: ids stay integers, and a tail float32 or
        float64. Tensors that need no change are shared; this TopK is not modified.
        """
        logprobs = self.logprobs.to(*args, **kwargs)
        blocking = {"non_blocking": kwargs.get("non_blocking", False)}
        tail = self.tail_logprob
        return self._replace(
            token_ids=self.token_ids.to(logprobs.device, **blocking),
            logprobs=logprobs,
            tail_logprob=None if tail is None else tail.to(logprobs.device, **blocking),
        )

    def rows(self, index: Any) -> TopK:
        """Return the rows ``[index]`` of all tensors, with the same tail and temperature.

        Any index of the leading dimensions; views or copies, as by torch.
        """
        return self._replace(
            token_ids=self.token_ids[index],
            logprobs=self.logprobs[index],
            tail_logprob=None if self.tail_logprob is None else self.tail_logprob[index],
        )


def _top_k(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids and log-probabilities (N, k), and the tail's logarithm (N,), of logits (N, V)."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    top, ids = logits.topk(k, -1)
    z = logits.to(dtype)
    largest = z.amax(-1, keepdim=True) if z.shape[0] else z[:, :1]
    z = (z - largest) / temperature
    inside = (top.to(dtype) - largest) / temperature
    outside = z.scatter_(-1, ids, -math.inf).logsumexp(-1)
    total = torch.logaddexp(inside.logsumexp(-1), outside)
    return ids, inside - total[:, None], outside - total


#: A side as a caller passes it.
Side = Tensor | Head
#: A teacher as a caller passes it.
Teacher = Side | TopK
#: A side as the engines take it: logits (of a TopK, its classes') and two None; hidden states,
#: weight and bias; three None.
Tensors = tuple[Tensor | None, Tensor | None, Tensor | None]


def tensors_of(side: Side | None) -> Tensors:
    """Return logits, None, None; of a Head hidden states, weight and bias; of None three None.

    A Head's scale is left out.
    """
    if isinstance(side, Head):
        return side[:3]
    return side, None, None


def rows_tensor(side: Teacher) -> Tensor:
    """Return the tensor whose leading dimensions are rows, of a TopK the log-probabilities."""
    if isinstance(side, TopK):
        return side.logprobs
    return side.hidden if isinstance(side, Head) else side


def row_shape(side: Teacher) -> torch.Size:
    """Return the leading shape (...) of a side, which is the shape of the labels."""
    return rows_tensor(side).shape[:-1]


def vocabulary(side: Side) -> int:
    """Return V, the number of entries of a row of logits."""
    return side.weight.shape[0] if isinstance(side, Head) else side.shape[-1]


def row_count(shape: torch.Size) -> int:
    """Return the number of rows of a leading shape.

    ``shape.numel()`` would specialise a symbolic size in a trace.
    """
    return math.prod(shape)


def arithmetic_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return float64 if any tensor is float64, else float32; None is skipped."""
    is_double = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if is_double else torch.float32


def autocast_dtype(head: Head) -> torch.dtype | None:
    """Return the dtype that autocast rounds a head's hidden states and weight to.

    None if autocast is off for their device, and if one of the two is float64.
    """
    device = head.hidden.device.type
    if torch.float64 in (head.hidden.dtype, head.weight.dtype):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def operand_dtype(head: Head) -> torch.dtype:
    """Return the dtype that a head's hidden states and weight are rounded to before the product.

    It is autocast's, or that of the hidden states.
    """
    return autocast_dtype(head) or head.hidden.dtype
