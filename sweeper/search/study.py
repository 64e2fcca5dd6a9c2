"""The study: where it is stored, which question it stands for, what is asked next.

Only the driver uses it, so there is one writer. Optuna's heartbeat is not used (it does not work with
ask and tell): on start every RUNNING trial is an orphan of a dead driver, and is adopted.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from sweeper.errors import StudyMismatch
from sweeper.folders import StudyFolder
from sweeper.outcome import Facts
from sweeper.search.plan import ArmPlan, StudyPlan
from sweeper.search.pruning import make_pruner
from sweeper.search.states import counts
from sweeper.search.storage import PatientStorage
from sweeper.settings import flatten
from sweeper.space import Choice, Domain, Point, Scalar, Space, grid

OBJECTIVE = "eval/loss"
MACHINERY = frozenset({"model.base_model", "model.revision", "data.train", "data.validation"}) | {
    *("data.test", "evaluation.per_device_eval_batch_size")
}
"""Settings that name things whose content has a digest, or that change no result."""


def open_storage(url: str | None, folder: StudyFolder) -> RDBStorage:
    """Optuna's storage: the given URL, or SQLite in the study's folder."""
    if url is None:
        folder.path.mkdir(parents=True, exist_ok=True)
        url = f"sqlite:///{folder.database}"
    return PatientStorage(url)


def optuna_name(study_name: str, arm: str) -> str:
    """The name of an arm's study in Optuna's storage."""
    return f"{study_name}/{arm}"


def open_study(plan: StudyPlan, arm: ArmPlan, facts: Facts, storage: RDBStorage) -> optuna.Study:
    """Create or resume the Optuna study of an arm, and enqueue what is to be tried first.

    Raises:
        StudyMismatch: the study of this name has other spaces, settings, data or base model.
    """
    study = optuna.create_study(
        storage=storage,
        study_name=optuna_name(plan.study.study_name, arm.name),
        direction=plan.study.direction,
        pruner=make_pruner(plan.study.pruner),
        load_if_exists=True,
    )
    study.sampler = make_sampler(arm, finished=len(study.get_trials(deepcopy=False)))
    _check_question(study, plan, arm, facts)
    study.set_user_attr("facts", facts.model_dump(mode="json"))
    taken = [_point_of(trial) for trial in study.get_trials(deepcopy=False) if _is_taken(trial)]
    for point in first_points(arm):
        if not any(point.items() <= other.items() for other in taken):
            study.enqueue_trial(point)
    return study


def ask_again(study: optuna.Study, trial: Trial, space: Space) -> None:
    """Have a trial's point asked once more, to be continued from where it was cancelled."""
    study.enqueue_trial(suggest(trial, space), user_attrs={"continues": trial.number})


def find_study(plan: StudyPlan, arm: ArmPlan, storage: RDBStorage) -> optuna.Study | None:
    """An arm's study as it stands, if it was ever opened."""
    name = optuna_name(plan.study.study_name, arm.name)
    if name not in optuna.get_all_study_names(storage):
        return None
    study = optuna.load_study(study_name=name, storage=storage)
    return study if "facts" in study.user_attrs else None


def _is_taken(trial: FrozenTrial) -> bool:
    """Whether a trial's point needs no further asking: it has a result, or it will have one."""
    return trial.state is not TrialState.FAIL or counts(trial)


def _point_of(trial: FrozenTrial) -> dict[str, Any]:
    fixed: dict[str, Any] = trial.system_attrs.get("fixed_params", {})
    return {**fixed, **trial.params}


def first_points(arm: ArmPlan) -> list[Point]:
    """Points to try before the sampler chooses: the whole grid, or the known-good ones in range."""
    if arm.sampler.name == "grid":
        return list(itertools.islice(grid(arm.space), arm.n_trials))
    return [point for point in arm.priors if point and inside(arm.space, point)]


def inside(space: Space, point: Mapping[str, Scalar]) -> bool:
    """Whether a (partial) point lies in a space, which the command line may have narrowed."""
    return all(value in space[key] for key, value in point.items())


def make_sampler(arm: ArmPlan, finished: int) -> BaseSampler:
    """The sampler of an arm.

    Its random state is not stored, so the seed moves with the number of trials: a resumed study would
    otherwise repeat its first draws.
    """
    seed = arm.sampler.seed + finished
    if arm.sampler.name != "tpe":
        return RandomSampler(seed)
    startup = arm.sampler.n_startup_trials or max(4, arm.n_trials // 5)
    return TPESampler(n_startup_trials=startup, seed=seed)


def suggest(trial: Trial, space: Space) -> Point:
    """Draw a point; what was drawn before (by a killed driver) is returned again."""
    return {key: _suggest(trial, key, domain) for key, domain in space.items()}


def _suggest(trial: Trial, key: str, domain: Domain) -> Scalar:
    if isinstance(domain, Choice):
        return trial.suggest_categorical(key, domain.values)
    if domain.integer:
        step = int(domain.step or 1)
        return trial.suggest_int(key, int(domain.low), int(domain.high), log=domain.log, step=step)
    return trial.suggest_float(key, domain.low, domain.high, log=domain.log, step=domain.step)


def adopt(study: optuna.Study) -> list[Trial]:
    """Trials that a dead driver left RUNNING, as live ones; the one place that builds a Trial."""
    orphans = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return [Trial(study, orphan._trial_id) for orphan in orphans]


def counted(study: optuna.Study) -> int:
    """How many of n_trials are used up."""
    return sum(counts(trial) for trial in study.get_trials(deepcopy=False))


def twin(study: optuna.Study, trial: Trial) -> FrozenTrial | None:
    """An earlier finished trial at the very same point."""
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return next((other for other in done if other.params == trial.params), None)


def question(arm: ArmPlan, facts: Facts) -> dict[str, str]:
    """What an arm's study asks, part by part; not how many trials, by which sampler or package."""
    settings = flatten(arm.settings.trial.model_dump(mode="json"))
    kept = {key: value for key, value in settings.items() if key not in arm.space}
    return {
        "objective": OBJECTIVE,
        "data digest": facts.data_digest,
        "base model digest": facts.base_digest,
        **{f"space {key}": str(domain) for key, domain in arm.space.items()},
        **{key: json.dumps(value) for key, value in kept.items() if key not in MACHINERY},
    }


def _check_question(study: optuna.Study, plan: StudyPlan, arm: ArmPlan, facts: Facts) -> None:
    asked = question(arm, facts)
    before = study.user_attrs.get("question")
    if before is None:
        study.set_user_attr("question", asked)
        return
    changed = [key for key in {**before, **asked} if before.get(key) != asked.get(key)]
    if changed:
        name = plan.study.study_name
        lines = [
            f"    {key}: {before.get(key, 'absent')} then, {asked.get(key, 'absent')} now"
            for key in changed
        ]
        raise StudyMismatch(
            f"study {name!r} (arm {arm.name}) was started with another question:\n"
            + "\n".join(lines)
            + "\n  ways out:\n"
            f"    start a new study:      hydra.sweeper.study_name={name}_2\n"
            "    continue the old one:   give the values it was started with"
        )
