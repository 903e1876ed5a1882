"""Tables of a file of results, and the goals that it is held to."""

from __future__ import annotations

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
    skipped_line,
)

from benchmarks import goals, tables
from benchmarks.cases import HEADS, LOGITS, Case
from benchmarks.cells import figure, mebibytes
from benchmarks.records import Line, Report
from fused_kd.options import MIB


@pytest.fixture(scope="module")
def report() -> Report:
    return report_of(every_suite())


# ------------------------------------------------------------------------------------- tables


def _row(text: str, title: str) -> str:
    return next(line for line in text.split("\n") if line.startswith(title + "  "))


def test_a_table_of_a_case() -> None:
    lines = [
        *case_lines(LOGITS, LOGITS_CASE),
        result_line(LOGITS, LOGITS_CASE, "slow", None, status="no time", why="8 rows alone"),
        result_line(LOGITS, LOGITS_CASE, "other", 0.2, nearest="the hard term alone"),
        result_line(LOGITS, LOGITS_CASE, "bad", None, status="wrong", why="an error of 2"),
    ]
    lines[-2]["time"]["undisturbed"] = 3
    text = tables.case_table(one_run(*lines), LOGITS, LOGITS_CASE)
    assert text.startswith(f"{LOGITS_CASE.name}\n")
    # the floor takes 6.57 ms, KDLoss 1.8 of it
    ours = _row(text, "KDLoss").split()
    assert ours[1:] == ["11.8", "[11.6,", "12.2]", "1.00", "56", "%", "125", "125", "2.0e-07",
                        "2.0e-07"]  # fmt: skip
    eager = _row(text, "eager torch").split()
    assert eager[1:3] == ["torch", "591"]
    assert eager[5] == "0.0200"  # KDLoss / it
    assert _row(text, "slow").endswith("no time: 8 rows alone")
    assert _row(text, "other").endswith("computes: the hard term alone; disturbed")
    assert _row(text, "bad").endswith("wrong: an error of 2")
    assert "cce" not in text
    assert text.endswith("lower bound: 1.5 copies, 6.57 ms at 24.0 GB/s")


def test_a_suite_says_who_was_left_out_once_and_where_we_lose() -> None:
    other = LOGITS_CASE.with_(v=32000)
    fast = result_line(LOGITS, LOGITS_CASE, "fast", 1e-3)
    faster = result_line(LOGITS, other, "fast", 1e-4)
    some = skipped_line(LOGITS, LOGITS_CASE, "some", "it has no jsd")
    lines = [*case_lines(LOGITS, LOGITS_CASE), *case_lines(LOGITS, other), fast, faster, some,
             result_line(LOGITS, other, "some", 1.0)]  # fmt: skip
    text = tables.conclusion(one_run(*lines), LOGITS)
    assert text.count("left out of logits: cce: its kernels need a GPU\n") == 1
    assert text.endswith("left out of logits: some: it has no jsd (in 1 of 2 cases)")
    assert text.count("faster than ours: ") == 1
    said = f"fast takes 0.03 of its time in {other.name}, less than it in 2 cases\n"
    assert f"faster than ours: {said}" in text
    assert tables.conclusion(one_run(fast), LOGITS) == "logits: no method was left out"


def test_long_times_are_in_seconds_and_a_case_without_entrants_says_so() -> None:
    text = tables.case_table(one_run(result_line(LOGITS, LOGITS_CASE, "eager", 2.5)), LOGITS,
                             LOGITS_CASE)  # fmt: skip
    assert "      s  " in text.split("\n")[1]
    assert _row(text, "eager torch").split()[2] == "2.50"
    none = one_run(skipped_line(LOGITS, LOGITS_CASE, "cce", "no"))
    assert tables.case_table(none, LOGITS, LOGITS_CASE).endswith("no method takes part")


def test_errors_alone_are_shown_by_their_worst() -> None:
    case = Case(16, 8192, "fp32", regime="huge")
    errors = {"randn": 1e-7, "huge": float("nan"), "flat": 1.0}
    lines = [result_line("accuracy", case.with_(regime=regime), "eager", None,
                         error={"loss": error, "gradients": None})
             for regime, error in errors.items()]  # fmt: skip
    text = tables.conclusion(one_run(*lines), "accuracy")
    assert "logits, fp32, N = 16, V = 8192, forward_kl, T = 2, 3 kinds of inputs" in text
    assert _row(text, "eager torch").split()[2:] == ["nan", "huge"]


def test_a_suite_at_a_glance(report: Report) -> None:
    (title, cells), _ = tables.overviews(report, LOGITS)
    assert title == "logits, bf16, N = 512, forward_kl, T = 2"
    assert cells.head[1:3] == ["V = 32000: ms", "V = 128256: ms"]
    by_title = {row[0]: row for row in cells.rows}
    assert by_title["KDLoss"][1:5] == ["2.95", "11.8", "31.2", "125"]
    assert by_title["lower bound: 1.5 copies"][1:3] == ["1.64", "6.57"]
    growth = tables.overviews(report, "growth")
    assert [cells.head[1] for _, cells in growth] == ["N = 256: ms", "V = 64128: ms"]
    assert "| KDLoss | 2.95 |" in cells.markdown()


def _rows_of(*lines: Line) -> dict[str, list[str]]:
    """Of the one table of a suite, by title, with the head at ""."""
    ((_, cells),) = tables.overviews(one_run(*lines), HEADS)
    return {"": cells.head, **{row[0]: row for row in cells.rows}}


def test_shares_of_the_floor_at_a_glance_are_of_one_size() -> None:
    small = HEADS_CASE.with_(v=32000)
    lines = [result_line(HEADS, case, key, 1.0, floor_share=share)
             for case, key, share in ((small, "eager", 0.5), (HEADS_CASE, "eager", 0.4),
                                      (small, "trl", 0.9))]  # fmt: skip
    other = result_line(HEADS, HEADS_CASE, "alone", 1.0, floor_share=1.4, nearest="half of it")
    slow = result_line(HEADS, HEADS_CASE, "trl", None, status="no time", why="8 rows")
    rows = _rows_of(*lines, other, slow)
    place = rows[""].index("V = 128256: bound / it")
    assert [rows[title][place] for title in ("eager torch", TITLES["trl"], "alone")] == [
        "40 %", "", "",
    ]  # fmt: skip


def test_notes_at_a_glance_say_of_which_size_they_are() -> None:
    small = HEADS_CASE.with_(v=32000)
    more = {"status": "no time", "nearest": "half of it"}
    rows = _rows_of(
        result_line(HEADS, small, "trl", None, why="8 rows", **more),
        result_line(HEADS, HEADS_CASE, "trl", None, why="32 rows", **more),
        result_line(HEADS, HEADS_CASE, "eager", 1.0),
    )
    assert rows[TITLES["trl"]][-1] == (
        "computes: half of it; V = 32000: no time: 8 rows; V = 128256: no time: 32 rows"
    )


def test_the_floor_says_where_it_is_of_another_dtype() -> None:
    lines = [*case_lines(HEADS, HEADS_CASE)]
    lines[0]["why"] = "in float32; in bf16 they take 9 times as long"
    assert f"lower bound: the four products ({lines[0]['why']})" in _rows_of(*lines)


# figures below and above the digits, and none
@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.012345, "0.0123"), (1.2345, "1.23"), (12.345, "12.3"), (2195.8, "2196"), (0.0, "0"),
     (float("nan"), "nan")],
)  # fmt: skip
def test_figures_have_three_digits(value: float, shown: str) -> None:
    assert figure(value) == shown


def test_memory_is_in_mebibytes() -> None:
    assert [mebibytes(n) for n in (None, 0, 2**15, 2**27)] == ["", "0.00", "0.03", "128"]


# -------------------------------------------------------------------------------------- goals


def _verdicts(*lines: Line) -> dict[str, bool]:
    return {check.what: check.reached for check in goals.checks(one_run(*lines))}


def test_goals_are_reached_and_not() -> None:
    good = {"compile": 1.3, "eager": 1.3}
    found = _verdicts(*case_lines(LOGITS, LOGITS_CASE, **good))
    assert found["torch.compile(eager) / KDLoss, in place"]  # 18.6
    assert found["torch.compile(eager) / KDLoss"]
    assert found["eager torch / KDLoss, in place"]
    assert found["KDLoss, in place / its lower bound"]  # 1.4
    assert found["KDLoss, forward only / its lower bound"]
    assert found["KDLoss, in place: memory beyond inputs"]
    assert found["KDLoss: memory beyond inputs, gradient"]
    slow = _verdicts(*case_lines(LOGITS, LOGITS_CASE, kdloss_inplace=1.2, kdloss_forward=2.0))
    for what in ("torch.compile(eager) / KDLoss, in place", "eager torch / KDLoss, in place",
                 "KDLoss, in place / its lower bound",
                 "KDLoss, forward only / its lower bound"):  # fmt: skip
        assert not slow[what]


def test_goals_depend_on_dtype_size_and_what_is_there() -> None:
    fp32 = LOGITS_CASE.with_(dtype="fp32")
    assert not _verdicts(*case_lines(LOGITS, fp32))[
        "KDLoss, in place / its lower bound"
    ]  # 1.4 > 1.2
    small = _verdicts(*case_lines(LOGITS, LOGITS_CASE.with_(n=4, v=60)))
    assert not any("floor" in what or "torch" in what for what in small)
    assert goals.checks(one_run(skipped_line(LOGITS, LOGITS_CASE, "kdloss", "no"))) == []
    assert "no figures" in tables.goals_table(one_run(skipped_line(LOGITS, fp32, "kdloss", "no")))


def test_goals_of_a_gpu_are_for_large_cases() -> None:
    case = Case(8192, 128256, "bf16", device="cuda")
    line = result_line(LOGITS, case, "kdloss", 3e-3, floor_share=1 / 1.2, title="KDLoss")
    assert _verdicts(line) == {"KDLoss / its lower bound": False,
                               "KDLoss: memory beyond inputs, gradient": True}  # fmt: skip
    triton = {**line, "entrant": "kdloss-triton"}
    assert _verdicts(triton)["KDLoss / its lower bound"]
    few = case.with_(n=512)
    assert "KDLoss / its lower bound" not in _verdicts({**line, "case": few.sizes})


# the budgets of the CPU and of an entrant, with an accumulator for 16-bit heads
@pytest.mark.parametrize(
    ("entrant", "dtype", "budget"),
    [("kdloss-heads", "bf16", 256), ("kdloss-heads-64", "fp32", 64)],
)
def test_the_loss_of_heads_keeps_its_budget(entrant: str, dtype: str, budget: int) -> None:
    case = HEADS_CASE.with_(dtype=dtype)
    accumulator = 0 if dtype == "fp32" else 4 * case.v * case.student_hidden
    most = case.gradient_bytes + accumulator + (budget + 8) * MIB
    for peak, reached in ((most, True), (most + MIB, False)):
        memory = {"allocator_bytes": peak, "process_bytes": None}
        line = result_line(HEADS, case, entrant, 1.0, memory=memory)
        (check,) = goals.checks(one_run(line))
        assert check.reached is reached
        assert check.goal == f"≤ {budget + 8} MiB"


def test_growth_is_proportional() -> None:
    def verdicts(ratio: float) -> list[bool]:
        cases = Case(256, 128256, "fp32"), Case(512, 128256, "fp32"), Case(512, 256512, "fp32")
        lines = [result_line("growth", case, "kdloss", seconds)
                 for case, seconds in zip(cases, (1.0, ratio, 2 * ratio), strict=True)]  # fmt: skip
        return [check.reached for check in goals.checks(one_run(*lines))]

    assert verdicts(2.05) == [True, True]
    assert verdicts(2.15) == [False, True]


def test_errors_are_held_to_those_of_eager() -> None:
    def verdict(mine: float) -> bool:
        ours = result_line(LOGITS, LOGITS_CASE, "kdloss", 1.0, error={"loss": mine})
        eager = result_line(LOGITS, LOGITS_CASE, "eager", 1.0, error={"loss": 1e-3})
        return _verdicts(ours, eager)["KDLoss: error of the loss"]

    assert verdict(1.05e-3)
    assert not verdict(1.2e-3)
    assert not verdict(float("nan"))


def test_goals_are_summed_up_by_their_worst(report: Report) -> None:
    rows = {row[0]: row for row in tables.goals_cells(report).rows if row[1] == "≤ 1.2"}
    row = rows["KDLoss, in place / its lower bound"]
    assert row[2:] == ["1.40", "logits fp32 N=512 V=32000 T=2 forward_kl", "0 of 2", "NOT reached"]
    assert "NOT reached" in tables.goals_table(report)
