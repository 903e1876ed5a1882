"""Cosine and Pareto residual of two objectives' gradients against gradients known exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.processes import failures
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fused_kd.objectives import pareto_probe
from fused_kd.objectives.probe import Products

SIZE = 12
HARD, SOFT = torch.randn(2, SIZE, generator=torch.Generator().manual_seed(0)).double()


class Noisy(nn.Module):
    """Two losses that are linear in the weights: gradients HARD and SOFT, with a half's noise."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(SIZE, dtype=torch.float64))
        self.noise = noise

    def forward(self, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        noise = self.noise * torch.randn(2, SIZE, generator=generator, dtype=torch.float64)
        return ((HARD + noise[0]) * self.weight).sum(), ((SOFT + noise[1]) * self.weight).sum()


def halves(pairs: int, first: int = 0) -> list[tuple[int, int]]:
    return [(first + 2 * i, first + 2 * i + 1) for i in range(pairs)]


def test_without_noise_the_products_are_exact() -> None:
    model = Noisy(0.0)
    got = pareto_probe(model, halves(2), model.parameters())
    want = Products(float(HARD @ HARD), float(SOFT @ SOFT), float(HARD @ SOFT))
    assert got.products == pytest.approx(want, rel=1e-12)
    assert got.cosine == pytest.approx(float(torch.cosine_similarity(HARD, SOFT, 0)), rel=1e-12)
    alphas = torch.linspace(0, 1, 100_001).double()[:, None]
    lengths = (alphas * HARD + (1 - alphas) * SOFT).square().sum(1)
    assert got.residual == pytest.approx(float(lengths.min()), rel=1e-6)
    assert got.weight == pytest.approx(float(alphas[lengths.argmin()]), abs=2e-5)
    assert (got.cosine_error, got.residual_error) == pytest.approx((0, 0), abs=1e-9)


def test_noise_is_no_bias_and_its_size_is_told() -> None:
    # 12·3² is the square of the noise's length, which |h|² of one batch would contain
    model, deviations = Noisy(3.0), []
    want = Products(float(HARD @ HARD), float(SOFT @ SOFT), float(HARD @ SOFT))
    for run in range(60):
        got = pareto_probe(model, halves(20, 40 * run), model.parameters())
        deviations.append([a - b for a, b in zip(got.products, want, strict=True)])
    spread = torch.tensor(deviations)
    error = spread.std(0) / len(spread) ** 0.5
    assert bool((spread.mean(0).abs() < 3 * error).all())
    assert float(error[0]) < 0.1 * 12 * 3.0**2


def test_the_errors_are_those_of_repeated_probes() -> None:
    model = Noisy(0.3)
    probes = [pareto_probe(model, halves(20, 40 * i), model.parameters()) for i in range(40)]
    for value, error in (("cosine", "cosine_error"), ("residual", "residual_error")):
        spread = float(torch.tensor([getattr(x, value) for x in probes]).std())
        told = float(torch.tensor([getattr(x, error) for x in probes]).mean())
        assert told == pytest.approx(spread, rel=0.35)


def test_opposite_gradients_are_a_stationary_point() -> None:
    products = Products(4.0, 1.0, -2.0)  # h = 2e, s = -e
    assert products.cosine == -1
    assert products.weight == pytest.approx(1 / 3)
    assert products.residual == pytest.approx(0, abs=1e-12)
    assert Products(1.0, 1.0, 1.0).residual == pytest.approx(1)
    assert Products(1.0, 9.0, 2.0).weight == 1  # the shorter one alone
    assert str(Products(-0.1, 1.0, 0.0).cosine) == "nan"


def test_gradients_of_the_training_are_kept() -> None:
    model = Noisy(0.1)
    model.weight.grad = kept = torch.ones_like(model.weight)
    pareto_probe(model, halves(2), model.parameters())
    assert model.weight.grad is kept
    assert bool((kept == 1).all())

    def broken(half: int) -> tuple[Tensor, Tensor]:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        pareto_probe(broken, halves(2), model.parameters())
    assert model.weight.grad is kept


@pytest.mark.parametrize(
    ("losses", "pairs", "error", "message"),
    [
        (Noisy(0.1), halves(1), ValueError, "at least two pairs.*got 1"),
        (lambda half: (torch.ones(()), torch.ones(())), halves(2), TypeError, "KDLossParts"),
    ],
)
def test_arguments_that_are_refused(
    losses: Any, pairs: Any, error: type[Exception], message: str
) -> None:
    weight = nn.Parameter(torch.ones(3))
    with pytest.raises(error, match=message):
        pareto_probe(losses, pairs, [weight])
    with pytest.raises(ValueError, match="at least one that requires grad"):
        pareto_probe(Noisy(0.1), halves(2), [])
    with pytest.raises(ValueError, match="finite gradients"):
        pareto_probe(lambda half: (weight.sum() / 0, weight.sum()), halves(2), [weight])


# -------------------------------------------------------------------------------- several ranks


class Layers(nn.Module):
    """A network whose two losses are the mean and the mean square of its outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.layers(x)
        return y.mean(), y.square().mean()


def _wrapped_models_agree() -> None:
    x = torch.randn(4, 2 * dist.get_world_size(), 8, generator=torch.Generator().manual_seed(1))
    mine = x[:, dist.get_rank() :: dist.get_world_size()]
    whole, share = ([(y[0], y[1]), (y[2], y[3])] for y in (x, mine))
    alone, sharded = Layers(), Layers()
    fully_shard(sharded.layers[0])
    fully_shard(sharded)
    want = pareto_probe(alone, whole, alone.parameters())
    views = DistributedDataParallel(Layers(), gradient_as_bucket_view=True)
    for model in (DistributedDataParallel(Layers()), views, sharded):
        got = pareto_probe(model, share, model.parameters())
        assert got.products == pytest.approx(want.products, rel=1e-5, abs=1e-9)
        assert got.residual == pytest.approx(want.residual, rel=1e-5)


def test_ranks(tmp_path: Path) -> None:
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch without gloo")
    assert not (failed := failures({"wrappers": _wrapped_models_agree}, 2, tmp_path)), failed
