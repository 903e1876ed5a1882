"""Pictures and the page of a file of results."""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from benchmark_lines import LOGITS_CASE, TITLES, every_suite, one_run, report_of, result_line

from benchmarks import page, pictures
from benchmarks.cases import LOGITS, Case
from benchmarks.pictures import style
from benchmarks.records import Report

pytest.importorskip("matplotlib", reason="pictures need matplotlib")


@pytest.fixture(scope="module")
def report() -> Report:
    """In one dtype."""
    lines = every_suite()
    return report_of([x for x in lines if x["kind"] == "run" or x["case"]["dtype"] == "fp32"])


# ----------------------------------------------------------------------------------- pictures


@pytest.fixture(scope="module")
def drawn(report: Report) -> dict[str, str]:
    return {picture.name: picture.svg() for picture in pictures.pictures(report)}


# every kind of picture and whom it must name: lines, budgets, bars, doubling, strips
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("logits-fp32", [TITLES["kdloss-inplace"], TITLES["eager"], "lower bound: 1.5 copies",
                         "KDLoss", "vocabulary, V", "peak memory, MiB",
                         "relative error of the loss"]),
        ("heads-fp32", ["KDLoss, heads", "Liger chunked JSD", "lower bound: the four products",
                         "memory budget, MiB", "the gradients themselves"]),
        ("training-step-fp32", [" eager torch<", " KDLoss, in place<", "time, ms"]),
        ("growth-fp32", ["twice the size, twice the time", "rows, N", "vocabulary, V"]),
        ("accuracy-fp32", ["eager torch", "relative error of the gradients"]),
    ],
)  # fmt: skip
def test_pictures_name_everything(drawn: dict[str, str], name: str, words: list[str]) -> None:
    for word in [*words, "CPU: Example 9000, 2 threads, avx2"]:
        assert word in drawn[name], word
    assert "KDLoss, heads, 64 MiB" not in drawn[name]


def test_pictures_are_files_and_always_the_same(
    report: Report, drawn: dict[str, str], tmp_path: Path
) -> None:
    one = one_run(*(x for x in report.results.values() if x["suite"] == "accuracy"))
    paths = pictures.draw(one, tmp_path)
    assert [path.name for path in paths] == ["accuracy-fp32.svg", "accuracy-fp32.png"]
    assert paths[0].read_text() == drawn["accuracy-fp32"]
    assert paths[1].read_bytes().startswith(b"\x89PNG")
    assert list(drawn) == ["logits-fp32", "heads-fp32", "training-step-fp32", "growth-fp32",
                           "accuracy-fp32"]  # fmt: skip


def test_no_picture_overwrites_another() -> None:
    cases = [Case(n, v, "fp32", regime="huge") for n in (4, 8) for v in (60, 90)]
    lines = [result_line("accuracy", case, "eager", None) for case in cases]
    names = [picture.name for picture in pictures.pictures(one_run(*lines))]
    assert names == [f"accuracy-{case.n}-{case.v}-fp32" for case in cases]


def test_growth_with_one_size_has_no_picture() -> None:
    growth = result_line("growth", LOGITS_CASE, "kdloss", 1.0)
    found = one_run(growth, result_line(LOGITS, LOGITS_CASE, "kdloss", 1.0))
    assert [picture.name for picture in pictures.pictures(found)] == ["logits-bf16"]
    with pytest.raises(ValueError, match=r"^the results have no cases over the vocabulary"):
        pictures.published(found, {})


def test_without_matplotlib_a_line_says_so(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"^pictures need matplotlib: pip install matplotlib"):
        pictures.draw(report, tmp_path)


def test_everyone_keeps_a_look_of_their_own(report: Report) -> None:
    looks = style.looks(report)
    assert len({(look.colour, look.marker) for look in looks.values()}) == len(looks)
    assert looks["kdloss"].colour == looks["kdloss-inplace"].colour == style.FAMILIES["kdloss"]
    assert looks["kdloss"].is_ours
    assert not looks["eager"].is_ours


# one by one, crowded at the bottom and at the top, more than there is room for
@pytest.mark.parametrize("wanted", [[0.5], [0.0, 0.01, 0.02], [0.98, 0.99, 1.0], [0.5] * 40])
def test_names_do_not_overlap(wanted: list[float]) -> None:
    heights = style.apart(wanted)
    gap = min(style.NAME_GAP, 1 / max(1, len(wanted) - 1))
    assert all(b - a >= 0.999 * gap for a, b in pairwise(heights))
    assert heights[0] >= -1e-9
    assert heights[-1] <= 1 + 1e-9


# --------------------------------------------------------------------------------------- page


class _Reader(HTMLParser):
    """Checks that elements close, and keeps what they are and refer to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.refers: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href"):
                self.refers.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(report: Report, tmp_path: Path) -> None:
    shown = ("logits", "training-step", "accuracy")
    report = one_run(*(x for x in report.results.values() if x["suite"] in shown))
    path = page.write(report, tmp_path / "report.html")
    text, reader = path.read_text(), _Reader()
    reader.feed(text)
    assert reader.open == []
    assert len(reader.ids) == len(set(reader.ids))
    assert all(target.startswith("#") and target[1:] in reader.ids for target in reader.refers)
    assert not {"script", "link", "img", "iframe"} & set(reader.tags)
    assert "http" not in text
    assert reader.tags.count("svg") == len(shown)
    assert "prefers-color-scheme:dark" in text
    assert style.INK not in text.split("</style>")[1]
    for words in ("Left out", "its kernels need a GPU", 'class="lost">NOT reached', "A B C",
                  "Example 9000", "eager torch", *shown):  # fmt: skip
        assert words in text


def test_the_page_escapes_what_it_shows() -> None:
    line = result_line(LOGITS, LOGITS_CASE, "odd", 1.0, title="<b>a & b</b>")
    text = page.page(one_run(line))
    assert "<b>" not in text
    assert "&lt;b&gt;a &amp; b&lt;/b&gt;" in text
