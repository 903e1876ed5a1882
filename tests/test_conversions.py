"""Conversions to and from bfloat16 and half, by every instruction set that this processor runs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from kernel_sources import INSTRUCTION_SETS
from support import native_build
from support.backends import instruction_sets

#: So one worker builds the libraries, which all of these tests use.
pytestmark = pytest.mark.xdist_group("conversions")

DTYPES = {"bf16": 1, "f16": 2}  # csrc/problem.h
#: Takes float32 values and a key of DTYPES; returns the values rounded to it, as float32.
RoundTrip = Callable[[np.ndarray[Any, Any], str], np.ndarray[Any, Any]]


@pytest.fixture(scope="module", params=instruction_sets(INSTRUCTION_SETS))
def convert(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RoundTrip:
    name = request.param
    path = native_build.build_conversions(tmp_path_factory.mktemp("conversions"), name)
    library = ctypes.CDLL(str(path))

    def round_trip(values: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
        values = np.ascontiguousarray(values, dtype=np.float32)
        packed, out = np.empty(len(values), np.uint16), np.empty_like(values)
        code, size = DTYPES[dtype], len(values)
        library.narrow(code, _pointer(values), _pointer(packed), size)
        library.widen(code, _pointer(packed), _pointer(out), size)
        return out

    return round_trip


def _pointer(values: np.ndarray[Any, Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(values.ctypes.data)


def _as_dtype(values: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    # Rounds with numpy (half) or torch (bfloat16); the result is float32.
    if dtype == "f16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    return torch.from_numpy(values).bfloat16().float().numpy()


def _all_patterns(dtype: str) -> np.ndarray[Any, Any]:
    patterns = np.arange(65536, dtype=np.uint32)
    if dtype == "f16":
        return patterns.astype(np.uint16).view(np.float16).astype(np.float32)
    return (patterns << 16).view(np.float32)


def _same(got: np.ndarray[Any, Any], want: np.ndarray[Any, Any]) -> None:
    # Asserts the same bits, signs of zeros included; a NaN may be any NaN.
    nan = np.isnan(want)
    np.testing.assert_array_equal(np.isnan(got), nan)
    np.testing.assert_array_equal(got[~nan].view(np.uint32), want[~nan].view(np.uint32))


# more than, and fewer than, a vector of eight
@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_every_16_bit_number_comes_back(convert: RoundTrip, dtype: str, offset: int) -> None:
    values = _all_patterns(dtype)[offset:]
    _same(convert(values, dtype), values)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_rounding_is_to_nearest_even(convert: RoundTrip, dtype: str) -> None:
    numbers = _all_patterns(dtype)
    numbers = np.sort(numbers[np.isfinite(numbers)])
    with np.errstate(over="ignore"):
        ties = (numbers[:-1].astype(np.float64) + numbers[1:]) / 2
        largest = 2.0 * numbers[-1] - numbers[-2]  # halfway to what would come next: infinity
        ties = np.append(ties, [(numbers[-1] + largest) / 2]).astype(np.float32)
    beside = [np.nextafter(ties, np.float32(to)) for to in (-np.inf, np.inf)]
    anything = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    anything = anything.view(np.float32)
    for values in (ties, -ties, *beside, anything[~np.isnan(anything)]):
        _same(convert(values, dtype), _as_dtype(values, dtype))


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_nan_stays_nan(convert: RoundTrip, dtype: str) -> None:
    nan = np.array([0x7FC00000, 0xFFC00000] * 9, dtype=np.uint32).view(np.float32)
    assert np.isnan(convert(nan, dtype)).all()
