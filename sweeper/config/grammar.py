"""Hydra's override grammar as the language of search spaces: from text to domains and back.

`interval`, `int`, `tag(log, …)`, `choice`, lists and `range` mean the same in YAML and on the
command line. The module knows what a domain is (sweeper.config.space), but not what its key means.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser, create_functions
from hydra.core.override_parser.types import (
    ChoiceSweep,
    IntervalSweep,
    Override,
    ParsedElementType,
    RangeSweep,
)
from hydra.errors import HydraException

from sweeper.config.space import (
    MAX_VALUES,
    Branch,
    Branches,
    Choice,
    Domain,
    Interval,
    Point,
    Scalar,
    Space,
    word,
)


def parse_space(
    params: Mapping[str, object], is_setting: Callable[[str], bool]
) -> tuple[Space, Point, list[str]]:
    """Read a whole search space.

    A mapping is a choice between branches, `KEY: {VALUE: {KEY: text, …}, …}`: VALUE is drawn first,
    and its own keys are searched only if it is drawn. A KEY that is no setting and has no dot is a
    label.

    Returns:
        The searched keys, the keys with one fixed value, and the problems found.
    """
    space: Space = {}
    fixed: Point = {}
    problems: list[str] = []
    for key, words in params.items():
        try:
            if isinstance(words, Mapping):
                space[key], wrong = _branches(key, words, is_setting)
                problems += wrong
                continue
            domain = parse_domain(key, words)
        except ValueError as error:
            problems.append(f"{key}: {error}")
            continue
        if isinstance(domain, Choice | Interval):
            space[key] = domain
        else:
            fixed[key] = domain
    return space, fixed, problems


def _branches(
    key: str, words: Mapping[Any, object], is_setting: Callable[[str], bool]
) -> tuple[Branches, list[str]]:
    if len(words) < 2:
        raise ValueError(f"a choice between branches needs two or more, not {len(words)}")
    branches: dict[Scalar, Branch] = {}
    problems: list[str] = []
    for name, params in words.items():
        if not isinstance(params, Mapping):
            raise ValueError(
                f"{name}: {params!r} is no mapping. Write KEY: {{VALUE: {{KEY: words}}, …}}, "
                "and {} for a branch without keys of its own"
            )
        space, fixed, wrong = parse_space(params, is_setting)
        branches[scalar(name)] = Branch(fixed, space)
        problems += [f"{key}={word(scalar(name))}: {problem}" for problem in wrong]
    return Branches(branches, label="." not in key and not is_setting(key)), problems


def parse_domain(key: str, words: object) -> Domain | Scalar:
    """Read one entry of a search space: a domain, or a plain value, which is fixed.

    Args:
        key: the setting, for messages.
        words: the text in the YAML or after `key=` on the command line: `interval(a,b)`, `tag(log,
            interval(a,b))`, `int(interval(a,b))`, `choice(...)`, `a,b,c`, a YAML list, or
            `range(start, stop[, step])` with the stop excluded, as everywhere in Hydra.

    Raises:
        ValueError: the text is not in that grammar, or the domain is empty or impossible.
    """
    if isinstance(words, list):
        return _choice(words)
    if not isinstance(words, str):
        return scalar(words)
    try:
        override = _grammar().parse_override(f"{key}={words}")
    except HydraException as error:
        raise ValueError(
            f"{words!r} is not a search-space expression: {_first_line(error)}"
        ) from None
    value = override.value()
    tags = set(getattr(value, "tags", ()))
    if unknown := sorted(tags - {"log"}):
        raise ValueError(f"{words!r}: tag {unknown[0]!r} has no meaning. Valid: log")
    match value:
        case ChoiceSweep() if not tags:
            return _choice(value.list)
        case IntervalSweep():
            return _interval(value)
        case RangeSweep() if not tags:
            return _range(value)
        case ChoiceSweep() | RangeSweep():
            raise ValueError(f"{words!r}: a log scale belongs to an interval only")
        case _:
            return scalar(value)


def _choice(values: Sequence[object]) -> Choice:
    if len(values) > MAX_VALUES:
        raise ValueError(_too_many(len(values)))
    return Choice(tuple(scalar(value) for value in values))


def _too_many(count: int) -> str:
    return f"a choice between {count:,} values. At most {MAX_VALUES:,}, or write an interval"


def _interval(sweep: IntervalSweep) -> Interval:
    low, high = sweep.start, sweep.end
    assert low is not None
    assert high is not None
    integer = isinstance(low, int) and isinstance(high, int)
    return Interval(low, high, log="log" in sweep.tags, integer=integer)


def _range(sweep: RangeSweep) -> Interval | Choice:
    """Compute a range in decimal arithmetic. In binary, 0.9 would be a value of range(0, 0.9, 0.3)."""
    assert sweep.start is not None
    assert sweep.stop is not None
    low, stop, step = (Decimal(repr(number)) for number in (sweep.start, sweep.stop, sweep.step))
    count = max(0, math.ceil((stop - low) / step)) if step else 0
    integer = all(isinstance(number, int) for number in (sweep.start, sweep.stop, sweep.step))
    kind = int if integer else float
    if count == 0:
        raise ValueError(f"range({sweep.start}, {sweep.stop}, {sweep.step}) is empty")
    if step < 0 and count > MAX_VALUES:
        raise ValueError(_too_many(count))
    # an interval needs two ends in ascending order
    if count == 1 or step < 0:
        return Choice(tuple(kind(low + step * index) for index in range(count)))
    high = low + step * (count - 1)
    return Interval(kind(low), kind(high), integer=integer, step=kind(step))


def in_hydras_words(text: str) -> str:
    """Rewrite an override that only our grammar reads for Hydra's own: `choice(null,1)`."""
    if read_override(text) is not None:
        return text
    try:
        value = _grammar().parse_override(text).value()
    except HydraException:
        return text  # whoever composes says what is wrong
    if not isinstance(value, ChoiceSweep):
        return text
    return f"{text.partition('=')[0]}={','.join(word(scalar(item)) for item in value.list)}"


def read_override(text: str) -> Override | None:
    """Return an override as Hydra parses it, or None if it does not parse. Composing reports the
    error.
    """
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException:
        return None


def format_override(key: str, value: Scalar) -> str:
    """Format one value as a Hydra override."""
    return f"{key}={word(value)}"


def scalar(value: Any) -> Scalar:
    """Return a value that Optuna can store. Lists and dicts become their override text."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, list | dict):
        return str(Override._get_value_element_as_str(value))
    # the text of Hydra's QuotedString, without its quotes
    return str(value.text) if hasattr(value, "text") else str(value)


def _grammar() -> OverridesParser:
    """Return Hydra's grammar, extended by null in choice(...)."""
    functions = create_functions()
    values = inspect.Parameter(
        "args",
        inspect.Parameter.VAR_POSITIONAL,
        annotation=ParsedElementType | ChoiceSweep,
    )
    functions.definitions["choice"] = inspect.Signature([values])
    return OverridesParser(functions)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
