"""Studies and nights of earlier versions get the digests of what is judged when they are opened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import pytest

from sweeper.config.settings import Objective
from sweeper.core.errors import StudyMismatch
from sweeper.core.input_digests import InputDigests
from sweeper.core.outcome import ArmBaseline
from sweeper.core.paths import StudyFolder
from sweeper.nightly.night_record import BestTrial, EntryDecision, EntryRecord, comparable
from sweeper.search.stored_defaults import with_stored_defaults
from sweeper.search.study import MEASURED, open_storage, open_study, require_same_settings
from sweeper.search.study_plan import StudyPlan, studies
from sweeper.search.warm_start import fork, winners
from tests.past.past import FAKE, FINISHED, SMALL

FOLDER = StudyFolder(Path("outputs/finished"))
TODAY = {"config_digest": "c", "judged_digest": "j", "trained_digest": "t"}


def _stored() -> optuna.Study:
    return optuna.load_study(study_name="finished/lora", storage=open_storage(None, FOLDER))


def _facts(**changes: Any) -> ArmBaseline:
    """The facts of the stored study as today's probe would find them."""
    found = ArmBaseline.model_validate(_stored().user_attrs["facts"])
    return found.model_copy(update={**TODAY, **changes})


def _finished_plan() -> StudyPlan:
    """The finished study's plan, with the defaults that it was started with."""
    (plan,) = studies(FINISHED)
    plan, _ = with_stored_defaults(plan, {"lora": _stored()}, open_storage(None, FOLDER))
    return plan


def _open(**changes: Any) -> optuna.Study:
    plan = _finished_plan()
    return open_study(plan, plan.arms[0], _facts(**changes), open_storage(None, FOLDER), "uuid")


def test_the_past_gets_its_identity_when_it_is_opened(past: Path) -> None:
    """The stored question lacks three parts, takes them over once, and compares them from then on."""
    before = _stored().user_attrs["question"]
    assert set(MEASURED) & set(before) == {"data digest", "base model digest"}
    after = _open().user_attrs["question"]
    added = {
        "judged rows digest": "j",
        "base configuration digest": "c",
        "computed dtype": "float32",
    }
    assert after == {**before, **added}
    _open(trained_digest="other")  # belongs to each trial, not to the question
    for name, words in (
        ("judged_digest", "judged rows digest: j then, x now (data.template=auto"),
        ("config_digest", "base configuration digest: c then, x now (model.base_model=embedded)"),
        ("dtype", "computed dtype: float32 then, x now"),
    ):
        with pytest.raises(StudyMismatch) as refused:
            _open(**{name: "x"})
        assert words in str(refused.value)
        assert _stored().user_attrs["question"] == after


def test_the_dtype_of_the_past_is_known(past: Path) -> None:
    """It stands in the stored facts, so another one is refused at once."""
    with pytest.raises(StudyMismatch, match="computed dtype: float32 then, bfloat16 now"):
        _open(dtype="bfloat16")


def test_another_template_shows_in_the_target_tokens_of_the_past(past: Path) -> None:
    """Equal texts with another number of target tokens were rendered by another template."""
    tokens = _facts().target_tokens
    with pytest.raises(StudyMismatch) as refused:
        _open(target_tokens=521)
    words = f"target tokens of the validation split: {tokens} then, 521 now (data.template=auto"
    assert words in str(refused.value)
    assert "judged rows digest" not in str(refused.value)
    assert "judged rows digest" not in _stored().user_attrs["question"]


def test_parts_that_need_a_worker_are_not_missed_before_one_runs(past: Path) -> None:
    """The first look at a study compares what its configuration says."""
    plan = _finished_plan()
    _open()
    require_same_settings(_stored(), plan, plan.arms[0])


def _fork_plan() -> StudyPlan:
    forked = ("hydra.sweeper.study_name=forked", "hydra.sweeper.fork_of=finished")
    (plan,) = studies([*FAKE, *SMALL, *forked])
    storage = open_storage(None, StudyFolder(Path("outputs/forked")))
    plan, _ = with_stored_defaults(plan, {}, storage)
    return plan


@pytest.mark.parametrize(
    ("opened", "changes", "words"),
    [
        (False, {}, None),
        pytest.param(True, {}, None, marks=pytest.mark.slow),
        (True, {"judged_digest": "x"}, "judged rows digest: j then, x now"),
        (False, {"target_tokens": 521}, "target tokens of the validation split: "),
        pytest.param(
            *(False, {"dtype": "bfloat16"}, "computed dtype: float32 then, bfloat16 now"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_fork_needs_the_same_judged_rows(
    past: Path, opened: bool, changes: dict[str, Any], words: str | None
) -> None:
    """A fork of the past follows the rule of a resumed study."""
    if opened:
        _open()
    plan = _fork_plan()
    storage, facts = open_storage(None, StudyFolder(Path("outputs/forked"))), _facts(**changes)
    study = open_study(plan, plan.arms[0], facts, storage, "uuid")
    if words is None:
        assert fork(study, plan, plan.arms[0], facts, storage)
        return
    with pytest.raises(StudyMismatch, match=words):
        fork(study, plan, plan.arms[0], facts, storage)


def test_a_warm_start_takes_points_of_other_judged_rows(past: Path) -> None:
    """Only its points are used, and no value of it is compared."""
    _open()
    (plan,) = studies([*FAKE, *SMALL, "hydra.sweeper.warm_start=[finished]"])
    storage = open_storage(None, StudyFolder(Path("outputs/warm")))
    draws, _ = winners(plan, plan.arms[0], _facts(judged_digest="x"), storage)
    assert len(draws) == 1


def _night(identity: dict[str, str], inputs: InputDigests | None) -> EntryRecord:
    objective = Objective(metric="eval/loss", direction="minimize", pruning_metric=None)
    best = BestTrial(
        **{"arm": "lora", "number": 0, "value": 1.0, "base_value": 2.0, "point": {}},
        objective=objective,
        inputs=inputs,
    )
    parts = {"lora: objective.metric": '"eval/loss"', **identity}
    decided = EntryDecision(
        **{"choice": "new", "reason": "", "study_name": "s", "identity": parts, "n_trials": 1},
        warm_start=(),
        ended_before={},
        seconds_before=0.0,
    )
    return EntryRecord(name="e", experiment="e", policy="fresh", decided=decided, best=best)


JUDGED = InputDigests(data="d", base="b", config="c", judged="j", trained="t")


@pytest.mark.parametrize(
    ("then", "now", "same"),
    [
        (JUDGED, JUDGED.updated(InputDigests(data="x", trained="x")), True),
        (JUDGED, JUDGED.updated(InputDigests(judged="x")), False),
        (JUDGED, JUDGED.updated(InputDigests(base="x")), False),
        (JUDGED, JUDGED.updated(InputDigests(config="x")), False),
    ],
)
def test_nights_compare_by_what_they_judged(
    then: InputDigests, now: InputDigests, same: bool
) -> None:
    """Other training rows are comparable, other judged rows and another base are not."""
    last, entry = ({"lora: data digest": text} for text in ("then", "now"))
    assert comparable(_night(entry, now), _night(last, then)) is same


def test_nights_of_earlier_versions_compare_by_the_parts_they_stored() -> None:
    """A night without digests is compared by its data, its base model and its metric."""
    then, other = {"lora: data digest": "d"}, {"lora: data digest": "x"}
    assert comparable(_night(then, JUDGED), _night(then, None))
    assert not comparable(_night(other, JUDGED), _night(then, None))
    stored = json.loads(_night(then, None).model_dump_json())
    del stored["best"]["inputs"]
    assert EntryRecord.model_validate(stored) == _night(then, None)
