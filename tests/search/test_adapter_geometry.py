"""Coordinates of LoRA's settings: what is equally far, and what shares a coordinate."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sweeper.config.settings import LoraAdapter
from sweeper.config.space import Choice, Domain, Interval, Scalar
from sweeper.search.adapter_geometry import (
    ALPHA,
    RANK,
    RATE,
    RATIO,
    WARMUP,
    AdapterGeometry,
)
from tests.conftest import make_settings

TARGETS = "adapter.target_modules"
DOMAINS: dict[str, Domain] = {
    RATE: Interval(3e-4, 3e-2, log=True),
    RANK: Choice((2, 4, 8, 16, 32)),
    RATIO: Choice((1, 2, 4)),
    ALPHA: Choice((4, 8, 16, 32)),
    TARGETS: Choice(("attention", "mlp", "all-linear")),
    WARMUP: Interval(0.0, 0.1),
}
BASE: dict[str, Scalar] = {
    RATE: 1e-3,
    RANK: 8,
    RATIO: 2,
    ALPHA: 16,
    TARGETS: "mlp",
    WARMUP: 0.05,
}


def _adapter(**changes: Any) -> LoraAdapter:
    adapter = make_settings().adapter
    assert isinstance(adapter, LoraAdapter)
    return adapter.model_copy(update=changes)


def _geometry(*keys: str, adapter: LoraAdapter | None = None) -> AdapterGeometry:
    return AdapterGeometry({key: DOMAINS[key] for key in keys}, adapter or _adapter())


def _rows(geometry: AdapterGeometry, *changes: dict[str, Scalar], gamma: float = 0.5) -> Any:
    points = [{**BASE, **change} for change in changes]
    return geometry.coordinates(geometry.columns(points), gamma)


@pytest.mark.parametrize("gamma", [0.0, 0.25, 0.5, 1.0])
def test_rate_times_a_power_of_alpha_is_one_coordinate(gamma: float) -> None:
    """Four times the alpha and a rate that is lower by that power lie at one place, in each space."""
    lower = 1e-3 / 4**gamma
    ratios = _geometry(RATE, RANK, RATIO, TARGETS, WARMUP)
    same = _rows(ratios, {RATIO: 1}, {RATIO: 4, RATE: lower}, gamma=gamma)
    assert same[0, 0] == pytest.approx(same[1, 0])
    alphas = _geometry(RATE, RANK, ALPHA, adapter=_adapter(alpha_over_r=None))
    same = _rows(alphas, {ALPHA: 4}, {ALPHA: 16, RATE: lower}, gamma=gamma)
    assert same[0, 0] == pytest.approx(same[1, 0])


def test_a_ratio_gives_the_alpha_of_its_rank() -> None:
    """r=8 with alpha/r=4 has the alpha of r=32 with alpha/r=1; so has a rank whose ratio is fixed."""
    searched = _rows(_geometry(RATE, RANK, RATIO), {RANK: 8, RATIO: 4}, {RANK: 32, RATIO: 1})
    assert searched[0, 0] == pytest.approx(searched[1, 0])
    fixed = _geometry(RATE, RANK)
    rows = _rows(fixed, {RANK: 8}, {RANK: 32, RATE: 1e-3 / math.sqrt(4)})
    assert rows[0, 0] == pytest.approx(rows[1, 0])
    constant = _geometry(RATE, RANK, adapter=_adapter(alpha_over_r=None, lora_alpha=16.0))
    rows = _rows(constant, {RANK: 8}, {RANK: 32})
    assert rows[0, 0] == pytest.approx(rows[1, 0])


def test_rslora_counts_a_root_of_the_rank_as_alpha() -> None:
    """Its scale is alpha over the root of r: r=32 has twice that of r=8 as LoRA's alpha over r."""
    rooted = _geometry(RATE, RANK, ALPHA, adapter=_adapter(alpha_over_r=None, use_rslora=True))
    rows = _rows(rooted, {RANK: 8, ALPHA: 8}, {RANK: 32, ALPHA: 8, RATE: 1e-3 / math.sqrt(2)})
    assert rows[0, 0] == pytest.approx(rows[1, 0])


@pytest.mark.parametrize(
    ("keys", "adapter", "mixes"),
    [
        ((RATE, RANK, RATIO), {}, True),
        ((RATE, RANK), {}, True),
        ((RATE, RANK), {"alpha_over_r": None, "lora_alpha": 16.0}, False),
        ((RATE, WARMUP), {}, False),
        ((RANK, RATIO), {}, False),
    ],
)
def test_gamma_matters_where_alpha_varies_with_a_rate(
    keys: tuple[str, ...], adapter: dict[str, Any], mixes: bool
) -> None:
    """Elsewhere no coordinate depends on it."""
    geometry = _geometry(*keys, adapter=_adapter(**adapter))
    points: list[dict[str, Scalar]] = [{}, {RANK: 32, RATE: 2e-3, RATIO: 4}]
    rows = [_rows(geometry, *points, gamma=gamma) for gamma in (0.0, 1.0)]
    distances = [float(np.linalg.norm(found[0] - found[1])) for found in rows]
    assert geometry.mixes == mixes
    assert (distances[0] != pytest.approx(distances[1])) == mixes


def test_full_fine_tuning_has_a_rate_and_no_alpha() -> None:
    """Without an adapter the rate's coordinate is its logarithm alone."""
    geometry = AdapterGeometry({RATE: DOMAINS[RATE]}, None)
    rows = _rows(geometry, {RATE: 1e-3}, {RATE: 1e-2})
    assert not geometry.mixes
    assert rows[1, 0] - rows[0, 0] == pytest.approx(0.5)


def test_ranks_are_apart_by_their_doublings_and_words_by_one_step() -> None:
    """2 to 4 is as far as 16 to 32, and each target set as far from every other."""
    ranks = _rows(_geometry(RANK), *({RANK: r} for r in (2, 4, 16, 32)))[:, 0]
    assert ranks[1] - ranks[0] == pytest.approx(ranks[3] - ranks[2])
    assert ranks[2] - ranks[1] == pytest.approx(2 * (ranks[1] - ranks[0]))
    words = _rows(_geometry(TARGETS), *({TARGETS: t} for t in ("attention", "mlp", "all-linear")))
    apart = [np.linalg.norm(words[a] - words[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    assert apart == pytest.approx([math.sqrt(2)] * 3)


def test_any_other_key_takes_part_as_it_is() -> None:
    """Whole numbers, steps, numbers to choose from and booleans; a key with one value says nothing."""
    space: dict[str, Domain] = {
        "training.max_steps": Choice((32, 64, 512)),
        "training.weight_decay": Interval(0.0, 0.9, step=0.3),
        "adapter.use_dora": Choice((True, False)),
        "data.max_length": Interval(64, 1024, integer=True, log=True),
        "quantization": Choice(("nf4",)),
    }
    geometry = AdapterGeometry(space, _adapter())
    low: dict[str, Scalar] = {
        **{"training.max_steps": 32, "training.weight_decay": 0.0, "adapter.use_dora": True},
        **{"data.max_length": 64, "quantization": "nf4"},
    }
    far: list[dict[str, Scalar]] = [
        {"training.max_steps": 512},
        {"training.weight_decay": 0.9},
        {"adapter.use_dora": False},
        {"data.max_length": 1024},
    ]
    rows = geometry.coordinates(geometry.columns([low, *({**low, **each} for each in far)]), 0.5)
    distances = [float(np.linalg.norm(row - rows[0])) for row in rows[1:]]
    assert distances == pytest.approx([1.0, 1.0, math.sqrt(2), 1.0])


def test_warm_up_counts_alike_as_an_interval_and_as_a_choice() -> None:
    """Half a tenth of the schedule is as far, however the space is written."""
    apart = []
    for domain in (Interval(0.0, 0.1), Choice((0.0, 0.05, 0.2))):
        rows = _at_warmups(AdapterGeometry({WARMUP: domain}, _adapter()))
        apart.append(rows[1] - rows[0])
    assert apart[0] == pytest.approx(apart[1])


def _at_warmups(geometry: AdapterGeometry) -> Any:
    return geometry.coordinates(geometry.columns([{WARMUP: 0.0}, {WARMUP: 0.05}]), 0.5)[:, 0]


def test_the_order_of_the_keys_changes_nothing() -> None:
    """A YAML file with other lines first describes the same space."""
    one, other = _geometry(RATE, RANK, TARGETS, WARMUP), _geometry(WARMUP, TARGETS, RANK, RATE)
    assert _rows(one, {}, {RANK: 2}).tolist() == _rows(other, {}, {RANK: 2}).tolist()


VALUES: dict[str, st.SearchStrategy[Scalar]] = {
    RATE: st.floats(3e-4, 3e-2),
    RANK: st.sampled_from((2, 4, 8, 16, 32)),
    TARGETS: st.sampled_from(("attention", "mlp", "all-linear")),
    WARMUP: st.floats(0.0, 0.1),
}


@given(st.lists(st.fixed_dictionaries(VALUES), min_size=1, max_size=4))
def test_columns_give_back_the_points(points: list[dict[str, Scalar]]) -> None:
    """Every value that a trial stored is found again, of the same type."""
    geometry = _geometry(*VALUES)
    columns = geometry.columns(points)
    found = [geometry.draw_at(columns, index) for index in range(len(points))]
    assert found == points
    assert [type(point[RANK]) for point in found] == [int] * len(points)


@pytest.mark.parametrize(
    ("point", "inside"),
    [
        ({"s": 0.1 + 0.2}, True),  # 0.30000000000000004, as Optuna computes three steps
        ({"s": 0.9}, True),
        ({"s": 1.0}, False),
        ({"s": True}, False),
        ({"s": None}, False),
        ({}, False),
    ],
)
def test_a_point_is_inside_up_to_rounding(point: dict[str, Scalar], inside: bool) -> None:
    """A trial of another space, or without a value, is none of this one's."""
    geometry = AdapterGeometry({"s": Interval(0.0, 0.9, step=0.1)}, None)
    assert geometry.covers(point) == inside
