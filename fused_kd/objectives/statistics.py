"""The interval of confidence of an improvement, from losses of the same sequences at several looks.

Notation: look k measures for sequence s the loss h_ks, a sum over its tokens, and n_s, the sum of
their weights. The loss of a look is the ratio L_k = Σ_s h_ks / Σ_s n_s. The improvement over a
window is minus the slope of L over the looks' positions, times the window's length: Σ_k c_k·L_k
with coefficients c that sum to 0.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

from torch import Tensor


class Interval(NamedTuple):
    """An improvement of a loss over a window, in the loss's units, and bounds of it."""

    improvement: float
    low: float
    high: float
    #: The half width that the spread of the sequences alone would give; the rest is the noise of
    #: the looks.
    by_sequences: float

    @property
    def half_width(self) -> float:
        """Return half of the interval's length."""
        return (self.high - self.low) / 2


def slope_coefficients(positions: Tensor) -> Tensor:
    """Return c (K,) of minus the least-squares slope, times the length of the window.

    Args:
        positions: (K,), float64, increasing: steps, or numbers of looks; at least two differ.
    """
    centred = positions - positions.mean()
    return -centred / centred.square().sum() * (positions[-1] - positions[0])


def trend_error(losses: Tensor, positions: Tensor) -> float:
    """Return the standard error of the improvement from the looks' residuals about their trend.

    It shows what all sequences have in common, such as the noise of a checkpoint, which their
    spread cannot show.

    Args:
        losses: L (K,), float64; K is at least 3.
        positions: (K,), float64, increasing.
    """
    centred = positions - positions.mean()
    slope = (centred * losses).sum() / centred.square().sum()
    residuals = losses - losses.mean() - slope * centred
    variance = residuals.square().sum() / (len(losses) - 2)
    return float((variance / centred.square().sum()).sqrt() * (positions[-1] - positions[0]))


#: From this number on, the quantile is a series about the normal distribution's; its error is then
#: below 1e-6 of it, for probabilities up to 1 - 1e-7.
_MANY_DEGREES = 200


def t_quantile(probability: float, degrees: int) -> float:
    """Return the quantile of Student's distribution with `degrees` of freedom.

    By bisection, or for many degrees by the series of Abramowitz and Stegun 26.7.5.

    Args:
        probability: in [0.5, 1).
        degrees: at least 1.
    """
    if degrees >= _MANY_DEGREES:
        z = NormalDist().inv_cdf(probability)
        first = (z**3 + z) / 4
        second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
        third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
        return z + first / degrees + second / degrees**2 + third / degrees**3
    low, high = 0.0, 1.0
    while t_probability(high, degrees) < probability and high < 1e12:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if t_probability(middle, degrees) < probability else (low, middle)
        )
    return high


def t_probability(t: float, degrees: int) -> float:
    """Return P(X <= t) of Student's distribution for t >= 0.

    By the finite sums of Abramowitz and Stegun 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(degrees))
    cosine2 = math.cos(angle) ** 2
    is_odd = degrees % 2
    term = math.cos(angle) if is_odd else 1.0
    total = 0.0
    for i in range(degrees // 2):
        total += term
        term *= cosine2 * ((2 * i + 2) / (2 * i + 3) if is_odd else (2 * i + 1) / (2 * i + 2))
    both_sides = math.sin(angle) * total
    if is_odd:
        both_sides = 2 / math.pi * (angle + both_sides)
    return 0.5 + both_sides / 2


def spent_level(level: float, look: int, max_looks: int | None) -> float:
    """Return the error probability that look number `look`, from 1 on, may spend.

    The probabilities of all looks sum to at most `level`: it is divided by `max_looks`, after which
    nothing is left; without that number, look k gets 6·level/(π²k²).
    """
    if max_looks is not None:
        return level / max_looks if look <= max_looks else 0.0
    return 6 * level / (math.pi * look) ** 2
