"""What the decisions about a trial read of an arm's record, and how often it is read."""

from __future__ import annotations

from collections.abc import Container

import optuna
import pytest
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from sweeper.search.study import ask

optuna.logging.set_verbosity(optuna.logging.WARNING)


class CountingStorage(InMemoryStorage):
    """Optuna's storage in memory that counts how often it is read as a whole."""

    reads = 0

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        """See BaseStorage."""
        self.reads += 1
        return super().get_all_trials(study_id, deepcopy, states)


@pytest.fixture
def study() -> optuna.Study:
    """A study of five trials that have ended."""
    study = optuna.create_study(storage=CountingStorage())
    for value in range(5):
        study.tell(_asked(study, 1).number, float(value))
    return study


def _asked(study: optuna.Study, places: int) -> Trial:
    trial = ask(study, places)
    trial.suggest_float("x", 0.0, 1.0)
    return trial


def _seen(trial: Trial) -> dict[int, float | None]:
    return {other.number: other.value for other in trial.study.get_trials()}


def test_a_record_that_has_ended_is_read_once(study: optuna.Study) -> None:
    """Each look of a trial asks its pruner, which reads the record: a database would be asked again."""
    trial = _asked(study, 1)
    first = _seen(trial)
    storage = study._storage
    assert isinstance(storage, CountingStorage)
    before = storage.reads
    assert _seen(trial) == first == {**dict(enumerate(range(5))), 5: None}
    assert storage.reads == before


def test_a_result_that_a_turn_reads_is_seen_when_it_arrives(study: optuna.Study) -> None:
    """With arrived results read (reproducible=false) a view changes until all of them are there."""
    first, second = _asked(study, 0), _asked(study, 0)
    assert _seen(second)[first.number] is None
    study.tell(first.number, 7.0)
    assert _seen(second)[first.number] == 7.0


def test_a_result_that_a_turn_does_not_read_stays_hidden(study: optuna.Study) -> None:
    """Its arrival is a matter of time."""
    first, second = _asked(study, 3), _asked(study, 3)
    assert _seen(second)[first.number] is None
    study.tell(first.number, 7.0)
    assert _seen(second)[first.number] is None


def test_what_a_reader_changes_stays_its_own(study: optuna.Study) -> None:
    """A deep copy is asked for to be changed."""
    trial = _asked(study, 1)
    trial.study.get_trials()[0].user_attrs["mine"] = True
    trial.study.get_trials(deepcopy=False).clear()
    assert "mine" not in trial.study.get_trials()[0].user_attrs
    assert len(trial.study.get_trials()) == 6
