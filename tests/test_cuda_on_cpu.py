"""The emulator of tests/cuda_on_cpu/: correct kernels pass, planted bugs are caught."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support import native_build
from support.native_build import RACE, run_emulated
from support.processes import passes, run

#: So one worker builds the programs, which all of these tests use.
pytestmark = pytest.mark.xdist_group("the emulator")

SOURCES = native_build.ROOT / "tests" / "cuda_on_cpu"
# -rdynamic: messages name the kernel. -O0: compiled in half the time.
BUILDS: dict[str, list[str]] = {
    "plain": ["-rdynamic"],
    "memory": ["-rdynamic", "-O0", *native_build.SANITIZE],
    "races": ["-rdynamic", "-O0", "-g", "-fsanitize=thread"],
}

Programs = dict[str, Path]


def _command(target: Path, *arguments: object) -> list[object]:
    return [*native_build.FLAGS, "-I", SOURCES, *arguments, "-o", target]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    folder = tmp_path_factory.mktemp("emulator")
    source = SOURCES / "check_emulator.cpp"
    jobs = [_command(folder / name, *flags, source) for name, flags in BUILDS.items()]
    native_build.compile_all(jobs[::-1])  # begins with the slowest
    return {name: folder / name for name in BUILDS}


@pytest.mark.parametrize(("build", "seeds"), [("plain", 200), ("memory", 24), ("races", 2)])
def test_correct_kernels(programs: Programs, build: str, seeds: int) -> None:
    status, text = run_emulated(programs[build], "none", seeds)
    assert status == 0, text[-3000:]
    assert text == "0 wrong\n"


# Bug: the message that names it, after the kernel and the thread.
MESSAGES = {
    "divergent_barrier": r"block_sync, but thread \d+ of block \d waits in another: \S+:\d+",
    "two_barriers": r"block_sync, but thread \d+ of block \d waits in another: \S+:\d+",
    "early_return": r"(shuffle_xor waits for thread 70 of|shuffle_xor, but 1 threads have ended)",
    "divergent_shuffle": r"shuffle_xor: part of the warp never comes",
    "misaligned_load": r"load16: 0x\w+ is not a multiple of 16",
    "shared_overrun": r"written past the end of shared memory",
    "missing_cluster_wait": r"(a thread ends between cluster_arrive and cluster_wait|"
    r"an mbarrier used before barrier_init)",
    "missing_cluster_arrive": r"cluster_wait without cluster_arrive",
    "divergent_cluster_arrive": r"block_sync, but thread \d+ of block \d+ waits in another",
    "push_misaligned": r"push: 0x\w+ is not a multiple of 16",
    "push_at_the_end": r"(push: block \d has ended|the block ends)",
    "mail_never_waited": r"(push: block \d has ended|the block ends)",
    "wrong_parity": r"barrier_wait: no phase of parity 1 has been yet",
    "expect_too_much": r"barrier_wait: the phase can never complete",
    "expect_too_little": r"bulk_copy: 1024 bytes issued in a phase that expects 1008",
    "expect_twice": r"barrier_expect: a second time in one phase",
    "copy_past_shared": r"bulk_copy: 512 bytes to outside of the block's shared memory",
    "copy_odd_size": r"bulk_copy: 1016 bytes",
    "copy_misaligned": r"bulk_copy to: 0x\w+ is not a multiple of 16",
    "missing_init": r"an mbarrier used before barrier_init ",
    "missing_init_fence": r"an mbarrier used before barrier_init_fence",
    "never_waited": r"the block ends (before a copy into it|and the mbarrier)",
    "barrier_overwritten": r"an mbarrier was overwritten",
    "wait_for_too_many": r"wait_until: the count can never be reached",
    "block_index_as_ticket": r"wait_until: the count can never be reached",
}


@pytest.mark.parametrize("bug", MESSAGES)
def test_a_bug_is_named(programs: Programs, bug: str) -> None:
    status, text = run_emulated(programs["plain"], bug, 24)
    assert status < 0, text  # abort()
    where = r"cuda_on_cpu: kernel \w+\(\w+\), block \d+, thread \d+.*: "
    assert re.search(where + MESSAGES[bug], text), text


# Found by their results alone: NaN that was not replaced, or what another row has left.
@pytest.mark.parametrize(
    "bug",
    [
        "missing_barrier",
        "missing_second_barrier",
        "mail_read_before_wait",
        "read_before_wait",
        "arrive_before_store",
        "missing_barrier_before_arrive",
    ],
)
def test_a_race_gives_wrong_results(programs: Programs, bug: str) -> None:
    status, text = run_emulated(programs["plain"], bug, 24)
    assert status == 1, text
    assert re.search(r"\n[1-9]\d* wrong\n$", text), text


# Found by AddressSanitizer, or by what the emulator reports to it.
@pytest.mark.parametrize(
    ("bug", "message"),
    [
        ("read_past_row", "heap-buffer-overflow"),
        ("copy_past_row", "bulk_copy: 512 bytes cannot be read"),
        ("shared_overrun", "use-after-poison"),
        ("shared_read_overrun", "use-after-poison"),
        ("read_before_wait", "use-after-poison"),
        ("mail_read_before_wait", "use-after-poison"),
        ("stack_overflow", "stack-overflow"),
    ],
)
def test_a_wrong_address(programs: Programs, bug: str, message: str) -> None:
    status, text = run_emulated(programs["memory"], bug, 24)
    assert status not in (0, RACE), text
    assert message in text, text


# One order is enough: a race is found if nothing orders two accesses, in either order.
# In shared memory, in a peer's, with a bulk copy, in global memory.
@pytest.mark.parametrize(
    "bug",
    [
        "missing_second_barrier",
        "mail_read_before_wait",
        "read_before_wait",
        "missing_barrier_before_arrive",
    ],
)
def test_a_race_in_onerun_emulated(programs: Programs, bug: str) -> None:
    status, text = run_emulated(programs["races"], bug, 1)
    assert status == RACE, text
    assert "WARNING: ThreadSanitizer: data race" in text, text
    assert "check_emulator.cpp" in text, text


def test_a_seed_repeats_arun_emulated(programs: Programs) -> None:
    first = run_emulated(programs["plain"], "missing_second_barrier", 3)
    assert first == run_emulated(programs["plain"], "missing_second_barrier", 3)


@pytest.mark.slow
def test_without_assembly(tmp_path: Path) -> None:
    # The stack switch of other processors.
    for build, flags in BUILDS.items():
        source = SOURCES / "check_emulator.cpp"
        native_build.compile_one(*_command(tmp_path / build, *flags, "-DEMULATOR_UCONTEXT", source))
        status, text = run_emulated(tmp_path / build, "none", 8)
        assert status == 0, text[-3000:]
        assert "0 wrong\n" in text  # AddressSanitizer adds a general warning about ucontext


# --------------------------------------------------------------------------------- conversions

#: Takes the name of a function of check_numbers.cpp and 32-bit words; returns its results.
Numbers = Callable[[str, np.ndarray], np.ndarray]


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Numbers:
    target = tmp_path_factory.mktemp("numbers") / "numbers.so"
    native_build.compile_one(*_command(target, "-shared", "-fPIC", SOURCES / "check_numbers.cpp"))
    function = ctypes.CDLL(str(target)).check_numbers
    function.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]

    def call(name: str, words: np.ndarray) -> np.ndarray:
        words = np.ascontiguousarray(words, dtype=np.uint32)
        out = np.empty_like(words)
        assert function(name.encode(), words.ctypes.data, out.ctypes.data, words.size) == 0
        return out

    return call


def _bits(half: torch.Tensor) -> np.ndarray:
    return half.view(torch.int16).numpy().view(np.uint16).astype(np.uint32)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_every_half_is_widened_exactly(numbers: Numbers, name: str, dtype: torch.dtype) -> None:
    words = np.arange(1 << 16, dtype=np.uint32)
    got = numbers(f"from_{name}", words).view(np.float32)
    want = torch.from_numpy(words.astype(np.uint16).view(np.int16)).view(dtype).float().numpy()
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    finite = ~np.isnan(want)
    np.testing.assert_array_equal(got.view(np.uint32)[finite], want.view(np.uint32)[finite])


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_halves_are_rounded_as_torch_does(numbers: Numbers, name: str, dtype: torch.dtype) -> None:
    # Around every value that is represented and every middle between two, and random words.
    words = np.arange(1 << 16, dtype=np.uint32)
    values = numbers(f"from_{name}", words)
    values = values[np.isfinite(values.view(np.float32))]
    step = np.diff(np.sort(values), append=values.max()).astype(np.uint32) // 2
    centres = np.concatenate([np.sort(values), np.sort(values) + step])
    around = np.concatenate([centres + np.uint32(d) for d in (0, 1, 2**32 - 1)])
    limits = np.array([65519.996, 65520, 65504, 3.39e38, np.inf, np.nan], dtype=np.float32)
    random = np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, dtype=np.uint32)
    x = np.concatenate([around, limits.view(np.uint32), random])
    got = numbers(f"pack_{name}", x)
    for sign, half in ((1, got & 0xFFFF), (-1, got >> 16)):
        want = (sign * torch.from_numpy(x.view(np.float32))).to(dtype)
        nan = want.isnan().numpy()
        np.testing.assert_array_equal(half[nan], 0x7FFF)
        np.testing.assert_array_equal(half[~nan], _bits(want)[~nan])


def test_exponentials(numbers: Numbers) -> None:
    # They are within one unit in the last place; subnormal numbers are zeros.
    random = np.random.default_rng(0)
    x = random.uniform(-152, 130, 1 << 20).astype(np.float32)
    x = np.concatenate([x, np.array([0, -0.0, 1, -1, np.inf, -np.inf, np.nan, 1e-40], np.float32)])
    got = numbers("exp2", x.view(np.uint32)).view(np.float32)
    tiny = np.finfo(np.float32).tiny
    flushed = np.where(np.abs(x) < tiny, 0, x).astype(np.float64)
    with np.errstate(all="ignore"):
        want = np.exp2(flushed)
        rounded = want.astype(np.float32)
    border = np.abs(np.abs(want) - tiny) < 1e-6 * tiny  # rounding decides whether it is flushed
    rounded = np.where(np.abs(rounded) < tiny, 0, rounded)
    finite = np.isfinite(rounded) & ~border
    np.testing.assert_array_equal(got[~finite & ~border], rounded[~finite & ~border])
    unit = np.spacing(np.abs(rounded[finite]))
    assert np.max(np.abs(got[finite] - rounded[finite]) / unit) <= 1
    assert not np.any((got != 0) & (np.abs(got) < tiny))


# ------------------------------------------------------------------------------------ launching


def test_what_a_kernel_may_use_is_set_once_for_each_device(tmp_path: Path) -> None:
    # A limit set for one launch would be lowered by another thread before it.
    sources = native_build.ROOT / "tests" / "native"  # a runtime that records its calls
    program, runtime = tmp_path / "check_launching", f"-I{sources / 'fake_runtime'}"
    flags = [*native_build.FLAGS, runtime]
    native_build.compile_one(*flags, sources / "check_launching.cpp", "-o", program)
    assert passes(run(program)) == "ok\n"
