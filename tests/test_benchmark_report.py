"""Comparisons of files of results, and what is published of them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from benchmark_lines import (
    HEADS_CASE,
    LOGITS_CASE,
    TITLES,
    case_lines,
    every_suite,
    one_run,
    report_of,
    result_line,
    run_line,
    skipped_line,
    write_lines,
)

from benchmarks import compare, pictures, publish, reading, records
from benchmarks.cases import HEADS, LOGITS
from benchmarks.records import Report

# ------------------------------------------------------------------------------------ compare


def _of_logits(**changes: float) -> Report:
    return one_run(*case_lines(LOGITS, LOGITS_CASE, **changes))


def test_reports_that_agree() -> None:
    text, ok = compare.compare(_of_logits(), _of_logits(eager=1.08))
    assert ok
    lines = text.split("\n")
    assert "eager torch" in lines[2]  # the worst first
    assert "+8.0 %" in lines[2]
    assert lines[-1] == (
        "6 ratios compared, 0 of them differ by more than 10 %; "
        "11 errors compared, 0 of them grew: the files agree"
    )
    assert not compare.compare(_of_logits(), _of_logits(eager=1.08), tolerance=0.05)[1]


def test_a_slower_machine_is_no_difference_and_slower_ours_are_one() -> None:
    before = [*case_lines(LOGITS, LOGITS_CASE)]
    after = [*case_lines(LOGITS, LOGITS_CASE)]
    for line in after:
        if line["kind"] == "floor":
            line["seconds"] *= 3
        if line.get("time"):
            line["time"]["median_s"] *= 3
    assert compare.compare(one_run(*before), one_run(*after))[1]
    text, ok = compare.compare(_of_logits(), _of_logits(kdloss=1.5))
    assert not ok
    assert "DISAGREE" in text
    assert "+50.0 %" in text  # ours, of the floor
    assert "-33.3 %" in text  # the others, of ours


def test_without_a_floor_ours_are_held_to_eager() -> None:
    def step(seconds: float) -> Report:
        return one_run(*(result_line("training-step", HEADS_CASE.with_(level="step"), key, s)
                      for key, s in (("kdloss", seconds), ("eager", 2.0))))  # fmt: skip

    text, ok = compare.compare(step(1.0), step(1.2))
    assert not ok
    assert "/ eager" in text
    assert "+20.0 %" in text


def test_what_is_in_one_report_alone_is_said() -> None:
    before, after = _of_logits(), _of_logits()
    before.add(result_line(LOGITS, LOGITS_CASE, "gone", 1.0))
    after.add(result_line(LOGITS, LOGITS_CASE.with_(v=32000), "kdloss", 1.0))
    after.add(skipped_line(LOGITS, LOGITS_CASE, "trl", "not installed"))
    text, ok = compare.compare(before, after)
    assert ok
    assert f"only before: {LOGITS_CASE.name}: gone" in text
    assert f"{LOGITS_CASE.name}: {TITLES['trl']} (elsewhere: not installed)" in text
    assert f"only after: {LOGITS_CASE.with_(v=32000).name}" in text
    same = compare.compare(*[one_run(result_line("accuracy", LOGITS_CASE, "eager", None))] * 2)
    assert same[0].startswith("0 ratios compared, ")
    assert same[0].endswith("2 errors compared, 0 of them grew: the files agree")
    assert same[1] is True
    nothing = one_run(result_line("growth", LOGITS_CASE, "kdloss", 1.0))
    assert compare.compare(before, nothing)[1] is False


def test_a_time_that_is_lost_is_a_difference() -> None:
    after = _of_logits()
    after.add(result_line(LOGITS, LOGITS_CASE, "kdloss", None, status="wrong", why="off by 2"))
    text, ok = compare.compare(_of_logits(), after)
    assert not ok
    assert f"{LOGITS_CASE.name}: KDLoss: was measured, is wrong (off by 2)" in text
    text, _ = compare.compare(_of_logits(), one_run(*case_lines(LOGITS, LOGITS_CASE)))
    assert "not the same" not in text
    elsewhere = report_of([run_line(threads=8), *case_lines(LOGITS, LOGITS_CASE)])
    assert "not the same: threads was 2 and is 8" in compare.compare(_of_logits(), elsewhere)[0]


# no number any more, and more than twice as large; a little more is what rounding may cost
@pytest.mark.parametrize(
    ("loss", "agrees"),
    [(float("nan"), False), (float("inf"), False), (3e-6, False), (2e-6, True), (1e-9, True)],
)
def test_an_error_that_grew_is_a_difference(loss: float, agrees: bool) -> None:
    def accuracy(loss: float) -> Report:
        error = {"loss": loss, "gradients": None}
        return one_run(result_line("accuracy", LOGITS_CASE, "kdloss", None, error=error))

    text, ok = compare.compare(accuracy(1e-6), accuracy(loss))
    assert ok is agrees
    assert ("KDLoss: error of the loss was 1.0e-06, is" in text) is not agrees
    assert compare.compare(accuracy(float("nan")), accuracy(float("nan")))[1]  # as it was


def test_files_without_a_figure_in_both_do_not_agree() -> None:
    failed = one_run(result_line(LOGITS, LOGITS_CASE, "kdloss", None, status="failed", error=None))
    text, ok = compare.compare(failed, failed)
    assert not ok
    assert text.endswith("nothing to compare: no ratio and no error in both")


def test_other_versions_of_a_peer_are_said() -> None:
    other = report_of([{**run_line(), "packages": {"trl": "1.1"}},
                       *case_lines(LOGITS, LOGITS_CASE)])  # fmt: skip
    assert "not the same: trl was '1.0' and is '1.1'" in compare.compare(_of_logits(), other)[0]


# ------------------------------------------------------------------------------------ publish


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with results, and documents that were written from them."""
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    folder = tmp_path_factory.mktemp("repository")
    for name in ("docs", "benchmarks/results"):
        (folder / name).mkdir(parents=True)
    write_lines(every_suite(), folder / "benchmarks/results/cpu.jsonl")
    empty = "<!-- benchmarks:begin -->\n<!-- benchmarks:end -->\nbelow\n"
    first = "<!-- headline:begin -->\n<!-- headline:end -->\n"
    (folder / publish.README).write_text("above\n" + first + empty)
    (folder / publish.DOCUMENT).write_text("above\n" + empty)
    assert publish.main([], folder) == 0
    return folder


@pytest.fixture
def root(published: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(published, tmp_path, dirs_exist_ok=True)
    return tmp_path


def _replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


Capture = pytest.CaptureFixture[str]


def test_what_was_published_agrees(root: Path) -> None:
    assert publish.main(["--check"], root) == 0
    readme = (root / publish.README).read_text()
    assert readme.startswith("above\n")
    assert readme.endswith("below\n")
    rows = [line for line in readme.split("\n") if line.startswith("| ")]
    titles = [row.split(" | ")[0].removeprefix("| ") for row in rows[2:]]
    assert titles == [
        "KDLoss, in place", "KDLoss", "torch.compile(eager)", "eager torch",
        "TRL generalized_jsd_loss", "lower bound: 1.5 copies", "KDLoss, heads",
        "torch.compile(eager), from hidden states", "Liger chunked JSD, from hidden states",
        "lower bound: the four products",
    ]  # fmt: skip
    text = " ".join(readme.split())
    assert "**9.19 ms** in place against 131 ms for `torch.compile` and 591 ms for eager" in text
    assert "memory beyond the logits: 0.00 MiB against 376 MiB and 877 MiB." in text
    assert "| KDLoss | 11.8 ms | 125 MiB | 11.8 ms | 250 MiB |" in readme
    assert "Faster than ours here: no method that computes the same." in readme
    document = (root / publish.DOCUMENT).read_text()
    for words in ("### CPU: Example 9000", "#### growth", "* left out of logits: cce: ",
                  "#### Goals", "kinds of inputs"):  # fmt: skip
        assert words in document


# a table, a document, a picture of other results, and each of the markers
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda root: _replace(root / publish.README, "| 11.8 ms |", "| 1.8 ms |"),
         r"README.md: has '\| KDLoss \| 1.8 ms .*, the results say '\| KDLoss \| 11.8 ms .*"),
        (lambda root: _replace(root / publish.README, "**9.19 ms**", "**9 ms**"),
         r"README.md: has '.*\*\*9 ms\*\* in place .*, the results say '.*\*\*9.19 ms\*\* in"),
        (lambda root: _replace(root / publish.DOCUMENT, "#### Goals\n", ""),
         r"docs/benchmarks.md: has .*, the results say '#### Goals'"),
        (lambda root: (root / publish.PICTURE).write_text("<svg/>"),
         r"docs/benchmarks.svg: was not made from these results"),
        (lambda root: (root / publish.PICTURE).unlink(),
         r"docs/benchmarks.svg: was not made from these results"),
        (lambda root: _replace(root / publish.README, "<!-- benchmarks:begin -->\n", ""),
         r"README.md: expected one <!-- benchmarks:begin --> and after it one .*"),
    ],
)  # fmt: skip
def test_a_check_finds_differences(
    root: Path, capsys: Capture, spoil: Callable[[Path], object], said: str
) -> None:
    spoil(root)
    assert publish.main(["--check"], root) == 1
    assert re.match(said, capsys.readouterr().out.split("\n")[0])


@pytest.fixture
def _no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "published", lambda *given: "<svg/>")


@pytest.mark.usefixtures("_no_picture")
def test_nothing_is_published_without_markers_or_results(root: Path, capsys: Capture) -> None:
    (root / publish.README).write_text("no markers\n")
    assert publish.main([], root) == 1
    said = capsys.readouterr().out
    for name in ("headline", "benchmarks"):
        assert f"README.md: has no <!-- {name}:begin -->\n" in said
    assert (root / publish.README).read_text() == "no markers\n"
    (root / "benchmarks/results/cpu.jsonl").unlink()
    assert publish.main(["--check"], root) == 1
    assert "there are no results" in capsys.readouterr().out


def test_where_we_lose_the_readme_says_so() -> None:
    lines = [*every_suite(), result_line(LOGITS, LOGITS_CASE, "fast", 1e-3)]
    text = publish.readme_table(report_of(lines))
    assert "Faster than ours here: fast (bf16: 0.08 of the time)." in text


@pytest.mark.usefixtures("_no_picture")
def test_two_machines_are_kept_apart(root: Path) -> None:
    path = root / "benchmarks/results/gpu.jsonl"
    line = result_line(LOGITS, LOGITS_CASE, "kdloss-inplace", 1.0)
    write_lines([run_line(device="Card 1"), line], path)
    assert [r.environment["device"] for r in publish.read_all(root)] == [
        "CPU: Example 9000", "Card 1",
    ]  # fmt: skip
    assert publish.main([], root) == 0
    document = (root / publish.DOCUMENT).read_text()
    assert document.index("### Card 1") < document.index("### CPU: Example 9000")
    readme = (root / publish.README).read_text()  # of the last one alone
    assert "threads of Card 1 " in readme
    assert "Example 9000" not in readme


def test_files_of_schema_2_are_read_with_the_present_names(tmp_path: Path) -> None:
    path = write_lines([run_line(), *case_lines(HEADS, HEADS_CASE)], tmp_path / "new.jsonl")
    old = tmp_path / "old.jsonl"
    renamed = ("kdloss-heads", "linearkdloss"), ("KDLoss, heads", "LinearKDLoss")
    text = path.read_text().replace('"schema": 3', '"schema": 2')
    for now, before in (
        *renamed,
        ('"heads', '"linear'),
        (TITLES["compile"], "torch.compile of it"),
    ):
        assert now in text
        text = text.replace(now, before)
    old.write_text(text)
    found, wanted = (records.read([one]) for one in (old, path))
    assert found.results.keys() == wanted.results.keys()
    assert found.floors.keys() == wanted.floors.keys()
    assert found.done == wanted.done == {(HEADS, HEADS_CASE.name)}
    for key, line in wanted.results.items():
        assert found.results[key] == {**line, "schema": 2}


def test_the_documents_agree_with_the_committed_results(capsys: Capture) -> None:
    assert publish.main(["--check"]) == 0, capsys.readouterr().out


# -------------------------------------------------------------------------------- the examples


def test_the_examples_are_a_file_of_results(tmp_path: Path) -> None:
    found = records.read([write_lines(every_suite(), tmp_path / "results.jsonl")])
    assert found.suites == ["logits", "heads", "training-step", "growth", "accuracy"]
    assert reading.reference(found, HEADS, found.cases(HEADS)[0])["entrant"] == "kdloss-heads"
