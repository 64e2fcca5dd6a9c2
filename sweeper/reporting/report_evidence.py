"""Evidence: what a report shows beyond results.json, read from the trials' folders and the study.

Everything here may be missing (a folder that was cleaned up, a fake trainer, a database elsewhere);
what is missing is None or empty, and the page says so.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from sweeper.core.paths import StudyFolder
from sweeper.core.spool import read_spool
from sweeper.evaluation.sample_answers import SampleAnswer
from sweeper.reporting.results import ArmResult, StudyResults
from sweeper.search.study import open_storage, optuna_name

Curve = tuple[tuple[int, float], ...]
"""Optimiser step and eval/loss."""

EVALUATOR = "PED-ANOVA (optuna.importance)"
FEWEST_TRIALS = 6
"""With a result; below that no share is worth a bar."""
ABOVE_TARGET = 5
"""Trials that Optuna's documentation wants above PED-ANOVA's target quantile."""


@dataclass(frozen=True)
class ReportEvidence:
    """What was read of one study."""

    curves: Mapping[tuple[str, int], Curve] = field(default_factory=dict)
    """By arm and trial number."""
    samples: Mapping[str, tuple[SampleAnswer, ...]] = field(default_factory=dict)
    """The qualitative prompts, answered by the best trial of each arm."""
    data_card: str | None = None
    """Markdown."""
    importances: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By arm and key; sums to one. Arms without enough trials or without a choice are left out."""


def gather(
    results: StudyResults, folder: StudyFolder, storage: optuna.storages.BaseStorage | None = None
) -> ReportEvidence:
    """Read what there is of a study.

    Args:
        results: which trials there are.
        folder: the study's.
        storage: Optuna's; without one the database in the study's folder, if it is there.
    """
    if storage is None and folder.database.exists():
        storage = open_storage(None, folder)
    curves = {
        (arm.name, trial.number): curve
        for arm in results.arms
        for trial in arm.trials
        if (curve := read_curve(folder.trial(arm.name, trial.number).metrics))
    }
    return ReportEvidence(
        curves,
        {arm.name: read_samples(folder, arm) for arm in results.arms},
        _data_card(results, folder),
        {} if storage is None else _importances(results, storage),
    )


def read_curve(path: Path) -> Curve:
    """The evaluations of a trial."""
    rows = (row for row in read_spool(path) if "eval/loss" in row)
    return tuple((int(row["step"]), float(row["eval/loss"])) for row in rows)


def read_samples(folder: StudyFolder, arm: ArmResult) -> tuple[SampleAnswer, ...]:
    """The answers of an arm's best trial."""
    if arm.best is None:
        return ()
    path = folder.trial(arm.name, arm.best.number).samples.with_suffix(".json")
    if not path.exists():
        return ()
    return tuple(SampleAnswer(**row) for row in json.loads(path.read_text(encoding="utf-8")))


def importances(study: optuna.Study) -> dict[str, float]:
    """How much of the chance to be among the best each parameter decides; empty for too few trials.

    The target quantile is one tenth (Optuna's default), or as much more as puts five trials above it,
    but no more than one half.
    """
    count = len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
    if count < FEWEST_TRIALS:
        return {}
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(
        target_quantile=min(0.5, max(0.1, ABOVE_TARGET / count))
    )
    with warnings.catch_warnings():  # it warns whoever names a target that low must be good
        warnings.simplefilter("ignore", UserWarning)
        found = optuna.importance.get_param_importances(
            study, evaluator=evaluator, target=_first_value(study)
        )
    return dict(found) if len(found) > 1 else {}


def _first_value(study: optuna.Study) -> Callable[[FrozenTrial], float] | None:
    """The objective among several values, lower being better; None where it is the only one."""
    if len(study.directions) == 1:
        return None
    sign = -1.0 if study.directions[0] is StudyDirection.MAXIMIZE else 1.0
    return lambda trial: sign * trial.values[0]


def _importances(
    results: StudyResults, storage: optuna.storages.BaseStorage
) -> dict[str, dict[str, float]]:
    there = optuna.get_all_study_names(storage)
    names = {arm.name: optuna_name(results.study_name, arm.name) for arm in results.arms}
    found = {
        arm: importances(optuna.load_study(study_name=name, storage=storage))
        for arm, name in names.items()
        if name in there
    }
    return {arm: shares for arm, shares in found.items() if shares}


def _data_card(results: StudyResults, folder: StudyFolder) -> str | None:
    """Of any trial: they are all trained on the same data."""
    cards = (
        folder.trial(arm.name, trial.number).data_card
        for arm in results.arms
        for trial in arm.trials
    )
    found = next((card for card in cards if card.exists()), None)
    return None if found is None else found.read_text(encoding="utf-8")
