"""Reuse of earlier studies: their winners as first points, or all of their trials that fit (a fork).

The earlier study is read from the same output_dir, or the same storage URL, and never changed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FixedTrial, FrozenTrial, TrialState, create_trial

from sweeper.config import compose, grammar
from sweeper.config.settings import flatten, stored_text
from sweeper.config.space import Draw, Point, keys, locate
from sweeper.core.errors import StudyMismatch
from sweeper.core.outcome import ArmBaseline
from sweeper.core.paths import StudyFolder
from sweeper.search.states import STATES
from sweeper.search.study import (
    MARGIN,
    MEASURED,
    completed_questions,
    open_storage,
    optuna_name,
    point_of,
    question,
    require_readable,
    settings_as_json,
    suggest,
)
from sweeper.search.study_plan import ArmPlan, StudyPlan
from sweeper.search.telling import counts

SAME = ("objective.metric", "objective.direction", "costs", *MEASURED)
"""Parts of the question in which a study and the study it forks must agree."""
RUNG = "completed_rung_"
"""Prefix of Optuna's attribute for a trial's value at a rung. The rung's number follows."""


def winners(
    plan: StudyPlan, arm: ArmPlan, facts: ArmBaseline, storage: BaseStorage
) -> tuple[list[Draw], list[str]]:
    """Return the best point of each study in `warm_start` that lies in this arm's space.

    Returns:
        The draws to try first, and one message about each study.
    """
    draws: list[Draw] = []
    words: list[str] = []
    for name in plan.study.warm_start:
        draw, reason = _winner(plan, arm, facts, storage, name)
        words.append(f"warm start from {name}: {reason}")
        if draw:
            draws.append(draw)
    return draws, words


def _winner(
    plan: StudyPlan, arm: ArmPlan, facts: ArmBaseline, storage: BaseStorage, name: str
) -> tuple[Draw | None, str]:
    study = _earlier(plan, arm, storage, name)
    if study is None:
        return None, f"it has no arm {arm.name}, ignored"
    if study.user_attrs["facts"]["base_digest"] != facts.base_digest:
        return None, "it trained another base model, ignored"
    best = _best(study)
    if best is None:
        return None, "no trial of it has finished, ignored"
    point = point_of(best)
    searched = keys(arm.space, labels=True)
    known = {key: value for key, value in point.items() if key in searched}
    draw = locate(arm.space, known)
    if not draw:
        return None, f"its best point {_in_words(point)} lies outside this space, ignored"
    missing = {key: value for key, value in point.items() if key not in searched}
    left_out = f" (not searched here: {_in_words(missing)})" if missing else ""
    return draw, f"its best point {_in_words(known)} is tried first{left_out}"


def _best(study: optuna.Study) -> FrozenTrial | None:
    """Return the trial with the best first objective among those that ran to their own end."""
    done = [
        trial
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if (cause := trial.user_attrs.get("cause")) in STATES and STATES[cause].complete
    ]
    # the objective stands before the costs
    best = max if study.directions[0] is optuna.study.StudyDirection.MAXIMIZE else min
    return best(done, key=lambda trial: trial.values[0]) if done else None


def fork(
    study: optuna.Study, plan: StudyPlan, arm: ArmPlan, facts: ArmBaseline, storage: BaseStorage
) -> list[str]:
    """Copy the finished trials of the study `fork_of` that answer this question too.

    A trial fits if the settings it was trained with equal this arm's where those are fixed, and lie
    in this arm's space where they are searched. A copy carries the user attribute `forked_from`,
    and its folder is a link to the original. A repeated call copies nothing twice.

    Raises:
        StudyMismatch: there is no such study, or its objective, data or base model differ.
    """
    name = plan.study.fork_of
    if name is None:
        return []
    old = _earlier(plan, arm, storage, name)
    if old is None and not _arms(plan, storage, name):
        raise StudyMismatch(f"fork_of={name}: there is no such study")
    if old is None:
        return [f"fork of {name}: it has no such arm"]
    _check_same(old, plan, arm, facts)
    # The copied values were known when the fork was planned, so its own margin would prove nothing.
    study.set_user_attr(MARGIN, old.user_attrs.get(MARGIN))
    adopted = {trial.user_attrs.get("forked_from") for trial in study.get_trials(deepcopy=False)}
    done = [trial for trial in old.get_trials(deepcopy=False) if counts(trial)]
    fitting = list(_fitting(done, _folder(plan, name), arm))
    for trial, point, draw in fitting:
        origin = f"{name}/{arm.name}/{trial.number:04d}"
        if origin not in adopted:
            passed = _passed(trial, plan.study.pruner.rungs)
            _copy_trial(study, arm, trial, point, draw, origin, passed)
            number = len(study.get_trials(deepcopy=False)) - 1
            new = _folder(plan, plan.study.study_name).trial(arm.name, number).path
            _link(new, _folder(plan, name).trial(arm.name, trial.number).path)
    return [f"fork of {name}: {len(fitting)} of its {len(done)} trials fit this study"]


def _fitting(
    trials: list[FrozenTrial], folder: StudyFolder, arm: ArmPlan
) -> Iterator[tuple[FrozenTrial, Point, Draw]]:
    """Yield the trials that this arm could have made itself, with their draw in its space."""
    unsearched = settings_as_json(arm)
    searched = keys(arm.space)
    groups = {key for key in searched if "." not in key}
    for trial in trials:
        config = folder.trial(arm.name, trial.number).config
        if not config.exists():
            continue
        settings = flatten(compose.read_yaml(config)) | _as_asked(trial)
        known = {key: grammar.scalar(settings[key]) for key in searched if key in settings}
        draw = locate(arm.space, {**known, **point_of(trial)})
        point = _complete(arm, draw)
        if draw is None or point is None:
            continue
        decided = {*point, *groups}
        open_keys = [key for key in unsearched if decided.isdisjoint((key, key.split(".")[0]))]
        texts = {key: json.dumps(value) for key, value in settings.items()}
        if all(stored_text(texts, key) == unsearched[key] for key in open_keys):
            yield trial, point, draw


def _as_asked(trial: FrozenTrial) -> dict[str, Any]:
    """Replace a rank that was derived for a trial by the setting it was derived from."""
    sized = trial.user_attrs.get("sized")
    if sized is None:
        return {}
    return {"adapter.r": None, "adapter.trainable_parameters": sized["trainable_parameters"]}


def _complete(arm: ArmPlan, draw: Draw | None) -> Point | None:
    """Return the point of a draw, or None if a parameter is left open."""
    if draw is None:
        return None
    try:
        return suggest(FixedTrial(draw), arm.space)
    except ValueError:  # FixedTrial's word for a parameter without a value
        return None


def _passed(trial: FrozenTrial, rungs: Sequence[int]) -> dict[str, Any]:
    """Return the attributes that Optuna's successive halving compares by, for this pruner's rungs.

    The pruner is not part of the question, so a fork may have rungs at other points of the
    schedule.
    """
    noted = {key: value for key, value in trial.system_attrs.items() if key.startswith(RUNG)}
    if not rungs:
        return noted
    known = [f"{RUNG}{n}" for n, rung in enumerate(rungs) if rung in trial.intermediate_values]
    return {key: noted[key] for key in known if key in noted}


def _copy_trial(
    study: optuna.Study,
    arm: ArmPlan,
    trial: FrozenTrial,
    point: Point,
    draw: Draw,
    origin: str,
    passed: dict[str, Any],
) -> None:
    fixed = FixedTrial(draw)
    suggest(fixed, arm.space)
    study.add_trial(
        create_trial(
            state=trial.state,
            values=trial.values,
            params=fixed.params,
            distributions=fixed.distributions,
            user_attrs={**trial.user_attrs, "point": point, "forked_from": origin},
            system_attrs=passed,
            intermediate_values=trial.intermediate_values,
            constraints=trial.constraints,
        )
    )


def _link(new: Path, old: Path) -> None:
    new.parent.mkdir(parents=True, exist_ok=True)
    if not new.exists():
        # relative, so that the link holds where output_dir is moved or mounted elsewhere
        new.symlink_to(os.path.relpath(old, new.parent), target_is_directory=True)


# Spaces may differ in a fork, but not the parts that make values comparable.
def _check_same(old: optuna.Study, plan: StudyPlan, arm: ArmPlan, facts: ArmBaseline) -> None:
    before, now = completed_questions(old, question(plan, arm, facts), facts)
    then = {key: stored_text(before, key) for key in SAME}
    changed = [
        f"    {key}: {then[key]} then, {now.get(key)} now"
        for key in SAME
        if then[key] != now.get(key)
    ]
    if changed:
        raise StudyMismatch(
            f"study {plan.study.fork_of!r} cannot be forked: its results do not compare with this "
            "study's:\n" + "\n".join(changed)
        )


def forked_study(plan: StudyPlan, arm: ArmPlan, storage: BaseStorage) -> optuna.Study | None:
    """Return the arm of the study that a plan forks, or None if it forks none or the arm is absent."""
    name = plan.study.fork_of
    return None if name is None else _earlier(plan, arm, storage, name)


def _earlier(plan: StudyPlan, arm: ArmPlan, storage: BaseStorage, name: str) -> optuna.Study | None:
    """Return an arm of an earlier study, or None if it was never opened."""
    if arm.name not in _arms(plan, storage, name):
        return None
    study = optuna.load_study(
        study_name=optuna_name(name, arm.name), storage=_storage(plan, storage, name)
    )
    require_readable(study)
    # an arm whose probe was never answered has no facts
    return study if "facts" in study.user_attrs else None


def _arms(plan: StudyPlan, storage: BaseStorage, name: str) -> set[str]:
    """Return the names of the arms that an earlier study has."""
    if plan.study.storage is None and not _folder(plan, name).database.exists():
        return set()
    names = optuna.get_all_study_names(_storage(plan, storage, name))
    prefix = optuna_name(name, "")
    return {each.removeprefix(prefix) for each in names if each.startswith(prefix)}


def _storage(plan: StudyPlan, storage: BaseStorage, name: str) -> BaseStorage:
    """Return the storage of an earlier study: the shared one, or the database in its own folder."""
    return storage if plan.study.storage is not None else open_storage(None, _folder(plan, name))


def _folder(plan: StudyPlan, name: str) -> StudyFolder:
    return StudyFolder(Path(plan.settings.output_dir) / name)


def _in_words(point: Point) -> str:
    return ", ".join(f"{key}={value}" for key, value in point.items())
