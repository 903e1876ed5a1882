"""The monitor of two losses: its arithmetic, its verdicts, its state, and what it refuses."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import DELTA, LOOKS, SEQUENCES, TOKENS, falling, flat, losses_of, shares
from torch import Tensor

from fused_kd.objectives import ConvergenceMonitor, Verdict, draw
from fused_kd.objectives.statistics import Interval, spent_level, t_quantile, trend_error
from fused_kd.objectives.verdict import PAIRS, STATES, Objective, pair_of

WEIGHTS = torch.full((SEQUENCES,), TOKENS)
FLAT = losses_of((flat, flat), seed=0)


def update(monitor: ConvergenceMonitor, losses: Tensor, **more: Any) -> Verdict:
    return monitor.update(**{"hard": losses[0], "soft": losses[1], "tokens": WEIGHTS, **more})


def run(losses: Tensor = FLAT, **settings: Any) -> list[Verdict]:
    monitor = ConvergenceMonitor(DELTA, DELTA, **settings)
    return [update(monitor, look) for look in losses]


# ------------------------------------------------------------------------------- the arithmetic

# scipy.stats.t.ppf
QUANTILES = [
    (0.95, 1, 6.313751514675043),
    (0.975, 2, 4.302652729696142),
    (0.999, 6, 5.207626238838095),
    (0.9995, 7, 5.407882520861695),
    (0.99, 30, 2.457261542400591),
    (0.95, 199, 1.652546746174262),
    (0.5, 5, 0.0),
]


@pytest.mark.parametrize(("probability", "degrees", "want"), QUANTILES)
def test_quantiles_of_student_s_distribution(probability: float, degrees: int, want: float) -> None:
    assert t_quantile(probability, degrees) == pytest.approx(want, rel=1e-9, abs=1e-9)


#: scipy.stats.t.isf(level, degrees)
EXACT = {
    (200, 0.05): 1.6525081009108773,
    (200, 0.001): 3.131479814221121,
    (200, 1e-06): 4.897302102826782,
    (999, 0.05): 1.6463803454275354,
    (999, 0.001): 3.0984103617533125,
    (999, 1e-06): 4.781636978830079,
    (50000, 0.05): 1.6448841029025134,
    (50000, 0.001): 3.090395316625384,
    (50000, 1e-06): 4.753985152851937,
}


@pytest.mark.parametrize("degrees", [200, 999, 50_000])
def test_quantiles_of_many_degrees(degrees: int) -> None:
    for level in (0.05, 1e-3, 1e-6):
        series, exact = t_quantile(1 - level, degrees), EXACT[degrees, level]
        assert series == pytest.approx(exact, rel=1e-6)


def test_the_error_probability_of_all_looks() -> None:
    assert math.fsum(spent_level(0.05, k, None) for k in range(1, 10_000)) < 0.05
    assert math.fsum(spent_level(0.05, k, None) for k in range(1, 10_000)) > 0.0499
    assert [spent_level(0.05, k, 20) for k in (1, 20, 21)] == [0.05 / 20, 0.05 / 20, 0]


def test_the_interval_of_an_exact_line() -> None:
    # no noise at all: the improvement is the slope times the window, and the interval is a point
    looks = torch.stack([WEIGHTS.double() * falling(4)(k) for k in range(10)])
    monitor = ConvergenceMonitor(DELTA, DELTA, window=10)
    verdict = [update(monitor, x.expand(2, -1)) for x in looks][-1]
    assert verdict.hard_interval is not None
    assert verdict.hard_interval.improvement == pytest.approx(4 * DELTA * 9 / 10, rel=1e-9)
    assert verdict.hard_interval.half_width == pytest.approx(0, abs=1e-12)
    assert verdict.pair == "both improving"


def test_the_standard_error_over_sequences_is_that_of_the_ratio() -> None:
    # against the delta method written out for a window of 3, whose slope has two looks; the second
    # look with a whole window has its own share of the error probability
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(1, 200, (SEQUENCES,), generator=generator).double()
    sums = torch.rand(4, SEQUENCES, generator=generator, dtype=torch.float64) * tokens
    monitor = ConvergenceMonitor(DELTA, None, window=3)
    verdicts = [monitor.update(hard=x, soft=None, tokens=tokens) for x in sums]
    losses = sums.sum(1) / tokens.sum()
    d = (sums[1] - losses[1] * tokens) - (sums[3] - losses[3] * tokens)
    error = math.sqrt(SEQUENCES / (SEQUENCES - 1) * float(d.square().sum())) / float(tokens.sum())
    level = spent_level(0.05, 2, None)
    interval = verdicts[-1].hard_interval
    assert interval is not None
    assert interval.improvement == pytest.approx(float(losses[1] - losses[3]), rel=1e-12)
    want = t_quantile(1 - level, SEQUENCES - 1) * error
    assert interval.by_sequences == pytest.approx(want, rel=1e-9)
    assert interval.half_width >= interval.by_sequences


def test_the_standard_error_about_the_trend_is_that_of_the_slope() -> None:
    # scipy.stats.linregress([0, 1, 2, 4], [1.0, 0.7, 0.9, 0.2]).stderr times the window's 4
    rows = [1.0, 0.7, 0.9, 0.2], [0.0, 1.0, 2.0, 4.0]
    losses, positions = torch.tensor(rows, dtype=torch.float64)
    assert trend_error(losses, positions) == pytest.approx(4 * 0.07068181072487419, rel=1e-9)


def test_the_noise_of_checkpoints_widens_the_interval() -> None:
    noisy = FLAT + TOKENS * torch.randn(LOOKS, 2, 1, generator=torch.Generator().manual_seed(1))
    interval = run(noisy)[-1].hard_interval
    assert interval is not None
    assert interval.half_width > 20 * interval.by_sequences


# ------------------------------------------------------------------------------------- verdicts


def test_a_flat_run_converges_at_the_second_look_of_a_window() -> None:
    verdicts = run()
    assert [v.pair for v in verdicts[:10]] == [*["undecided"] * 8, "converged", "converged"]
    assert [v.stop for v in verdicts[:9]] == [*[False] * 8, True]
    assert "1 more evaluations make a window" in verdicts[6].reason
    assert "within δ 1 of 2 times in a row" in verdicts[7].reason


@pytest.mark.parametrize(
    ("means", "pair"),
    [
        ((falling(4), falling(4)), "both improving"),
        ((falling(4), falling(-4)), "trading off"),
        ((falling(-4), falling(4)), "trading off"),
        ((falling(4), flat), "improving"),
        ((falling(-4), flat), "worsening"),
    ],
)
def test_what_moves_is_named(means: Any, pair: str) -> None:
    verdicts = run(losses_of(means, seed=1))
    assert verdicts[-1].pair == pair
    assert not any(v.stop for v in verdicts)


def test_few_data_never_look_like_convergence() -> None:
    # the same run, with ten and with forty times the noise of a sequence
    for times in (10, 40):
        verdicts = run(losses_of((flat, flat), 0, sequence=0.005 * times * math.sqrt(10)))
        assert {v.pair for v in verdicts} == {"undecided"}
        assert "sequences would decide, instead of 50" in verdicts[-1].reason


@pytest.mark.parametrize(("improvement", "sequences"), [(0.0, 450), (0.008, 704), (0.02, 113)])
def test_the_number_of_sequences_that_would_decide(improvement: float, sequences: int) -> None:
    # the half width falls as 1/√n: to δ - |improvement|, or to the improvement if that is larger
    half = 0.03
    interval = Interval(improvement, improvement - half, improvement + half, half)
    text = Objective(0.01, interval, 0, 2, 8, 50, False).sentence
    assert text.endswith(f"about {sequences} sequences would decide, instead of 50")


def test_under_a_decaying_rate_nothing_converges() -> None:
    for rates, pair in (([1.0] * LOOKS, "converged"), ([0.9**k for k in range(LOOKS)], "stopped")):
        monitor = ConvergenceMonitor(DELTA, DELTA)
        last = [update(monitor, x, lr=lr) for x, lr in zip(FLAT, rates, strict=True)][-1]
        assert last.pair.startswith(pair)
        assert last.stop == (pair == "converged")


def test_what_is_passed_may_change_afterwards() -> None:
    # one buffer for every evaluation; an optimizer whose rate is a tensor; a dict of settings
    buffer, rate = torch.empty(2, SEQUENCES, dtype=torch.float64), torch.tensor(1.0)
    tokens, setting = WEIGHTS.double(), {"temperature": 2.0}
    monitor, verdicts = ConvergenceMonitor(DELTA, DELTA), []
    more = {"tokens": tokens, "lr": rate, "measured_with": setting}
    for look in FLAT:
        verdicts.append(update(monitor, buffer.copy_(look), **more))
        rate *= 0.9
    assert [v.hard_interval for v in verdicts] == [v.hard_interval for v in run()]
    assert verdicts[-1].pair == "stopped moving"
    setting["temperature"] = 1.0
    with pytest.raises(ValueError, match="temperature must not change"):
        update(monitor, FLAT[0], **more)


def test_one_sequence_says_nothing() -> None:
    monitor = ConvergenceMonitor(DELTA, None, window=3)
    for _ in range(3):
        verdict = monitor.update(hard=torch.ones(1), soft=None, tokens=torch.ones(1))
    assert verdict.pair == "undecided"
    assert "one sequence has no spread: at least two are needed" in verdict.reason


def test_stop_on_names_more_verdicts() -> None:
    verdicts = run(losses_of((falling(4), falling(-4)), 1), stop_on=("converged", "trading off"))
    assert [v.stop for v in verdicts] == [v.pair == "trading off" for v in verdicts]
    assert any(v.stop for v in verdicts)


@pytest.mark.parametrize("off", ["hard", "soft"])
def test_one_objective_may_be_off(off: str) -> None:
    deltas = {"hard_delta": DELTA, "soft_delta": DELTA, f"{off}_delta": None}
    monitor = ConvergenceMonitor(**deltas)
    verdict = [update(monitor, x, **{off: None}) for x in FLAT][-1]
    assert getattr(verdict, off) == "off"
    assert verdict.pair == "converged"
    assert math.isnan(getattr(monitor.history[-1], off))


def test_patience_and_max_looks() -> None:
    assert [v.stop for v in run(patience=5)].index(True) == 7 + 4
    verdicts = run(max_looks=4)
    assert "converged" in [v.pair for v in verdicts[:11]]
    assert {v.pair for v in verdicts[11:]} == {"undecided"}
    assert "probability of max_looks evaluations is spent" in verdicts[-1].reason


def test_the_pair_is_the_first_that_fits() -> None:
    table = {
        ("converged", "converged"): "converged",
        ("converged", "off"): "converged",
        ("converged", "stopped moving"): "stopped moving",
        ("stopped moving", "off"): "stopped moving",
        ("improving", "worsening"): "trading off",
        ("improving", "improving"): "both improving",
        ("improving", "converged"): "improving",
        ("improving", "off"): "improving",
        ("worsening", "undecided"): "worsening",
        ("worsening", "worsening"): "worsening",
        ("converged", "undecided"): "undecided",
    }
    for states, pair in table.items():
        assert pair_of(*states) == pair_of(*reversed(states)) == pair
    assert {pair_of(a, b) for a in STATES for b in STATES if {a, b} != {"off"}} == set(PAIRS)


def test_the_window_is_the_last_half_of_the_run_or_a_number() -> None:
    monitors = ConvergenceMonitor(DELTA, DELTA), ConvergenceMonitor(DELTA, DELTA, window=5)
    sizes = []
    for step, look in enumerate(losses_of((flat, flat), 0).repeat(2, 1, 1)):
        for monitor in monitors:
            update(monitor, look, step=10.0 * step)
        sizes.append([len(monitor._looks) for monitor in monitors])
    assert [sizes[k] for k in (0, 4, 7, 15, 19, 39)] == [
        [1, 1],
        [5, 5],
        [8, 5],
        [8, 5],
        [10, 5],
        [20, 5],
    ]


# ------------------------------------------------------------------------------------ the state


def test_a_resumed_monitor_says_the_same(tmp_path: Path) -> None:
    losses = losses_of((flat, falling(1)), seed=4)
    ids, setting = torch.arange(SEQUENCES), {"temperature": 2.0}
    whole, cut = ConvergenceMonitor(DELTA, DELTA), ConvergenceMonitor(DELTA, DELTA)
    for k, look in enumerate(losses):
        if k == 11:
            torch.save(cut.state_dict(), tmp_path / "state.pt")
            cut = ConvergenceMonitor(DELTA, DELTA)
            cut.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        more = {"step": 5 * k, "lr": 1.0, "ids": ids, "measured_with": setting}
        assert update(cut, look, **more) == update(whole, look, **more)
    assert cut.history == whole.history
    with pytest.raises(ValueError, match=r"temperature must not change.*was 2\.0 and is 1\.0"):
        update(cut, FLAT[0], step=999, ids=ids, measured_with={"temperature": 1.0})
    for name, other in (("window", 9), ("hard_delta", 1.0), ("patience", 3)):
        changed = ConvergenceMonitor(**{"hard_delta": DELTA, "soft_delta": DELTA, name: other})
        with pytest.raises(ValueError, match=f"{name} must be that of the state"):
            changed.load_state_dict(cut.state_dict())


BAD: list[tuple[dict[str, Any], str]] = [
    ({"hard": FLAT[0, 0].where(WEIGHTS < 0, math.nan)}, "hard must be finite.* at step 3"),
    ({"soft": FLAT[0, 0] * math.inf}, "soft must be finite.*step 3.*keeps its state"),
    ({"hard": FLAT[0, 0, 1:]}, r"hard must have the shape of tokens, \(50,\)"),
    (
        {"tokens": WEIGHTS[1:], "hard": FLAT[0, 0, 1:], "soft": FLAT[0, 1, 1:], "ids": None},
        "got 49 sequences after 50",
    ),
    ({"tokens": WEIGHTS.flip(0) + torch.arange(SEQUENCES)}, "other numbers of tokens"),
    ({"tokens": -WEIGHTS}, "tokens must be finite and at least 0"),
    ({"ids": torch.arange(SEQUENCES).flip(0)}, "got id 49 at position 0, where 0 was"),
    ({"ids": torch.arange(SEQUENCES - 1)}, "ids must have a value for each sequence, 50; got 49"),
    ({"ids": None}, "ids must be given at every evaluation or at none"),
    ({"ids": torch.rand(SEQUENCES)}, "ids must be integers"),
    ({"step": math.nan}, "step must be finite; got nan"),
    ({"step": 2}, "step must grow; got 2 after 2.*resumed"),
    ({"measured_with": {"temperature": 2.0, "divergence": "jsd"}}, "divergence must not change"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_a_refused_evaluation_leaves_the_state(change: dict[str, Any], message: str) -> None:
    monitor = ConvergenceMonitor(DELTA, DELTA, window=3)
    more = {"ids": torch.arange(SEQUENCES), "measured_with": {"temperature": 2.0}}
    for step in range(3):
        update(monitor, FLAT[step], step=step, **more)
    before = copy.deepcopy(monitor.state_dict())
    with pytest.raises(ValueError, match=message):
        update(monitor, FLAT[0], **{"step": 3, **more, **change})
    assert str(monitor.state_dict()) == str(before)


def test_the_first_evaluation_is_checked_too() -> None:
    monitor = ConvergenceMonitor(DELTA, DELTA)
    with pytest.raises(TypeError, match=r"soft must be given, since soft_delta is 0\.01; got None"):
        update(monitor, FLAT[0], soft=None)
    with pytest.raises(ValueError, match="tokens must not all be 0"):
        update(monitor, FLAT[0], tokens=0 * WEIGHTS)
    with pytest.raises(ValueError, match="ids must differ; got 7 twice"):
        update(monitor, FLAT[0], ids=torch.arange(SEQUENCES).clamp(max=7))
    assert monitor.history == []


def test_an_evaluation_that_is_not_finite_may_be_skipped() -> None:
    monitor = ConvergenceMonitor(DELTA, DELTA, check_finite=False)
    verdicts = [update(monitor, math.nan * x if k == 12 else x) for k, x in enumerate(FLAT)]
    assert "skipped, since hard is not finite" in verdicts[12].reason
    assert not verdicts[12].stop
    assert len(monitor.history) == LOOKS - 1
    assert verdicts[13].pair == "converged"


SETTINGS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"hard_delta": 0.0}, ValueError, "hard_delta must be positive.*0.002 to 0.02"),
    ({"soft_delta": -1.0}, ValueError, "soft_delta must be positive"),
    ({"hard_delta": None, "soft_delta": None}, ValueError, "must not both be None"),
    ({"confidence": 1.0}, ValueError, r"confidence must be in \[0.5, 1\)"),
    ({"window": 2}, ValueError, "window must be a number of evaluations"),
    ({"window": 1.5}, ValueError, "window must be a number of evaluations"),
    ({"window": True}, TypeError, "window must be an int or a float; got bool"),
    ({"patience": 0}, ValueError, "patience must be at least 1"),
    ({"max_looks": 1}, ValueError, "max_looks must be at least patience"),
    ({"stop_on": "converged"}, ValueError, "stop_on must be a sequence"),
    ({"stop_on": ("flat",)}, ValueError, "got 'flat'"),
]


@pytest.mark.parametrize(("change", "error", "message"), SETTINGS)
def test_settings_that_are_refused(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ConvergenceMonitor(**{"hard_delta": DELTA, "soft_delta": DELTA, **change})


# ----------------------------------------------------------------------------------- the picture


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    monitor = ConvergenceMonitor(DELTA, None)
    with pytest.raises(ValueError, match="monitor must have evaluations"):
        draw(monitor, tmp_path / "empty.svg")
    for look in FLAT:
        update(monitor, look, soft=None)
    with pytest.raises(
        ValueError, match=r"must end with the name of a file type.*got '.*runs.xyz'"
    ):
        draw(monitor, tmp_path / "runs.xyz")
    draw(monitor, tmp_path / "runs.svg")
    text = (tmp_path / "runs.svg").read_text()
    assert "converged" in text or len(text) > 10_000  # matplotlib may draw letters as curves


# ------------------------------------------------------------- many runs, as a sceptic would try

NOISE = [
    {"sequence": 0.005},
    {"sequence": 0.005, "common": DELTA / 2},
    {"sequence": 0.005, "common": DELTA},
    {"sequence": 0.005, "heavy": True},
]
QUIET = [NOISE[0], NOISE[3]]  # half-widths of at most δ/4


@pytest.mark.slow
@pytest.mark.parametrize("noise", NOISE, ids=str)
def test_false_stops_of_a_thousand_runs(noise: dict[str, Any]) -> None:
    stops = {
        "both fall by 2 δ": shares(1000, falling(2), falling(2), **noise)["converged"],
        "one falls by 2 δ": shares(1000, flat, falling(2), **noise)["converged"],
        "they trade": shares(1000, falling(2), falling(-2), **noise)["converged"],
    }
    print(noise, stops, "δ/2:", shares(200, falling(0.5), falling(0.5), **noise)["converged"])
    assert max(stops.values()) <= 0.005


@pytest.mark.slow
@pytest.mark.parametrize("noise", QUIET, ids=str)
def test_flat_runs_and_trades_are_found(noise: dict[str, Any]) -> None:
    found = {
        "converged": shares(1000, flat, flat, **noise)["converged"],
        "trading off": shares(1000, falling(4), falling(-4), **noise)["trading off"],
    }
    print(noise, found)
    assert found["converged"] >= 0.9
    assert found["trading off"] >= 0.85


@pytest.mark.slow
@pytest.mark.parametrize("times", [10, 40])
def test_noise_is_never_convergence(times: int) -> None:
    seen = shares(1000, flat, flat, sequence=0.005 * times * math.sqrt(10), common=times * DELTA)
    print(times, dict(seen))
    assert seen["converged"] == 0
    assert seen["undecided"] == 1
