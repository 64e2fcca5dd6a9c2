"""The Gaussian process of sampler=lora against its formulas, and what it learns."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sweeper.config.settings import LoraAdapter
from sweeper.config.space import Choice, Domain, Interval
from sweeper.search.adapter_geometry import ALPHA, RANK, RATE, AdapterGeometry, Columns
from sweeper.search.surface_model import (
    CHOOSING,
    FittedSurface,
    SurfaceShape,
    choose_shape,
)
from tests.conftest import make_settings

LINE = AdapterGeometry({"x": Interval(0.0, 1.0)}, None)
RATES: dict[str, Domain] = {
    RATE: Interval(1e-4, 1e-1, log=True),
    RANK: Choice((2, 4, 8, 16, 32)),
    ALPHA: Interval(1.0, 256.0, log=True),
}


def _adapted() -> AdapterGeometry:
    adapter = make_settings().adapter
    assert isinstance(adapter, LoraAdapter)
    return AdapterGeometry(RATES, adapter.model_copy(update={"alpha_over_r": None}))


def _at(*values: float) -> Columns:
    return {"x": np.array(values)}


FALLING = FittedSurface(LINE, SurfaceShape(other=0.6), _at(0.1, 0.4), np.array([1.0, -1.0]))
"""A surface that falls below its lowest value right of it."""


def _matern(distance: Any) -> Any:
    s = math.sqrt(5) * np.abs(distance)
    return (1 + s + s**2 / 3) * np.exp(-s)


def test_the_surface_is_that_of_the_textbook() -> None:
    """Mean and deviation of a Matérn 5/2 process with noise, by inverting its matrix."""
    shape = SurfaceShape(other=0.6, noise=0.1)
    x, y = np.array([0.1, 0.4, 0.9]), np.array([-1.0, 0.5, 1.2])
    asked = np.array([0.0, 0.4, 0.7])
    inverse = np.linalg.inv(_matern((x[:, None] - x) / 0.6) + 0.1 * np.eye(3))
    cross = _matern((asked[:, None] - x) / 0.6)
    variance = y @ inverse @ y / 3 + 1e-3
    deviation = np.sqrt(variance * (1 - np.einsum("ij,jk,ik->i", cross, inverse, cross)))
    surface = FittedSurface(LINE, shape, _at(*x), y)
    mean, found = surface.predict(_at(*asked))
    assert surface.variance == pytest.approx(variance)
    assert mean == pytest.approx(cross @ inverse @ y)
    assert found == pytest.approx(deviation)


def test_the_rate_has_a_length_of_its_own() -> None:
    """Half the length of the rate is twice the distance along it, and no other along the rank."""
    origin = {RATE: np.array([1e-3]), RANK: np.array([0.0]), ALPHA: np.array([16.0])}
    moves = {RATE: 3e-3, RANK: 2.0, ALPHA: 16.0}
    for shape, far in ((SurfaceShape(gamma=0), 1.0), (SurfaceShape(gamma=0, rate=0.15), 2.0)):
        surface = FittedSurface(_adapted(), replace(shape, noise=1e-9), origin, np.array([1.0]))
        for key, length in ((RATE, 0.3), (RANK, 1.5)):
            mean, _ = surface.predict({**origin, key: np.array([moves[key]])})
            apart = {RATE: far * math.log10(3) / 2, RANK: 2 / 4}[key]
            assert mean == pytest.approx(_matern(apart / length))


def test_a_shape_is_as_likely_as_a_normal_density_says() -> None:
    """At the variance of greatest likelihood, the density of the values differs by a constant."""
    x, y = np.array([0.1, 0.4, 0.9, 0.5]), np.array([-1.0, 0.5, 1.2, 0.3])

    def density(shape: SurfaceShape) -> float:
        kernel = _matern((x[:, None] - x) / shape.other) + shape.noise * np.eye(4)
        variance = y @ np.linalg.inv(kernel) @ y / 4 + 1e-3
        _, logarithm = np.linalg.slogdet(variance * kernel)
        return -0.5 * float(logarithm)

    one, other = SurfaceShape(other=0.6, noise=0.1), SurfaceShape(other=4.0, noise=0.003)
    found = [FittedSurface(LINE, shape, _at(*x), y).log_likelihood for shape in (one, other)]
    assert found[0] - found[1] == pytest.approx(density(one) - density(other))


def test_expected_improvement_is_the_mean_of_the_gains() -> None:
    """Over a hundred thousand draws from the surface, to a hundredth of its deviation."""
    asked = _at(0.5, 0.9)
    mean, deviation = FALLING.predict(asked)
    assert mean.min() < -1.0
    draws = mean + deviation * np.random.default_rng(0).standard_normal((100_000, 2))
    expected = np.maximum(-1.0 - draws, 0).mean(axis=0)
    assert FALLING.expected_improvement(asked, FALLING.best) == pytest.approx(
        expected, abs=0.01 * float(deviation.max())
    )


def test_further_values_change_neither_shape_nor_variance() -> None:
    """The surface passes near a value that is put at a point, whatever the others are."""
    surface = FALLING.with_values(_at(0.9), np.array([0.0]))
    mean, _ = surface.predict(_at(0.9))
    assert mean == pytest.approx([0.0], abs=0.1)
    assert (surface.shape, surface.variance) == (FALLING.shape, FALLING.variance)


def test_a_point_without_a_value_promises_nothing_more() -> None:
    """The mean stays, the deviation falls there, and its own mean is no gain: others are chosen."""
    surface = FittedSurface(LINE, SurfaceShape(other=0.6), _at(0.1, 0.4), np.array([-1.0, 0.5]))
    believed = surface.believing(_at(0.8))
    (before, wide), (after, narrow) = (each.predict(_at(0.8, 0.6)) for each in (surface, believed))
    assert after == pytest.approx(before, abs=0.02)
    assert narrow[0] < 0.5 * wide[0]
    assert believed.variance == surface.variance
    asked = _at(0.5, 0.9)
    promises = [
        each.expected_improvement(asked, -1.0)[0] for each in (FALLING, FALLING.believing(asked))
    ]
    assert promises[1] < 0.5 * promises[0]


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_gamma_is_learnt(gamma: float) -> None:
    """Forty points of a valley in rate times alpha to that power tell it from the other powers."""
    generator = np.random.default_rng(0)
    rate, alpha = 10 ** generator.uniform(-4, -1, 40), 2 ** generator.uniform(0, 8, 40)
    rank = generator.integers(0, 5, 40).astype(float)
    valley = (np.log10(rate * alpha**gamma) + 2.5 - 1.2 * gamma) ** 2
    values = (valley - valley.mean()) / valley.std()
    columns = {RATE: rate, RANK: rank, ALPHA: alpha}
    assert choose_shape(_adapted(), columns, values).gamma == gamma


def test_without_evidence_gamma_is_a_half() -> None:
    """Four points of pure noise do not move it to an end."""
    generator = np.random.default_rng(1)
    columns = {
        RATE: 10 ** generator.uniform(-4, -1, 4),
        RANK: np.array([0.0, 2.0, 4.0, 1.0]),
        ALPHA: 2 ** generator.uniform(0, 8, 4),
    }
    values = np.array([1.0, -1.0, 0.5, -0.5])
    assert abs(choose_shape(_adapted(), columns, values).gamma - 0.5) <= 0.25


def test_a_chosen_shape_is_likelier_than_the_first() -> None:
    """A wave needs a shorter length than a slope."""
    x = np.linspace(0, 1, 30)
    wave = np.sin(12 * x)
    shape = choose_shape(LINE, _at(*x), wave)
    chosen, first = (
        FittedSurface(LINE, each, _at(*x), wave).log_likelihood for each in (shape, SurfaceShape())
    )
    assert chosen > first
    assert shape.other == 0.6
    assert shape.noise == 0.003


def test_a_thousand_points_choose_the_shape_of_a_hundred() -> None:
    """Those that are spread over the values, so that the cost of choosing is bounded."""
    x = np.random.default_rng(0).random(1000)
    wave = np.sin(12 * x)
    order = np.argsort(wave, kind="stable")
    kept = np.sort(order[np.linspace(0, 999, CHOOSING).round().astype(int)])
    assert choose_shape(LINE, _at(*x), wave) == choose_shape(LINE, _at(*x[kept]), wave[kept])
