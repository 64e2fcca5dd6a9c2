"""Domains and grids, and the one grammar that writes them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from sweeper.config.compose import parse_command_line, with_values
from sweeper.config.grammar import in_hydras_words, parse_domain, parse_space
from sweeper.config.space import (
    Branch,
    Branches,
    Choice,
    Interval,
    Scalar,
    Space,
    always_decided,
    decided_twice,
    grid,
    keys,
    locate,
    probes,
    walk,
)

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
        ("choice(null, 0.1)", Choice((None, 0.1))),
        ("int(tag(log, interval(1, 64)))", Interval(1, 64, log=True, integer=True)),
        ("range(0.0, 0.9, 0.3)", Interval(0.0, 0.6, step=0.3)),
        ("range(5)", Interval(0, 4, integer=True, step=1)),
        ("range(4, 0, -2)", Choice((4, 2))),
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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("tag(lgo, interval(1, 2))", "'lgo' has no meaning. Valid: log"),
        ("tag(log, choice(1, 2))", "belongs to an interval"),
        ("tag(log, range(1, 5))", "belongs to an interval"),
    ],
)
def test_tags_that_would_be_ignored_are_refused(words: str, message: str) -> None:
    """A misspelt or misplaced log tag is an error, not a linear scale."""
    with pytest.raises(ValueError, match=message):
        parse_domain("key", words)


@given(
    low=st.integers(-(10**6), 10**6),
    count=st.integers(2, 1000),
    step=st.integers(1, 1000),
    scale=st.sampled_from([None, 1, 10, 1000, 10**5]),
)
def test_stepped_interval_round_trip_and_values(
    low: int, count: int, step: int, scale: int | None
) -> None:
    """A range has exactly its steps, the stop excluded, in decimal numbers."""
    numbers = [low, low + count * step, step]
    texts = [str(number) if scale is None else repr(number / scale) for number in numbers]
    domain = parse_domain("key", f"range({', '.join(texts)})")
    assert isinstance(domain, Interval)
    assert parse_domain("key", str(domain)) == domain
    wanted = [low + index * step for index in range(count)]
    assert domain.steps() == tuple(x if scale is None else x / scale for x in wanted)
    assert all(value in domain for value in domain.steps())
    assert numbers[1] / (scale or 1) not in domain


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**9), 10**9),
    finite,
    st.text(alphabet="abcXYZ019 _-./@,='()", min_size=1, max_size=12),
)


@given(values=st.lists(scalars, min_size=1, max_size=5))
def test_choice_round_trip(values: list[Scalar]) -> None:
    """Whatever a choice holds, null and texts with commas and quotes included, comes back as it was."""
    domain = Choice(tuple(values))
    read = parse_domain("key", str(domain))
    assert isinstance(read, Choice)
    assert [(type(value), value) for value in read.values] == [
        (type(value), value) for value in values
    ]


@given(low=st.integers(1, 10**6), width=st.integers(1, 10**6), log=st.booleans())
def test_integer_interval_round_trip_and_bounds(low: int, width: int, log: bool) -> None:
    """Whole numbers only, both bounds among them."""
    domain = Interval(low, low + width, log=log, integer=True)
    assert parse_domain("key", str(domain)) == domain
    assert low in domain
    assert low + width in domain
    assert low - 1 not in domain
    assert low + 0.5 not in domain
    assert True not in domain


@given(texts=st.lists(st.sampled_from(["null", "1", "2.5", "a"]), min_size=2, max_size=4))
def test_choice_with_null_works_on_the_command_line(texts: list[str]) -> None:
    """Hydra refuses choice(null,…), so it gets the simple form, which means the same."""
    line = parse_command_line([f"adapter.lora_alpha=choice({','.join(texts)})", "-m"])
    words = line.overrides[0].partition("=")[2]
    assert parse_domain("key", words) == parse_domain("key", f"choice({','.join(texts)})")
    assert in_hydras_words("broken=choice(") == "broken=choice("


def _bounds(numbers: st.SearchStrategy[float]) -> st.SearchStrategy[tuple[float, float]]:
    """Two different numbers, the smaller one first."""
    pairs = st.tuples(numbers, numbers).filter(lambda pair: pair[0] != pair[1])
    return pairs.map(lambda pair: (min(pair), max(pair)))


@given(bounds=_bounds(finite))
def test_interval_round_trip(bounds: tuple[float, float]) -> None:
    """What a person types, and the same written out: bounds to the last digit, nothing beyond them."""
    low, high = bounds
    domain = parse_domain("key", f"interval({low!r}, {high!r})")
    assert domain == Interval(low, high)
    assert parse_domain("key", str(domain)) == domain
    assert low in domain
    assert high in domain
    assert math.nextafter(low, -math.inf) not in domain
    assert math.nextafter(high, math.inf) not in domain


@given(bounds=_bounds(positive))
def test_log_interval_round_trip(bounds: tuple[float, float]) -> None:
    """The log tag survives, is never added, and is refused where a bound is not above zero."""
    low, high = bounds
    words = f"interval({low!r}, {high!r})"
    domain = parse_domain("key", f"tag(log, {words})")
    assert domain == Interval(low, high, log=True)
    assert domain != parse_domain("key", words)
    assert parse_domain("key", str(domain)) == domain
    with pytest.raises(ValueError, match="log scale"):
        parse_domain("key", f"tag(log, interval({-low!r}, {high!r}))")


@given(bounds=_bounds(finite))
def test_reversed_bounds_are_refused(bounds: tuple[float, float]) -> None:
    """No interval is read backwards."""
    with pytest.raises(ValueError, match="empty"):
        parse_domain("key", f"interval({bounds[1]!r}, {bounds[0]!r})")


@given(
    numbers=st.lists(
        st.one_of(st.integers(-(10**6), 10**6), finite), min_size=2, max_size=5, unique=True
    )
)
def test_a_choice_is_the_same_in_every_spelling(numbers: list[float]) -> None:
    """choice(...), a comma list and a YAML list hold the same values, of the same types, in order."""
    typed = ", ".join(map(repr, numbers))
    read = [
        parse_domain("key", words)
        for words in (f"choice({typed})", typed.replace(" ", ""), list(numbers))
    ]
    for domain in read:
        assert isinstance(domain, Choice)
        assert [(type(value), value) for value in domain.values] == [
            (type(number), number) for number in numbers
        ]


@given(value=st.one_of(st.booleans(), st.integers(-(10**9), 10**9), finite, st.none()))
def test_override_round_trip_of_scalars(value: float | None) -> None:
    """A value written as an override is read as the same value."""
    read = with_values(OmegaConf.create({"a": {"b": 0}}), {"a.b": value})["a"]["b"]
    assert read == value
    assert type(read) is type(value)


def test_values_reach_what_refers_to_them() -> None:
    """An interpolation follows the value that is set, as it does when Hydra composes."""
    config = OmegaConf.create({"a": {"b": 1}, "c": "${a.b}"})
    assert with_values(config, {"a.b": 2}) == {"a": {"b": 2}, "c": 2}
    assert config.c == 1


@given(
    text=st.text(
        alphabet=st.characters(codec="ascii", categories=("L", "N", "P", "Zs")), min_size=1
    )
)
def test_override_round_trip_of_texts(text: str) -> None:
    """A text survives too, whatever quotes, commas, equals signs and brackets it holds."""
    if text.startswith(("[", "{")):
        return  # these are override texts of lists by definition
    read = with_values(OmegaConf.create({"a": {"b": 0}}), {"a.b": text})["a"]["b"]
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


DORA = {
    "training.learning_rate": "tag(log, interval(1e-4, 1e-2))",
    "adapter.use_dora": {
        True: {"adapter.r": "choice(4, 8)", "adapter.use_rslora": False},
        False: {"adapter.r": "choice(16, 32)"},
    },
    "schedule": {
        "short": {"training.max_steps": 32},
        "long": {"training.max_steps": 64, "training.weight_decay": "0.0,0.1"},
    },
}


def _dora() -> Space:
    space, fixed, problems = parse_space(DORA, lambda key: "." in key)
    assert (fixed, problems) == ({}, [])
    return space


def test_a_mapping_is_a_choice_whose_values_bring_keys_of_their_own() -> None:
    """Fixed values and domains of a branch; a name that is no setting is a label."""
    space = _dora()
    branches = space["adapter.use_dora"]
    assert isinstance(branches, Branches)
    assert branches.choice == Choice((True, False))
    assert branches.branches[True] == Branch(
        {"adapter.use_rslora": False}, {"adapter.r": Choice((4, 8))}
    )
    assert not branches.label
    assert isinstance(space["schedule"], Branches)
    assert space["schedule"].label
    assert "schedule" not in keys(space)
    assert keys(space, labels=True) - keys(space) == {"schedule"}
    assert keys(space) - always_decided(space) == {"adapter.use_rslora", "training.weight_decay"}


def test_a_draw_leads_to_the_values_of_its_branch_alone() -> None:
    """Only the drawn branch's keys are asked for and set; a label sets nothing itself."""
    draw = {
        "training.learning_rate": 1e-3,
        "adapter.use_dora": True,
        "adapter.use_dora=true/adapter.r": 8,
        "schedule": "short",
    }
    assert walk(_dora(), lambda name, _: draw[name]) == {
        "training.learning_rate": 1e-3,
        "adapter.use_dora": True,
        "adapter.use_rslora": False,
        "adapter.r": 8,
        "training.max_steps": 32,
    }


@given(data=st.data())
def test_a_point_is_found_again_in_its_space(data: st.DataObject) -> None:
    """locate is the inverse of walk: the draw it finds leads to the same point."""
    space = _dora()
    point = walk(space, lambda _, domain: data.draw(st.sampled_from(domain.probes())))
    draw = locate(space, point)
    assert draw is not None
    assert walk(space, lambda name, _: draw[name]) == point


leaves = st.one_of(
    st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True).map(
        lambda v: Choice(tuple(v))
    ),
    st.lists(st.sampled_from(["a", "b c", None, 0.5]), min_size=1, max_size=3, unique=True).map(
        lambda values: Choice(tuple(values))
    ),
    st.tuples(st.integers(0, 5), st.integers(1, 5)).map(
        lambda pair: Interval(pair[0], pair[0] + pair[1], integer=True, step=1)
    ),
)


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    """Spaces of a few keys, some of them with branches, which may search the same keys."""
    space: Space = {key: draw(leaves) for key in draw(st.sets(st.sampled_from(["p.a", "p.b"])))}
    for key, label in draw(st.sets(st.sampled_from([("q.switch", False), ("name", True)]))):
        inner = st.dictionaries(st.sampled_from([f"{key}.x", f"{key}.y"]), leaves, max_size=2)
        fixed = st.dictionaries(st.just(f"{key}.z"), st.integers(0, 2), max_size=1)
        branches = {value: Branch(draw(fixed), draw(inner)) for value in ("one", "two")}
        space[key] = Branches(branches, label=label)
    return space


@given(space=spaces())
def test_every_point_of_a_grid_is_found_again_in_its_space(space: Space) -> None:
    """Whatever the branches: a grid's draws differ, and what locate finds leads to the same point.

    A name's branch without keys leaves no trace in the point, so there locate leaves it open.
    """
    draws = list(grid(space))
    assert len({tuple(draw.items()) for draw in draws}) == len(draws)
    assert len(draws) == math.prod(map(_grid_size, space.values()))
    for draw in draws:
        point = walk(space, lambda name, domain, draw=draw: draw[name])  # type: ignore[misc]
        assert always_decided(space) <= set(point) <= keys(space)
        found = locate(space, point)
        assert found is not None
        again = {**draw, **found}
        assert walk(space, lambda name, domain, again=again: again[name]) == point  # type: ignore[misc]


def _grid_size(domain: object) -> int:
    """Counted independently of grid(): values of a leaf, or the sum over branches."""
    match domain:
        case Branches():
            return sum(
                math.prod(map(_grid_size, branch.space.values()))
                for branch in domain.branches.values()
            )
        case Choice():
            return len(domain.values)
        case Interval():
            return int(domain.high - domain.low) + 1
    raise AssertionError(domain)


@pytest.mark.parametrize(
    ("point", "draw"),
    [
        ({"training.learning_rate": 1e-3}, {"training.learning_rate": 1e-3}),
        ({"training.learning_rate": 1.0}, None),
        (
            {"adapter.r": 32},
            {"adapter.use_dora": False, "adapter.use_dora=false/adapter.r": 32},
        ),
        ({"adapter.use_dora": True, "adapter.r": 32}, None),
        ({"schedule": "long"}, {"schedule": "long"}),
        (
            {"training.weight_decay": 0.1},
            {"schedule": "long", "schedule=long/training.weight_decay": 0.1},
        ),
    ],
)
def test_partial_points_fix_what_they_name(
    point: dict[str, Scalar], draw: dict[str, Scalar] | None
) -> None:
    """A prior may leave keys open, and names a branch by the values that fit it only."""
    assert locate(_dora(), point) == draw


def test_every_probe_of_every_branch_is_tried() -> None:
    """The plan's checks see each branch with its own values."""
    points = list(probes(_dora()))
    assert {point["adapter.r"] for point in points if "adapter.r" in point} == {4, 8, 16, 32}
    assert {point.get("training.weight_decay") for point in points} == {None, 0.0, 0.1}


def test_a_grid_goes_through_the_branches() -> None:
    """Two DoRA ranks and two plain ones, each with three schedules."""
    space = {key: domain for key, domain in _dora().items() if key != "training.learning_rate"}
    draws = list(grid(space))
    assert len(draws) == len({tuple(draw.items()) for draw in draws}) == 4 * 3


def test_a_key_in_a_branch_and_beside_it_is_ambiguous() -> None:
    """The same key may stand in two branches, but not in a branch and outside."""
    assert decided_twice(_dora()) == set()
    assert decided_twice({"adapter.r": Choice((1, 2)), **_dora()}) == {"adapter.r"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"a": {}}, "two or more"),
        ({"a": 1, "b": 2}, "no mapping"),
        ({"a": {"x.y": "interval(2, 1)"}, "b": {}}, "variant=a: x.y: .* is empty"),
    ],
)
def test_broken_branches_say_where(words: object, message: str) -> None:
    """What is wrong in a branch is reported with the way to it."""
    _, _, problems = parse_space({"variant": words}, lambda key: False)
    assert len(problems) == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(problems[0])
