"""All methods that can be measured, ours first; a new peer is a module with a list METHODS."""

from . import compositions, hard_alone, liger, ours, peers, torchtune, trl
from .base import Loss, Method

METHODS: dict[str, Method] = {
    f"{method.level}/{method.key}": method
    for module in (ours, compositions, liger, trl, torchtune, peers, hard_alone)
    for method in module.METHODS
}

__all__ = ["METHODS", "Loss", "Method"]
