"""Known points: recipes that an arm tries before its sampler chooses.

A recipe is a point with a name and an origin. The winner of a search is compared with it, so only a
point that the arm can try as the recipe states it is one. Where the arm fixes one of its keys to another
value, or does not offer the value, the rest of the point is tried first all the same, without the name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter

from sweeper.config.settings import RecipeSettings
from sweeper.config.space import (
    Branches,
    Choice,
    Domain,
    Interval,
    Point,
    Scalar,
    Space,
    keys,
    locate,
)
from sweeper.core.value import FrozenValue

_QLORA: Point = {"adapter.target_modules": "all-linear", "training.warmup_ratio": 0.03}
EARLIER_PRIORS: tuple[Point, ...] = (
    {"training.learning_rate": 2e-4, "adapter.r": 64, "adapter.alpha_over_r": 1, **_QLORA},
    {"training.learning_rate": 3e-4, "adapter.r": 16, "adapter.alpha_over_r": 2, **_QLORA},
)
"""Known points that earlier versions tried first with space=real, without storing that they did."""


class KnownRecipe(FrozenValue):
    """A recipe in the space of an arm: a value for each searched key."""

    name: str
    source: str
    """Where the point was read."""
    point: Point


STORED_RECIPES = TypeAdapter(tuple[KnownRecipe, ...])
"""The recipes of an arm as JSON values."""


def known_points(
    recipes: Sequence[RecipeSettings], space: Space, values: Mapping[str, Any]
) -> tuple[list[KnownRecipe], list[Point]]:
    """Separate the recipes that an arm can try as they are from those of which it can try a part.

    Args:
        recipes: the recipes of the experiment.
        space: the arm's search space.
        values: the arm's settings before any point is applied, as dotted keys. A searched key that a
            recipe does not name gets its value from them.

    Returns:
        The recipes with a value for each searched key, and the offered parts of the others.
    """
    whole: list[KnownRecipe] = []
    parts: list[Point] = []
    for recipe in recipes:
        point = _whole_point(recipe.point, space, values)
        if point is None:
            parts.append(_offered_part(recipe.point, space))
        else:
            whole.append(KnownRecipe(name=recipe.name, source=_origin(recipe), point=point))
    return whole, [part for part in parts if part]


def _offered_part(wanted: Mapping[str, Scalar], space: Space) -> Point:
    """Return the part of a point whose values a space offers."""
    return {
        key: _as_offered(space.get(key), value)
        for key, value in wanted.items()
        if locate(space, {key: value})
    }


def _whole_point(
    wanted: Mapping[str, Scalar], space: Space, values: Mapping[str, Any]
) -> Point | None:
    """Return the point in a space that trains what a recipe states, or None if there is none."""
    searched = keys(space, labels=True)
    fixed = {key: value for key, value in wanted.items() if key not in searched}
    if any(key not in values or values[key] != value for key, value in fixed.items()):
        return None
    point: Point = {}
    for key in sorted(searched):
        point[key] = _as_offered(space.get(key), wanted.get(key, values.get(key)))
    # A label is no setting, so no recipe and no default names its value
    known = all(key in wanted or key in values for key in searched)
    return point if known and locate(space, point) is not None else None


def _as_offered(domain: Domain | Branches | None, value: Scalar) -> Scalar:
    """Return the equal value that a domain offers: 2 for the setting 2.0, as the sampler draws it."""
    if isinstance(domain, Choice):
        return next((offered for offered in domain.values if offered == value), value)
    if isinstance(domain, Interval) and value in domain:
        return domain.snap(value)
    return value


def _origin(recipe: RecipeSettings) -> str:
    return recipe.source if recipe.commit is None else f"{recipe.source} at {recipe.commit}"
