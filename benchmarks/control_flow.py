"""The order of a kernel's basic blocks."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def ranks(successors: list[list[int]]) -> Array:
    """Return an order of the basic blocks in which loops are run to their end before what follows.

    Strongly connected parts in topological order; inside one, without the edges to its entry, the
    same again.
    """
    order: list[int] = []

    def arrange(nodes: list[int], entry: int, edges: dict[int, list[int]]) -> None:
        for part in reversed(_components(nodes, entry, edges)):
            if len(part) == 1:
                order.append(part[0])
                continue
            inside = set(part)
            head = next(
                (
                    n
                    for n in part
                    if n == entry or any(n in edges[m] for m in nodes if m not in inside)
                ),
                part[0],
            )
            kept = {n: [s for s in edges[n] if s in inside and s != head] for n in part}
            arrange(part, head, kept)

    everything = dict(enumerate(successors))
    arrange(list(everything), 0, everything)
    rank = np.zeros(len(successors), np.int64)
    rank[order] = np.arange(len(order))
    return rank


def _components(nodes: list[int], entry: int, edges: dict[int, list[int]]) -> list[list[int]]:
    """Return the strongly connected parts, each after those that it leads to (Tarjan)."""
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    found: list[list[int]] = []
    for root in [entry, *nodes]:
        if root in index:
            continue
        work: list[tuple[int, Any]] = [(root, iter(edges[root]))]
        index[root] = low[root] = len(index)
        stack.append(root)
        while work:
            node, following = work[-1]
            for other in following:
                if other not in index:
                    index[other] = low[other] = len(index)
                    stack.append(other)
                    work.append((other, iter(edges[other])))
                    break
                if other in stack:
                    low[node] = min(low[node], index[other])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    part = stack[stack.index(node) :]
                    del stack[stack.index(node) :]
                    found.append(part)
    return found
