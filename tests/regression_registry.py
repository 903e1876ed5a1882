"""Where the regression cases register: number → what upstream saw, and the test."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

Test = Callable[[str], None]  # takes the name of a backend


class Case(NamedTuple):
    """A bug of another project that must not be ours; its number is the id of its test."""

    upstream: str
    test: Test


CASES: dict[str, list[Case]] = {}


def case(number: str, upstream: str) -> Callable[[Test], Test]:
    """Registers a test under the number of a case; a number may have several."""

    def register(test: Test) -> Test:
        CASES.setdefault(number, []).append(Case(upstream, test))
        return test

    return register
