"""Points that a user requests while a study runs: read, validated and queued."""

from __future__ import annotations

from collections.abc import Mapping

import optuna
from optuna.trial import FrozenTrial, TrialState

from sweeper.config.grammar import parse_domain
from sweeper.config.space import (
    Branches,
    Choice,
    Domain,
    Draw,
    Interval,
    Point,
    Scalar,
    Space,
    keys,
    locate,
)
from sweeper.core.errors import CommandRefused
from sweeper.search.study import QUEUED_BY, draw_of, is_taken, point_of
from sweeper.search.study_plan import ArmPlan


def read_draw(arm: ArmPlan, values: Mapping[str, str], before: Point | None = None) -> Draw:
    """Return the draw that leads to the given values, with an earlier point's values as defaults.

    Raises:
        CommandRefused: a key is not searched, or a value lies outside its domain. The message lists
            what is valid.
    """
    if not values and before is None:
        raise CommandRefused(f"give at least one KEY=VALUE. Searched keys:\n{_valid(arm.space)}")
    searched = keys(arm.space, labels=True)
    unknown = [key for key in values if key not in searched]
    if unknown:
        raise CommandRefused(
            f"{', '.join(unknown)}: not searched in arm {arm.name}. Searched keys:\n"
            + _valid(arm.space)
        )
    given = {key: _read(key, text, arm.space.get(key)) for key, text in values.items()}
    draw = locate(arm.space, {**(before or {}), **given})
    if draw is None:
        raise CommandRefused(
            f"no branch of the space takes these values together:\n{_valid(arm.space)}"
        )
    return draw


def earlier_point(study: optuna.Study, arm: ArmPlan, number: int) -> Point:
    """Return the point of an earlier trial.

    Raises:
        CommandRefused: there is no such trial, or its point is not drawn yet.
    """
    trials = study.get_trials(deepcopy=False)
    if number >= len(trials):
        count = f"trials 0 to {len(trials) - 1}" if trials else "no trial yet"
        raise CommandRefused(f"arm {arm.name} has no trial {number}. It has {count}")
    point = point_of(trials[number])
    if not point:
        raise CommandRefused(
            f"trial {number} of arm {arm.name} waits in the queue: it has no point yet"
        )
    return point


def queue(study: optuna.Study, draw: Draw, identity: str, attributes: Mapping[str, Scalar]) -> None:
    """Queue a draw as the arm's next trial. A repeated command queues nothing twice.

    Raises:
        CommandRefused: the same point was tried, is running, or is queued.
    """
    trials = study.get_trials(deepcopy=False)
    if any(trial.user_attrs.get(QUEUED_BY) == identity for trial in trials):
        return  # killed between doing it and saying so
    duplicate = next(
        (trial for trial in trials if is_taken(trial) and draw_of(trial) == draw), None
    )
    if duplicate is not None:
        raise CommandRefused(f"this very point {_fate(duplicate)}")
    study.enqueue_trial(draw, user_attrs={QUEUED_BY: identity, **attributes})


def _read(key: str, text: str, domain: Domain | Branches | None) -> Scalar:
    """Read one value. Keys inside branches are validated once the branch is known."""
    try:
        value = parse_domain(key, text)
    except ValueError as error:
        raise CommandRefused(f"{key}: {error}") from None
    if isinstance(value, Choice | Interval):
        raise CommandRefused(f"{key}={text}: one value, not a range of them")
    checked = domain.choice if isinstance(domain, Branches) else domain
    if checked is not None and value not in checked:
        raise CommandRefused(f"{key}={text}: not in {checked}")
    whole = isinstance(value, int) and not isinstance(value, bool)
    if whole and isinstance(checked, Interval) and not checked.integer:
        return float(value)  # type: ignore[arg-type]  # `whole` says so
    return value


def _valid(space: Space) -> str:
    return "\n".join(f"    {key}={domain}" for key, domain in space.items())


def _fate(trial: FrozenTrial) -> str:
    match trial.state:
        case TrialState.WAITING:
            return "waits in the queue already"
        case TrialState.RUNNING:
            return f"is being trained as trial {trial.number}"
        case _:
            value = f", {trial.values[0]:.4f}" if trial.values else ""
            return f"was tried as trial {trial.number}: {trial.user_attrs.get('cause')}{value}"
