"""Report contents that results.json lacks: curves, sample answers, the data card and importances.

They are read from the trials' folders and from Optuna's storage. Each may be missing (a folder that
was cleaned up, a fake trainer, a database elsewhere). Missing parts are None or empty, and the page
says so.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from pydantic_core import from_json

from sweeper.core.errors import StudyError
from sweeper.core.paths import StudyFolder
from sweeper.core.spool import read_spool
from sweeper.core.steady_output import echo
from sweeper.core.stored_files import read_words, tell_damage
from sweeper.evaluation.sample_answers import SampleAnswer
from sweeper.reporting.results import ArmResult, StudyResults
from sweeper.search.study import open_storage, optuna_name

Curve = tuple[tuple[int, float], ...]
"""Optimiser step and eval/loss."""

EVALUATOR = "PED-ANOVA (optuna.importance)"
FEWEST_TRIALS = 6
"""Finished trials below which importances are not computed: they would be noise."""
ABOVE_TARGET = 5
"""Trials that Optuna's documentation asks for above PED-ANOVA's target quantile."""
SHUFFLES = 59
"""Shufflings of the trials' values that show which importances chance gives."""


@dataclass(frozen=True)
class ReportEvidence:
    """The evidence that was found for one study."""

    curves: Mapping[tuple[str, int], Curve] = field(default_factory=dict)
    """Evaluation losses by step, under the arm's name and the trial's number."""
    samples: Mapping[str, tuple[SampleAnswer, ...]] = field(default_factory=dict)
    """Answers of the best trial of each arm to the qualitative prompts."""
    data_card: str | None = None
    """The data card as Markdown."""
    importances: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Importances by arm and key, as shares of the arm's settings. Arms with few trials and settings
    whose importance may be chance are left out."""


def gather(
    results: StudyResults, folder: StudyFolder, storage: optuna.storages.BaseStorage | None = None
) -> ReportEvidence:
    """Read the evidence of a study.

    Args:
        results: the study's trials.
        folder: the study's folder.
        storage: Optuna's storage. None reads the database in the study's folder, if there is one.
    """
    if storage is None and folder.database.exists():
        storage = _storage(folder)
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


def _storage(folder: StudyFolder) -> optuna.storages.BaseStorage | None:
    """Open the study's database, or say why its figures are missing."""
    try:
        return open_storage(None, folder)
    except StudyError as error:
        echo(f"the page shows no importances: {error}", stderr=True)
        return None


def read_curve(path: Path) -> Curve:
    """Return a trial's evaluations as (step, eval loss)."""
    rows = (row for row in read_spool(path) if "eval/loss" in row)
    return tuple((int(row["step"]), float(row["eval/loss"])) for row in rows)


def read_samples(folder: StudyFolder, arm: ArmResult) -> tuple[SampleAnswer, ...]:
    """Return the sample answers of an arm's best trial, or () if none are stored."""
    if arm.best is None:
        return ()
    path = folder.trial(arm.name, arm.best.number).samples.with_suffix(".json")
    if not path.exists():
        return ()
    try:
        # unlike json.loads it refuses halves of characters, which no page could hold
        return tuple(SampleAnswer(**row) for row in from_json(path.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        tell_damage(path, error, "the page shows no sample answers of this trial")
        return ()


def importances(study: optuna.Study) -> dict[str, float] | None:
    """Return the share of each parameter in being among the best trials, where it exceeds chance.

    The importances are those of PED-ANOVA. With fewer than six finished trials or a single parameter the
    result is None. The target quantile is one tenth (Optuna's default), raised so that at least five
    trials lie above it, and at most one half. Shares are always large for some parameter, also if none
    matters. A parameter is therefore left out if more than one of 59 shufflings of the trials' values
    give an importance as large to any parameter.

    Source: Watanabe et al. 2023, PED-ANOVA, arXiv:2304.10255.
    """
    # A database of a cancelled study may hold running trials, which have no value.
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(trials) < FEWEST_TRIALS:
        return None
    values = {trial.number: _first_value(study, trial) for trial in trials}
    found = _divergences(study, values)
    if len(found) < 2:
        return None
    # A fixed seed, so that a page that is made again names the same settings.
    random = np.random.default_rng(0)
    rows = [list(found.values())]
    for _ in range(SHUFFLES):
        shuffled = random.permutation(list(values.values())).tolist()
        by_chance = _divergences(study, dict(zip(values, shuffled, strict=True)))
        # Optuna orders its answer by importance, so each row would have another order
        rows.append([by_chance[key] for key in found])
    beyond = _beyond_chance(np.array(rows))
    total = sum(found.values())
    return {
        key: value / total for (key, value), keep in zip(found.items(), beyond, strict=True) if keep
    }


def _divergences(study: optuna.Study, values: Mapping[int, float]) -> dict[str, float]:
    """Return PED-ANOVA's importance of each parameter for the given value of each trial.

    Args:
        study: the study, which may still run.
        values: values by the trial's number. A trial without one is left out.
    """
    # PED-ANOVA is Optuna's default, needs no scikit-learn and handles conditional parameters.
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(
        target_quantile=min(0.5, max(0.1, ABOVE_TARGET / len(values)))
    )
    with warnings.catch_warnings():  # Optuna warns that the target must be minimised, which it is
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return dict(
            optuna.importance.get_param_importances(
                study,
                evaluator=evaluator,
                target=lambda trial: values.get(trial.number, math.nan),
                normalize=False,
            )
        )


def _beyond_chance(rows: NDArray[np.float64]) -> list[bool]:
    """Return which importances of the first row exceed those of the rows of shuffled values.

    Importances are compared in medians of their own parameter, and with the largest one of each row, so
    that all parameters together are wrong in two of SHUFFLES + 1 studies (3 %).
    """
    medians = np.median(rows, axis=0)
    scores = rows / np.where(medians > 0, medians, 1.0)
    largest = scores[1:].max(axis=1)
    return [int((largest >= score).sum()) <= 1 for score in scores[0]]


def _first_value(study: optuna.Study, trial: FrozenTrial) -> float:
    """Return a trial's objective with lower as better."""
    # The evaluator ranks low values as good whatever the study's direction.
    sign = -1.0 if study.directions[0] is StudyDirection.MAXIMIZE else 1.0
    return sign * float(trial.values[0])


def _importances(
    results: StudyResults, storage: optuna.storages.BaseStorage
) -> dict[str, dict[str, float]]:
    # An arm that never started has no study in the storage.
    there = optuna.get_all_study_names(storage)
    names = {arm.name: optuna_name(results.study_name, arm.name) for arm in results.arms}
    found = {
        arm: importances(optuna.load_study(study_name=name, storage=storage))
        for arm, name in names.items()
        if name in there
    }
    return {arm: shares for arm, shares in found.items() if shares is not None}


def _data_card(results: StudyResults, folder: StudyFolder) -> str | None:
    """Return the first data card that is found. All trials of a study use the same data."""
    cards = (
        folder.trial(arm.name, trial.number).data_card
        for arm in results.arms
        for trial in arm.trials
    )
    found = next((card for card in cards if card.exists()), None)
    return None if found is None else read_words(found)
