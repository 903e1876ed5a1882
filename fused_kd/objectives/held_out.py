"""The losses of a held-out set at one evaluation, and the checks that it stays the same set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

NAMES = ("hard", "soft")


class HeldOut(NamedTuple):
    """Sums over the tokens of each sequence of a held-out set; of this rank's sequences."""

    hard: Tensor | None  # (S,), not multiplied by the objective's weight; None: it is off
    soft: Tensor | None  # (S,), as in KDLossParts.soft, c(T) included
    tokens: Tensor  # (S,): the sum of the weights of the same tokens
    ids: Tensor | None = None  # (S,), integers that identify the sequences
    measured_with: Mapping[str, Any] | None = None  # what must not change: temperature, ...

    def normalised(self) -> HeldOut:
        """Return copies: flat float64 tensors on the CPU, without gradient, and a dict."""
        hard, soft, tokens = (
            None if x is None else x.detach().to("cpu", torch.float64, copy=True).flatten()
            for x in (self.hard, self.soft, self.tokens)
        )
        assert tokens is not None
        ids = self.ids
        if ids is not None:
            dtype = ids.dtype if ids.is_floating_point() else torch.int64
            ids = ids.detach().to("cpu", dtype, copy=True).flatten()
        settings = None if self.measured_with is None else dict(self.measured_with)
        return HeldOut(hard, soft, tokens, ids, settings)

    def fault(self, first: HeldOut | None) -> str | None:
        """Return what makes normalised sums unusable, or not those of the set of `first`."""
        for name, x in zip(NAMES, (self.hard, self.soft), strict=True):
            if x is not None and x.shape != self.tokens.shape:
                return (
                    f"{name} must have the shape of tokens, ({len(self.tokens)},): a sum for each "
                    f"sequence; got {len(x)} values"
                )
        if not bool(((self.tokens >= 0) & self.tokens.isfinite()).all()):
            return "tokens must be finite and at least 0: sums of the weights of the tokens"
        if self.ids is not None and self.ids.is_floating_point():
            return f"ids must be integers; got {self.ids.dtype}"
        if self.ids is not None and len(self.ids) != len(self.tokens):
            return (
                f"ids must have a value for each sequence, {len(self.tokens)}; got {len(self.ids)}"
            )
        if first is None:
            return None
        if len(self.tokens) != len(first.tokens):
            return (
                f"the held-out set must not change; got {len(self.tokens)} sequences after "
                f"{len(first.tokens)}: evaluate on the same sequences in the same order"
            )
        if (self.ids is None) != (first.ids is None):
            return "ids must be given at every evaluation or at none, since they are compared"
        if self.ids is not None and first.ids is not None and not torch.equal(self.ids, first.ids):
            at = int((self.ids != first.ids).nonzero()[0])
            return (
                f"the held-out set must not change; got id {int(self.ids[at])} at position {at}, "
                f"where {int(first.ids[at])} was: evaluate in the same order"
            )
        if not torch.allclose(self.tokens, first.tokens, rtol=1e-6):
            return (
                "the held-out set must not change; got sequences of other numbers of tokens than "
                "before: evaluate on the same sequences in the same order, with the same weights"
            )
        old, new = dict(first.measured_with or {}), dict(self.measured_with or {})
        for name in {**old, **new}:
            if old.get(name) != new.get(name):
                return (
                    f"{name} must not change between evaluations, since it changes what the losses "
                    f"mean; it was {old.get(name)!r} and is {new.get(name)!r}"
                )
        return None


def gathered(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Return the values of all ranks, in their order; without a group, this one alone."""
    if group is None:
        return [value]
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group)
    return values


def repeated(ids: Sequence[Tensor | None]) -> int | None:
    """Return an id that is listed twice among those of all ranks, or None."""
    known = [x for x in ids if x is not None]
    if not known:
        return None
    ordered = torch.cat(known).sort().values
    equal = ordered[1:] == ordered[:-1]
    return int(ordered[1:][equal][0]) if bool(equal.any()) else None
