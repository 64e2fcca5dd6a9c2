"""Candidates cover a space evenly, stay inside it, and move from known points."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sweeper.config.space import Choice, Domain, Interval
from sweeper.search.adapter_geometry import AdapterGeometry
from sweeper.search.candidate_points import CandidatePoints, shares_of, values_at

DOMAINS: dict[str, Domain] = {
    "real": Interval(-1.0, 3.0),
    "log": Interval(1e-4, 1e-1, log=True),
    "whole": Interval(3, 9, integer=True),
    "whole log": Interval(1, 64, integer=True, log=True),
    "steps": Interval(0.0, 0.9, step=0.3),
    "whole steps": Interval(8, 64, integer=True, step=8),
    "words": Choice(("a", "b", "c")),
    "numbers": Choice((8, 2, 32)),
}
GEOMETRY = AdapterGeometry(DOMAINS, None)


def _candidates(seed: int = 0, **fixed: str | float) -> CandidatePoints:
    return CandidatePoints(GEOMETRY, np.random.default_rng(seed), fixed)


@pytest.mark.parametrize("name", DOMAINS)
@given(share=st.floats(0, 1))
def test_every_share_is_a_value_and_gives_itself_back(name: str, share: float) -> None:
    """Both ends included; a value's own share leads to that value."""
    domain = DOMAINS[name]
    values = values_at(domain, np.array([share]))
    point = AdapterGeometry({name: domain}, None).draw_at({name: values}, 0)
    assert point[name] in domain
    again = values_at(domain, shares_of(domain, values))
    assert again == pytest.approx(values, rel=1e-9)


def test_candidates_cover_every_part_of_the_space() -> None:
    """Each word, each step and each tenth of an interval has its share of two thousand points."""
    candidates = _candidates()
    columns = candidates.columns(candidates.anywhere(2000))
    for name, count in {"words": 3, "numbers": 3, "steps": 4, "whole": 7, "whole steps": 8}.items():
        _, found = np.unique(columns[name].round(9), return_counts=True)
        assert len(found) == count
        assert found.min() > 2000 / count * 0.75
    tenths = np.histogram(np.log(columns["log"]), 10)[0]
    assert tenths.min() > 150


def test_points_near_others_differ_by_their_spread() -> None:
    """A tenth of each range, where the key has an order; one word in about seven is another."""
    candidates = _candidates()
    middle = np.full((1, len(DOMAINS)), 0.5)
    near = candidates.near(middle, 4000, 0.1)
    order = [name for name in GEOMETRY.space if name != "words"]
    places = [list(GEOMETRY.space).index(name) for name in order]
    assert near[:, places].std(axis=0) == pytest.approx([0.1] * len(order), rel=0.05)
    words = candidates.columns(near)["words"]
    assert float((words != 1).mean()) == pytest.approx(0.2 * 2 / 3, abs=0.02)
    edge = candidates.near(np.zeros((1, len(DOMAINS))), 100, 0.1)
    assert (edge >= 0).all()


def test_fixed_keys_have_their_value_everywhere() -> None:
    """Whatever the rows say."""
    candidates = _candidates(words="c", log=1e-3)
    columns = candidates.columns(candidates.anywhere(50))
    assert set(columns["words"].tolist()) == {2.0}
    assert set(columns["log"].tolist()) == {1e-3}
    assert len(set(columns["real"].tolist())) == 50


def test_known_points_are_rows_again() -> None:
    """Points of the record come back as the same columns."""
    candidates = _candidates()
    columns = candidates.columns(candidates.anywhere(20))
    again = candidates.columns(candidates.rows(columns))
    for name in DOMAINS:
        assert again[name] == pytest.approx(columns[name], rel=1e-9)
