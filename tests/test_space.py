"""Domains and grids, and the one grammar that writes them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sweeper.compose import parse_domain, with_values
from sweeper.space import Choice, Interval, grid

finite = st.floats(min_value=-1e6, max_value=1e6, allow_nan=False)
positive = st.floats(min_value=1e-8, max_value=1e6, allow_nan=False)


@pytest.mark.parametrize(
    ("words", "domain"),
    [
        ("interval(1, 8)", Interval(1.0, 8.0)),
        ("int(interval(1, 8))", Interval(1, 8, integer=True)),
        ("tag(log, interval(1e-5, 1e-2))", Interval(1e-5, 1e-2, log=True)),
        ("tag(log, int(interval(1, 64)))", Interval(1, 64, log=True, integer=True)),
        ("choice(a, b)", Choice(("a", "b"))),
        ("a,b,c", Choice(("a", "b", "c"))),
        ("1,2,4", Choice((1, 2, 4))),
        ([1, 2], Choice((1, 2))),
        ("null,0.1", Choice((None, 0.1))),
        ("range(1, 5)", Interval(1, 4, integer=True, step=1)),
        ("range(0.0, 1.0, 0.25)", Interval(0.0, 0.75, step=0.25)),
        ("choice([q_proj,v_proj],[q_proj])", Choice(("[q_proj,v_proj]", "[q_proj]"))),
        (5, 5),
        ("abc", "abc"),
    ],
)
def test_parse_domain_reads_the_words_users_know(words: object, domain: object) -> None:
    """Every form of the grammar has one meaning; range excludes its stop, as in Hydra."""
    assert parse_domain("key", words) == domain


@pytest.mark.parametrize(
    "words", ["interval(3, 1)", "tag(log, interval(0, 1))", "choice(", "range(3, 3)"]
)
def test_parse_domain_refuses_what_has_no_meaning(words: str) -> None:
    """Empty intervals, log scales that touch zero and broken grammar are errors."""
    with pytest.raises(ValueError, match=r"empty|log scale|not a search-space"):
        parse_domain("key", words)


@given(low=finite, high=finite)
def test_interval_round_trip(low: float, high: float) -> None:
    """An interval written out and read again is the same interval, bounds to the last digit."""
    if low >= high:
        return
    domain = Interval(low, high)
    assert parse_domain("key", str(domain)) == domain


@given(low=positive, high=positive)
def test_log_interval_round_trip(low: float, high: float) -> None:
    """The log tag survives the round trip."""
    if low >= high:
        return
    domain = Interval(low, high, log=True)
    assert parse_domain("key", str(domain)) == domain


@given(value=st.one_of(st.booleans(), st.integers(-(10**9), 10**9), finite, st.none()))
def test_override_round_trip_of_scalars(value: float | None) -> None:
    """A value written as an override is read as the same value."""
    read = with_values({"a": {"b": 0}}, {"a.b": value})["a"]["b"]
    assert read == value
    assert type(read) is type(value)


@given(
    text=st.text(
        alphabet=st.characters(codec="ascii", categories=("L", "N", "P", "Zs")), min_size=1
    )
)
def test_override_round_trip_of_texts(text: str) -> None:
    """A text survives too, whatever quotes, commas, equals signs and brackets it holds."""
    if text.startswith(("[", "{")):
        return  # these are override texts of lists by definition
    read = with_values({"a": {"b": 0}}, {"a.b": text})["a"]["b"]
    assert read == text


def test_grid_is_every_combination_once() -> None:
    """A grid is the product of its choices and stepped ranges."""
    space = {"a": Choice((1, 2)), "b": Interval(0.0, 0.5, step=0.25)}
    points = list(grid(space))
    assert points == [{"a": a, "b": b} for a in (1, 2) for b in (0.0, 0.25, 0.5)]


def test_grid_refuses_a_continuous_interval() -> None:
    """A range without steps has no grid, and the message says what has."""
    with pytest.raises(ValueError, match=r"lr=.*needs choice"):
        list(grid({"lr": Interval(0.0, 1.0)}))


def test_interval_contains_its_bounds_and_nothing_beyond() -> None:
    """Both bounds belong to an interval."""
    domain = Interval(1.0, 2.0)
    assert 1.0 in domain
    assert 2.0 in domain
    assert math.nextafter(2.0, 3.0) not in domain
    assert "1.5" not in domain
