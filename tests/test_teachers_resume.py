"""A writer that was killed anywhere goes on, and its files become those of one that was not."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.caches import LENGTHS, SETTINGS, files, teacher_of, texts, write
from test_teachers_cache import flip, places

from fused_kd.teachers import TopKDataset, TopKWriter, writer
from fused_kd.teachers.manifest import Manifest

SHARD_BYTES = 100  # two or three sequences


pytestmark = pytest.mark.usefixtures("no_fsync")


class Killed(BaseException):
    """Stands for SIGKILL: nothing that was to happen after it does."""


def kills(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Yield while every write, whole or in part, and every manifest is the last that happens."""
    write_all, replace = writer._write, os.replace
    for share in (0, 0.3, 1):
        for last in range(2 * len(LENGTHS)):
            writes = iter(range(2 * len(LENGTHS)))

            def write_part(file: object, offset: int, data: bytes) -> None:
                if next(writes) < last:  # noqa: B023
                    return write_all(file, offset, data)  # type: ignore[arg-type]
                write_all(file, offset, data[: int(share * len(data))])  # type: ignore[arg-type]  # noqa: B023
                raise Killed

            monkeypatch.setattr(writer, "_write", write_part)
            yield f"write {last}, {share} of it"
    monkeypatch.setattr(writer, "_write", write_all)
    for last in range(4):  # the first manifest, two at the end of a shard, the one of close()
        manifests = iter(range(5))

        def replace_some(source: str, target: str) -> None:
            if next(manifests) == last:  # noqa: B023
                raise Killed
            replace(source, target)

        monkeypatch.setattr(os, "replace", replace_some)
        yield f"manifest {last}"


def test_after_a_kill_at_any_write_the_files_are_those_of_a_run_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = files(write(tmp_path / "want", shard_bytes=SHARD_BYTES))
    assert len(want) > 4  # several shards
    for number, moment in enumerate(kills(monkeypatch)):
        folder = tmp_path / str(number)
        with pytest.raises(Killed):
            write(folder, shard_bytes=SHARD_BYTES)
        monkeypatch.undo()
        with pytest.raises(
            (ValueError, FileNotFoundError), match=r"must be finished|must be a cache"
        ):
            TopKDataset(folder)
        TopKWriter(folder, **SETTINGS, shard_bytes=SHARD_BYTES).close()
        TopKDataset(folder).verify()  # what was finished, and nothing after it
        assert files(write(folder, shard_bytes=SHARD_BYTES)) == want, moment


def test_an_exception_of_the_caller_leaves_a_cache_to_go_on_with(tmp_path: Path) -> None:
    want = files(write(tmp_path / "want"))
    first = texts()[0]
    with contextlib.suppress(MemoryError), TopKWriter(tmp_path / "cache", **SETTINGS) as w:
        w.write(first, teacher_of(first))
        raise MemoryError
    with pytest.raises(ValueError, match="must be finished"):
        TopKDataset(tmp_path / "cache")
    with TopKWriter(tmp_path / "cache", **SETTINGS) as w:
        assert (len(w), w.rows) == (1, LENGTHS[0])
    w = TopKWriter(tmp_path / "cache", **SETTINGS)  # a closed cache may be continued
    w.write(texts()[1], teacher_of(texts()[1]))
    w._close_files()
    with pytest.raises(ValueError, match="must be finished"):
        TopKDataset(tmp_path / "cache")
    assert files(write(tmp_path / "cache")) == want


def test_a_write_that_failed_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = files(write(tmp_path / "want"))
    write_all = writer._write

    def full_disk(file: object, offset: int, data: bytes) -> None:
        write_all(file, offset, data[:5])  # type: ignore[arg-type]
        raise OSError(28, "No space left on device")

    with TopKWriter(tmp_path / "cache", **SETTINGS) as w:
        for text in w.missing(texts()):
            monkeypatch.setattr(writer, "_write", full_disk)
            with pytest.raises(OSError, match="No space"):
                w.write(text, teacher_of(text))
            monkeypatch.undo()
            w.write(text, teacher_of(text))
    assert files(tmp_path / "cache") == want


def unfinished(folder: Path) -> Path:
    """Write a cache, of which the manifest counts two sequences, without closing it."""
    w = TopKWriter(folder, **SETTINGS, shard_bytes=SHARD_BYTES)
    for text in texts():
        w.write(text, teacher_of(text))
    w._close_files()
    assert 0 < Manifest.read(folder).sequences < len(LENGTHS)
    return folder


def test_no_sequence_is_dropped_because_of_a_flipped_byte(tmp_path: Path) -> None:
    good = files(unfinished(tmp_path))
    for name, place in places(tmp_path):
        flip(tmp_path, name, place)
        with pytest.raises(ValueError, match=name):
            TopKWriter(tmp_path, **SETTINGS, shard_bytes=SHARD_BYTES)
        flip(tmp_path, name, place)
    assert files(tmp_path) == good


@pytest.mark.parametrize("name", ["index.bin", "shard-00000.bin", "shard-00001.bin"])
def test_what_the_manifest_counts_must_be_there(tmp_path: Path, name: str) -> None:
    unfinished(tmp_path)
    os.truncate(tmp_path / name, 20)
    with pytest.raises(ValueError, match=rf"{name} must have .* truncated"):
        TopKWriter(tmp_path, **SETTINGS, shard_bytes=SHARD_BYTES)


def test_no_bytes_are_cut_off_that_a_killed_writer_does_not_leave(tmp_path: Path) -> None:
    unfinished(tmp_path)
    with open(tmp_path / "shard-00000.bin", "ab") as file:  # not the last
        file.write(b"foreign")
    good = files(tmp_path)
    with pytest.raises(ValueError, match=r"shard-00000\.bin has more bytes"):
        TopKWriter(tmp_path, **SETTINGS, shard_bytes=SHARD_BYTES)
    assert files(tmp_path) == good


def test_keep_is_the_way_out_of_a_damaged_cache(tmp_path: Path) -> None:
    want = files(write(tmp_path / "want", shard_bytes=SHARD_BYTES))
    folder = write(tmp_path / "cache", shard_bytes=SHARD_BYTES)
    flip(folder, "index.bin", 30)  # of sequence 1
    with pytest.raises(ValueError, match=r"index\.bin is damaged"):
        TopKWriter(folder, **SETTINGS, shard_bytes=SHARD_BYTES, keep=2)
    w = TopKWriter(folder, **SETTINGS, shard_bytes=SHARD_BYTES, keep=1)
    assert len(w) == 1
    w._close_files()
    assert files(write(folder, shard_bytes=SHARD_BYTES)) == want


def test_other_texts_than_those_of_the_cache_are_not_continued(tmp_path: Path) -> None:
    write(tmp_path, texts()[:3])
    with (
        pytest.raises(ValueError, match="sequence 0 has"),
        TopKWriter(tmp_path, **SETTINGS) as w,
    ):
        next(w.missing(texts(seed=1)))


def test_two_processes_do_not_write_to_one_folder(tmp_path: Path) -> None:
    with TopKWriter(tmp_path, **SETTINGS), pytest.raises(RuntimeError, match="another process"):
        TopKWriter(tmp_path, **SETTINGS)
    write(tmp_path)


def test_a_writer_that_ends_while_the_next_one_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the next one reads the manifest, the first one writes its last, the next one gets the lock
    lock, first = writer._lock, unfinished(tmp_path)

    def after_the_first_has_ended(*arguments: object) -> None:
        monkeypatch.setattr(writer, "_lock", lock)
        write(first, shard_bytes=SHARD_BYTES)
        lock(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(writer, "_lock", after_the_first_has_ended)
    with TopKWriter(first, **SETTINGS, shard_bytes=SHARD_BYTES) as second:
        assert second.manifest.complete
        assert len(second) == second.manifest.sequences == len(LENGTHS)


WRITER = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from support.caches import write
from fused_kd.teachers import writer

write_all, writes = writer._write, iter(range({last}))

def write_until(file, offset, data):
    if next(writes, None) is None:
        write_all(file, offset, data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    write_all(file, offset, data)

writer._write = write_until
write(Path(sys.argv[1]), shard_bytes={shard_bytes})
"""


@pytest.mark.slow
@pytest.mark.parametrize("last", [4, 5])  # bytes of a sequence, and a record
def test_a_process_that_is_killed(tmp_path: Path, last: int) -> None:
    want = files(write(tmp_path / "want", shard_bytes=SHARD_BYTES))
    script = WRITER.format(tests=str(Path(__file__).parent), last=last, shard_bytes=SHARD_BYTES)
    command = [sys.executable, "-c", script, str(tmp_path / "cache")]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    with TopKWriter(tmp_path / "cache", **SETTINGS, shard_bytes=SHARD_BYTES) as w:
        assert len(w) == 2
    assert files(write(tmp_path / "cache", shard_bytes=SHARD_BYTES)) == want
