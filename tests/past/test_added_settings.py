"""A setting that an earlier version did not have is read as the value that changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import optuna
import pytest

from sweeper.config import added_settings
from sweeper.config.added_settings import ADDED_SETTINGS, EARLIER_DEFAULTS, kept_defaults
from sweeper.config.compose import compose, read_yaml, to_yaml
from sweeper.config.settings import TrialSettings, changed_parts, flatten, stored_settings, validate
from sweeper.core.errors import ConfigError, StudyMismatch
from sweeper.core.outcome import ArmBaseline
from sweeper.core.paths import NightsFolder, StudyFolder
from sweeper.nightly.entry_decision import decide
from sweeper.nightly.night_record import NightRecord, comparable, read_record, write_record
from sweeper.nightly.nightly_set import load_set
from sweeper.search.stored_defaults import with_stored_defaults
from sweeper.search.study import open_storage, open_study
from sweeper.search.study_plan import StudyPlan, studies
from sweeper.search.warm_start import fork
from tests.past.past import FAKE, FINISHED, FIRST_NIGHT, MODEL, SET, SMALL

ADDED = "adapter.trainable_parameters"
"""Stands in the table, and in the questions of arms with an adapter."""
OTHER = "training.optim"
"""Stands in every question, and not in the table."""
IGNORED = "data.ignore_columns"
"""May be set when a later version refuses a column that changes no row."""
FOLDER = StudyFolder(Path("outputs/finished"))
SHORTER = {"training.eval_steps": "0.125"}


def _open(plan: StudyPlan, alter: Callable[[dict[str, str]], object]) -> list[optuna.Study]:
    """Every arm of the finished study, opened after its stored question was altered."""
    storage = open_storage(None, FOLDER)
    opened, studies = [], {}
    for arm in plan.arms:
        stored = optuna.load_study(study_name=f"finished/{arm.name}", storage=storage)
        question = dict(stored.user_attrs["question"])
        alter(question)
        stored.set_user_attr("question", question)
        studies[arm.name] = stored
    plan, _ = with_stored_defaults(plan, studies, storage)
    for arm in plan.arms:
        stored = studies[arm.name]
        facts = ArmBaseline.model_validate(stored.user_attrs["facts"])
        opened.append(open_study(plan, arm, facts, storage, "uuid"))
    return opened


def test_a_question_without_an_added_setting_is_the_same_question(past: Path) -> None:
    """Both arms of the past are resumed where the stored question lacks a key of the table."""
    (plan,) = studies(FINISHED)
    lora, full = _open(plan, lambda question: question.pop(ADDED, None))
    assert (len(lora.trials), len(full.trials)) == (8, 2)


def test_a_question_without_another_setting_is_another_question(past: Path) -> None:
    """A key that is in no table is named, with what it is now."""
    (plan,) = studies(FINISHED)
    with pytest.raises(StudyMismatch) as refusal:
        _open(plan, lambda question: question.pop(OTHER))
    assert f'{OTHER}: absent then, "adamw_torch" now' in str(refusal.value)


def test_an_added_setting_that_is_used_makes_another_question(past: Path) -> None:
    """The old study had the value of the table, not today's."""
    (plan,) = studies([*FINISHED, "adapter.r=null", f"{ADDED}=5000"])
    with pytest.raises(StudyMismatch) as refusal:
        _open(plan, lambda question: question.pop(ADDED, None))
    assert f"{ADDED}: null then, 5000 now" in str(refusal.value)


def test_a_stored_study_keeps_the_defaults_that_it_was_started_with(past: Path) -> None:
    """Its looks are at the whole split, all of them, and at its rungs; each is named."""
    (plan,) = studies(FINISHED)
    assert (plan.settings.evaluation.look_rows, plan.settings.training.eval_delay) == (96, 0.25)
    kept, notes = _kept(plan)
    for arm in kept.arms:
        assert arm.settings.evaluation.look_rows is None
        assert arm.settings.training.eval_delay == 0
        assert arm.settings_at({}).evaluation.look_rows is None
    assert kept.study.pruner.rungs == [350, 500, 650, 800]
    assert "arm lora keeps evaluation.look_rows=null, training.eval_delay=0.0" in notes[0]
    assert "the pruner keeps rungs=[350, 500, 650, 800]" in notes[-1]


@pytest.mark.slow
def test_a_value_that_the_command_line_names_is_not_kept(past: Path) -> None:
    """The user's value makes another question, and its own rungs another pruner."""
    (plan,) = studies([*FINISHED, "evaluation.look_rows=64", "hydra.sweeper.pruner.rungs=[500]"])
    kept, _ = _kept(plan)
    assert {arm.settings.evaluation.look_rows for arm in kept.arms} == {64}
    assert kept.study.pruner.rungs == [500]
    with pytest.raises(StudyMismatch, match=r"evaluation\.look_rows: null then, 64 now"):
        _open(plan, lambda question: None)


def _kept(plan: StudyPlan) -> tuple[StudyPlan, list[str]]:
    storage = open_storage(None, FOLDER)
    stored = {
        arm.name: optuna.load_study(study_name=f"finished/{arm.name}", storage=storage)
        for arm in plan.arms
    }
    return with_stored_defaults(plan, stored, storage)


@pytest.mark.parametrize(
    ("before", "now", "named", "kept"),
    [
        ({}, {"training.eval_delay": "0.25"}, [], {"training.eval_delay": "0.0"}),
        ({}, {"training.eval_delay": "0.25"}, ["training.eval_delay"], {}),
        (
            {"training.eval_steps": "0.1"},
            {"training.eval_steps": "0.125"},
            [],
            {"training.eval_steps": "0.1"},
        ),
        ({"training.eval_steps": "0.2"}, SHORTER, [], {}),
        (
            {"evaluation.max_samples": "500"},
            {"evaluation.look_rows": "96"},
            [],
            {"evaluation.look_rows": "500"},
        ),
        ({"evaluation.look_rows": "96"}, {"evaluation.look_rows": "96"}, [], {}),
    ],
)
def test_only_earlier_defaults_are_kept(
    before: Mapping[str, str], now: Mapping[str, str], named: list[str], kept: Mapping[str, str]
) -> None:
    """A value that was no default, or that the user names, is compared as ever."""
    assert kept_defaults(before, now, named) == kept


@pytest.mark.parametrize(
    ("before", "now", "changed"),
    [
        ({"lora: evaluation.max_samples": "5"}, {"lora: evaluation.look_rows": "5"}, []),
        ({"evaluation.max_samples": "5"}, {"evaluation.look_rows": "6"}, ["evaluation.look_rows"]),
        ({}, {"training.fsdp": "false"}, []),
        ({}, {"training.fsdp": "true"}, ["training.fsdp"]),
        ({"training.fsdp": "true"}, {"training.fsdp": "false"}, ["training.fsdp"]),
        ({}, {"lora: training.fsdp": "false", "full: training.fsdp": "false"}, []),
        ({}, {"lora: training.fsdp": "true"}, ["lora: training.fsdp"]),
        ({}, {"space training.fsdp": "choice(true, false)"}, ["space training.fsdp"]),
        ({"training.fsdp": "false"}, {}, ["training.fsdp"]),
        ({}, {IGNORED: '["document"]'}, []),
        ({f"lora: {IGNORED}": "[]"}, {f"lora: {IGNORED}": '["document"]'}, []),
        ({IGNORED: '["document"]'}, {IGNORED: "[]"}, [IGNORED]),
        ({}, {OTHER: "1"}, [OTHER]),
    ],
)
def test_parts_are_compared_by_what_they_meant(
    before: Mapping[str, str], now: Mapping[str, str], changed: list[str]
) -> None:
    """An absent part equals the table's value in a study and in a night, and nothing else."""
    assert changed_parts(before, now) == changed


@pytest.mark.parametrize("key", ADDED_SETTINGS)
def test_the_table_names_settings_and_their_defaults(key: str) -> None:
    """Each line is a setting of a trial, with its default or the default that it had before."""
    config = validate(TrialSettings, _trial(compose([]).config)).model_dump(mode="json")
    assert key in flatten(config)
    earlier = EARLIER_DEFAULTS.get(key, (flatten(config)[key],))
    assert ADDED_SETTINGS[key] in earlier


def _trial(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: config[name] for name in TrialSettings.model_fields if name in config}


@pytest.mark.parametrize("arm", ["lora", "full"])
def test_a_trials_config_without_added_settings_is_read(past: Path, arm: str) -> None:
    """Both kinds of adapter are filled with the keys that they have, and with no other."""
    path = FOLDER.trial(arm, 0).config
    whole = stored_settings(read_yaml(path))
    config = read_yaml(path)
    _without(config, ADDED_SETTINGS)
    assert config != read_yaml(path)
    assert stored_settings(config) == whole


def test_a_trials_config_without_another_setting_is_refused(past: Path) -> None:
    """The missing key is named, and none of those that the table fills in."""
    config = read_yaml(FOLDER.trial("lora", 0).config)
    _without(config, [*ADDED_SETTINGS, OTHER])
    with pytest.raises(ConfigError) as refusal:
        stored_settings(config)
    assert refusal.value.problems == (f"{OTHER}: missing",)


def _without(config: dict[str, Any], keys: Any) -> None:
    for key in keys:
        section, _, name = key.rpartition(".")
        (config[section] if section else config).pop(name, None)


def test_every_config_of_the_past_is_read(past: Path) -> None:
    """Settings that a version dropped or added do not lock users out of their adapters."""
    found = sorted(past.glob("outputs/**/config.yaml"))
    assert len(found) > 20
    for path in found:
        assert stored_settings(read_yaml(path)).seed in (0, 1, 2)


def test_a_fork_adopts_trials_without_added_settings(
    past: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trials whose config.yaml lacks a key of the table are as valid answers as before."""
    added = {**ADDED_SETTINGS, OTHER: "adamw_torch"}
    monkeypatch.setattr(added_settings, "ADDED_SETTINGS", added)
    for path in past.glob("outputs/finished/lora/trial_*/config.yaml"):
        config = read_yaml(path)
        _without(config, added)
        path.write_text(to_yaml(config), encoding="utf-8")
    forked = ("hydra.sweeper.study_name=forked", "hydra.sweeper.fork_of=finished")
    (plan,) = studies([*FAKE, *SMALL, *forked])
    storage = open_storage(None, StudyFolder(Path("outputs/forked")))
    plan, _ = with_stored_defaults(plan, {}, storage)
    stored = optuna.load_study(study_name="finished/lora", storage=open_storage(None, FOLDER))
    facts = ArmBaseline.model_validate(stored.user_attrs["facts"])
    study = open_study(plan, plan.arms[0], facts, storage, "uuid")
    words = fork(study, plan, plan.arms[0], facts, storage)
    assert words == ["fork of finished: 8 of its 8 trials fit this study"]


def _alter_night(keys: Any) -> NightRecord:
    """Take keys out of the identity that the first night stored."""
    folder = NightsFolder.under(Path("outputs")).night(SET, FIRST_NIGHT.date().isoformat())
    record = read_record(folder)
    assert record is not None
    entry = record.entries[MODEL]
    assert entry.decided is not None
    identity = {
        part: text
        for part, text in entry.decided.identity.items()
        if part.rpartition(": ")[2] not in keys
    }
    assert identity != entry.decided.identity
    decided = entry.decided.model_copy(update={"identity": identity})
    altered = record.with_entry(entry.model_copy(update={"decided": decided}))
    write_record(folder, altered)
    return altered


@pytest.mark.parametrize(
    ("keys", "choice", "reason"),
    [([ADDED], "continue", "nothing changed"), ([OTHER], "new", f"changed: lora: {OTHER}")],
)
def test_a_night_without_an_added_setting_is_continued(
    past: Path, keys: list[str], choice: str, reason: str
) -> None:
    """The next night continues it; a key that is in no table begins a new study and is named."""
    loaded = load_set(SET)
    (entry,) = loaded.settings.experiments
    on = (FIRST_NIGHT + timedelta(days=1)).date()
    decided = decide(loaded, entry, on, [_alter_night(keys)])
    assert (decided.choice, decided.reason) == (choice, reason)


def test_nights_compare_where_an_added_setting_is_judged_on(
    past: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values of two nights mean the same if what they were judged on is absent and in the table."""
    key = "evaluation.max_samples"
    folder = NightsFolder.under(Path("outputs")).night(SET, FIRST_NIGHT.date().isoformat())
    whole = read_record(folder)
    assert whole is not None
    without = _alter_night([key]).entries[MODEL]
    assert not comparable(whole.entries[MODEL], without)
    text = json.loads(whole.entries[MODEL].decided.identity[f"lora: {key}"])  # type: ignore[union-attr]
    monkeypatch.setattr(added_settings, "ADDED_SETTINGS", {"evaluation.look_rows": text})
    assert comparable(whole.entries[MODEL], without)
