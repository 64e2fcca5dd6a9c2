"""The part of an arm's record that the decisions about a trial read.

A trial's point, its end by the pruner and the end of the search are decided from the trials that were
asked some places earlier, all of which have ended. The time at which a result arrives changes nothing,
so the same seed and number of workers give the same trials, in one run or in several.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any, cast

import optuna
from optuna.storages import BaseStorage
from optuna.trial import BaseTrial, FrozenTrial, TrialState

from sweeper.search.states import STATES

TURN = "turn"
"""User attribute of a trial: its place in the arm's order, and the number of places that it reads."""
CONTINUES = "continues"
"""User attribute of a trial that continues a cancelled one: the cancelled trial's number."""


def reach(workers: int) -> int:
    """Return how many places before a trial the newest trial lies that decisions about it read.

    With one worker every earlier trial is read. With as many places as workers, a worker would often
    wait for the oldest trial. Twice as many less one add at most 0.5 % to a study whose trials share a
    schedule (benchmarks/ordered_decisions.json), and the search learns that much later.
    """
    return 2 * workers - 1


@dataclass(frozen=True)
class TrialTurn:
    """A trial's turn in its arm's search."""

    place: int
    """Place in the order in which the arm's trials were asked. A continued trial keeps its place."""
    reads: int
    """Number of places, from the first on, whose trials decide about this one."""


ARRIVED = 0
"""The number of places with which a trial awaits no other and reads whatever has arrived."""


def turn_of(trial: BaseTrial | FrozenTrial) -> TrialTurn:
    """Return a trial's turn. A trial of an earlier version stands at its number and reads nothing."""
    place, reads = trial.user_attrs.get(TURN, (trial.number, 0))
    return TrialTurn(place, reads)


def _place_of(trial: FrozenTrial) -> int:
    turn = trial.user_attrs.get(TURN)
    return trial.number if turn is None else int(turn[0])


def next_turn(trials: Sequence[FrozenTrial], places: int) -> TrialTurn:
    """Return the turn of the next trial that is asked.

    Args:
        trials: all trials of the arm.
        places: see `reach`.
    """
    asked = [_place_of(trial) for trial in trials if trial.state is not TrialState.WAITING]
    place = max(asked, default=-1) + 1
    return TrialTurn(place, max(0, place - places + 1))


def read_by(turn: TrialTurn, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the ended trials that decisions at this turn read."""
    return [
        trial for trial in trials if trial.state.is_finished() and _place_of(trial) < turn.reads
    ]


def prefix_of(study: optuna.Study, turn: TrialTurn) -> optuna.Study:
    """Return the study as the decisions about a trial see it."""
    storage = cast(BaseStorage, PrefixStorage(study._storage, turn))
    return optuna.Study(study.study_name, storage, study.sampler, study.pruner)


class PrefixStorage:
    """A storage that shows the trials which decisions at one turn read, and passes everything else on.

    Trials at later places than the turn are left out. Those before it that it does not read are shown
    as running without results: that they were asked is known, how they end is not.

    The view of a turn whose read trials have all ended never changes, and is read once.
    """

    def __init__(self, storage: BaseStorage, turn: TrialTurn) -> None:
        # Samplers and pruners read all trials through the storage, so this is the one place to filter.
        self._storage = storage
        self._turn = turn
        self._final: dict[int, list[FrozenTrial]] = {}
        """Views that no longer change, by the study's id."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        """See BaseStorage."""
        shown = self._final.get(study_id)
        if shown is None:
            trials = self._storage.get_all_trials(study_id, deepcopy=False)
            shown = [seen for trial in trials if (seen := self._seen(trial)) is not None]
            if self._is_final(trials):
                self._final[study_id] = shown
        if states is not None:
            shown = [trial for trial in shown if trial.state in states]
        return copy.deepcopy(shown) if deepcopy else list(shown)

    def _seen(self, trial: FrozenTrial) -> FrozenTrial | None:
        """Return a trial as this turn's decisions see it, or None for one that they do not see."""
        place = _place_of(trial)
        if trial.state is TrialState.WAITING or place > self._turn.place or _superseded(trial):
            return None
        if place == self._turn.place:
            return _without_draws(trial)
        known = place < self._turn.reads and trial.state.is_finished()
        return trial if known else _as_running(trial)

    def _is_final(self, trials: Sequence[FrozenTrial]) -> bool:
        """Return True if every other trial that this turn reads has ended."""
        return all(
            trial.state.is_finished() or _place_of(trial) >= min(self._turn.reads, self._turn.place)
            for trial in trials
        )


def _superseded(trial: FrozenTrial) -> bool:
    """Return True for a cancelled trial: another one continues it at the same place."""
    if trial.state is not TrialState.FAIL:
        return False
    cause = trial.user_attrs.get("cause")
    return cause in STATES and STATES[cause].open


def _without_draws(trial: FrozenTrial) -> FrozenTrial:
    """Return a trial as it was before its first value, so that values drawn again are the same."""
    # the GP sampler would avoid the very point that an attempt before a kill had drawn
    blank = copy.copy(trial)
    blank.params, blank.distributions, blank.intermediate_values = {}, {}, {}
    blank.system_attrs = _fixed(trial)
    return blank


def _as_running(trial: FrozenTrial) -> FrozenTrial:
    """Return a trial as it was when it had its point and no result."""
    # a copy, because without deepcopy a storage hands out the trials of its cache
    running = copy.copy(trial)
    running.state = TrialState.RUNNING
    running.values = None
    running.datetime_complete = None
    running.intermediate_values = {}
    running.system_attrs = _fixed(trial)
    return running


def _fixed(trial: FrozenTrial) -> dict[str, Any]:
    # the other attributes are notes that samplers and pruners have made since the trial was asked
    return {key: value for key, value in trial.system_attrs.items() if key == "fixed_params"}
