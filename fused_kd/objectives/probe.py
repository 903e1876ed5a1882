"""Measure in parameter space whether two objectives still pull against each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Products(NamedTuple):
    """Inner products of the gradients h of the hard and s of the soft objective."""

    hh: float
    ss: float
    hs: float

    @property
    def cosine(self) -> float:
        """Return <h,s>/(|h||s|); NaN if the noise is larger than a gradient."""
        squares = self.hh * self.ss
        return self.hs / math.sqrt(squares) if min(self.hh, self.ss) > 0 else math.nan

    @property
    def weight(self) -> float:
        """Return the α in [0, 1] with the shortest α·h + (1-α)·s."""
        distance = self.hh + self.ss - 2 * self.hs  # |h - s|²
        if distance <= 0:
            return 0.5
        return min(max((self.ss - self.hs) / distance, 0.0), 1.0)

    @property
    def residual(self) -> float:
        """Return |α·h + (1-α)·s|² for that α: 0 where no step improves both objectives."""
        a, b = self.weight, 1 - self.weight
        return a * a * self.hh + 2 * a * b * self.hs + b * b * self.ss


class ParetoProbe(NamedTuple):
    """Estimates without bias, each with its standard error over the pairs of halves."""

    products: Products
    cosine: float  # of the two gradients, in [-1, 1] up to noise
    cosine_error: float
    residual: float  # squared length; around 0, also below, where no step improves both
    residual_error: float
    weight: float  # of the hard objective in the residual


def pareto_probe(
    losses: Callable[[Any], tuple[Tensor, Tensor]],
    halves: Sequence[tuple[Any, Any]],
    parameters: Iterable[nn.Parameter],
) -> ParetoProbe:
    """Return cosine and Pareto residual of the gradients of two objectives.

    An inner product of a gradient with itself contains the square of its noise, so that neither
    length nor residual ever reach 0. Here each product is between gradients of two disjoint halves
    of held-out data, whose noise is independent: its expectation is that of the products of the
    true gradients (Désidéri 2012 for the residual, "MGDA"). A point is Pareto stationary, to first
    order, if the residual is 0.

    Each half costs two forwards and two backwards. Three gradients of the parameters are in memory.
    With DistributedDataParallel and FSDP2 every rank calls it, with its share of each half; the
    wrapper averages the gradients.

    Args:
        losses: returns the hard and the soft loss of a half, 0-d, attached to the graph; without
            the weights of the sum. The parts of KDLossParts are detached: use a loss for each.
        halves: at least two pairs of disjoint halves of held-out data.
        parameters: all of the student that require grad, since the backwards add to the ``grad`` of
            any others. Their ``grad`` is the same afterwards.

    Raises:
        TypeError: `losses` does not return two attached losses.
        ValueError: There are fewer than two pairs, no parameters, or the gradients are not finite.
    """
    weights = [p for p in parameters if p.requires_grad]
    if len(halves) < 2 or any(len(pair) != 2 for pair in halves):
        raise ValueError(
            "halves must be at least two pairs of disjoint halves of held-out data, for the "
            f"standard errors; got {len(halves)} of them"
        )
    if not weights:
        raise ValueError("parameters must have at least one that requires grad; got none")
    # copies: DistributedDataParallel may write every gradient to the same memory
    kept = [None if p.grad is None else (p.grad, p.grad.clone()) for p in weights]
    try:
        products = [_products(losses, pair, weights) for pair in halves]
    finally:
        for p, grad in zip(weights, kept, strict=True):
            p.grad = None if grad is None else grad[0].copy_(grad[1])
    if not all(math.isfinite(x) for pair in products for x in pair):
        raise ValueError("losses must have finite gradients; got NaN or infinity")
    mean = _mean(products)
    # without one pair after the other: the jackknife
    others = [_mean(products[:i] + products[i + 1 :]) for i in range(len(products))]
    return ParetoProbe(
        mean,
        mean.cosine,
        _error([x.cosine for x in others]),
        mean.residual,
        _error([x.residual for x in others]),
        mean.weight,
    )


def _products(
    losses: Callable[[Any], tuple[Tensor, Tensor]], pair: tuple[Any, Any], weights: list[Any]
) -> Products:
    """Return the products between the gradients of two halves."""
    first, second = pair
    hard, soft = (_gradient(losses, first, which, weights) for which in (0, 1))
    other = _gradient(losses, second, 0, weights)
    hh, sh = _dot(hard, other), _dot(soft, other)
    del other  # before the next one: three at a time
    other = _gradient(losses, second, 1, weights)
    return Products(hh, _dot(soft, other), (_dot(hard, other) + sh) / 2)


def _gradient(
    losses: Callable[[Any], tuple[Tensor, Tensor]], half: Any, which: int, weights: list[Any]
) -> list[Tensor]:
    """Return the gradient of one of the losses, by a backward that wrappers take part in."""
    for p in weights:
        p.grad = None
    both = losses(half)
    if len(both) != 2 or not all(isinstance(x, Tensor) and x.requires_grad for x in both):
        raise TypeError(
            "losses must return two losses that are attached to the graph; got "
            f"{[type(x).__name__ for x in both]}, detached: the parts of KDLossParts are, so "
            "compute each by a loss of its own (hard_weight=1, soft_weight=0, and the reverse)"
        )
    torch.autograd.backward(both[which])
    gradients = []
    for p in weights:
        gradients.append(torch.zeros_like(p) if p.grad is None else p.grad.clone())
        p.grad = None
    return gradients


def _dot(first: list[Tensor], second: list[Tensor]) -> float:
    total = 0.0
    for a, b in zip(first, second, strict=True):
        product = (a.double() * b.double()).sum()
        # FSDP2's gradients are DTensors: each rank has a part of the sum
        total += float(product.full_tensor() if hasattr(product, "full_tensor") else product)
    return total


def _mean(products: list[Products]) -> Products:
    count = len(products)
    hh, ss, hs = (math.fsum(values) / count for values in zip(*products, strict=True))
    return Products(hh, ss, hs)


def _error(without_one: list[float]) -> float:
    """Return the jackknife's standard error from the estimates without one pair each."""
    count = len(without_one)
    mean = math.fsum(without_one) / count
    squares = math.fsum((x - mean) ** 2 for x in without_one)
    return math.sqrt((count - 1) / count * squares)
