"""The study: where it is stored, which question it stands for, what is asked next.

Only the driver uses it, so there is one writer. Optuna's heartbeat is not used (it does not work with
ask and tell): on start every RUNNING trial is an orphan of a dead driver, and is adopted.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Literal

import optuna
from optuna.storages import BaseStorage, RDBStorage, get_storage
from optuna.trial import BaseTrial, FrozenTrial, Trial, TrialState

from sweeper.config.settings import TrialSettings, changed_parts, flatten, stored_text
from sweeper.config.space import (
    Choice,
    Domain,
    Draw,
    Point,
    Scalar,
    Space,
    always_decided,
    grid,
    locate,
    walk,
)
from sweeper.core.errors import StudyError, StudyMismatch
from sweeper.core.outcome import ArmBaseline, Outcome, device_seconds
from sweeper.core.paths import StudyFolder
from sweeper.reporting.finalist_results import finalists_seconds
from sweeper.search.pruning import make_pruner
from sweeper.search.samplers import make_sampler
from sweeper.search.states import counts
from sweeper.search.storage import PatientStorage
from sweeper.search.study_plan import ArmPlan, StudyPlan

DIGESTED = ("model.base_model", "model.revision", "data.train", "data.validation", "data.test")
"""Settings that name things whose content has a digest; a source may be a mapping of its own."""
WITHOUT_EFFECT = (
    "artifacts",  # what is stored beside the kept weights
    "evaluation.per_device_eval_batch_size",  # padding and batching change no figure
    "evaluation.generation.batch_size",
    "evaluation.general_text",  # read when every search has ended
    "evaluation.rouge_path",  # evaluate and rouge_score give the same figures
    "training.logging_steps",
    "training.save_steps",  # a new best is saved at once, whatever this says
    "training.save_total_limit",  # the best checkpoint is never among those deleted
    "training.loss_chunk_size",  # the same loss, computed in pieces
    "training.micro_batch",  # the effective batch stays
    "training.devices_per_trial",  # and devices share it
    "training.fsdp",  # or the weights as well
)
"""Settings, or sections of them, that change no trial's value."""
MACHINERY = (*DIGESTED, *WITHOUT_EFFECT)
FORMAT = 1
"""Version of an arm's study in Optuna's storage: its attributes, and those of its trials. It rises only
when an older program would misread them; a setting that is added is a line of ADDED_SETTINGS instead."""
QUEUED_BY = "queued_by"
"""Attribute of a trial that a person queued while the study ran: the command's id."""
CLONE_OF = "clone_of"
"""Attribute of one that was queued as a changed copy: the earlier trial's number."""
DROPPED = "dropped"
"""Attribute of a trial that a person stopped for good."""


def open_storage(url: str | None, folder: StudyFolder) -> PatientStorage:
    """Optuna's storage: the given URL, or SQLite in the study's folder."""
    if url is None:
        folder.path.mkdir(parents=True, exist_ok=True)
        url = f"sqlite:///{folder.database}"
    return PatientStorage(url)


def share_cache(storage: RDBStorage) -> BaseStorage:
    """A storage whose finished trials are read once, however many studies are opened on it.

    create_study and load_study put a cache of their own before an RDBStorage, empty every time.
    """
    return get_storage(storage)


def optuna_name(study_name: str, arm: str) -> str:
    """The name of an arm's study in Optuna's storage."""
    return f"{study_name}/{arm}"


def open_study(
    plan: StudyPlan, arm: ArmPlan, facts: ArmBaseline, storage: BaseStorage
) -> optuna.Study:
    """Create or resume the Optuna study of an arm.

    Raises:
        StudyMismatch: the study of this name has other spaces, settings, data or base model.
        StudyError: a newer version stored it.
    """
    costs: list[Literal["minimize", "maximize"]] = ["minimize"] * len(plan.study.costs)
    study = optuna.create_study(
        storage=storage,
        study_name=optuna_name(plan.study.study_name, arm.name),
        directions=[plan.objective.direction, *costs],
        pruner=make_pruner(plan.study.pruner),
        load_if_exists=True,
    )
    require_readable(study)
    _check_question(study, plan, arm, facts)
    study.sampler = make_sampler(arm.sampler, arm.space, arm.n_trials, drawn(study))
    study.set_user_attr("facts", facts.model_dump(mode="json"))
    return study


def require_readable(study: optuna.Study) -> None:
    """Refuse a study that a newer version stored.

    Raises:
        StudyError: names both formats, and how its answer is kept.
    """
    found = study.user_attrs.get("format", 1)  # the first format had no number
    if found > FORMAT:
        name = study.study_name.partition("/")[0]
        raise StudyError(
            f"study {name!r} is of format {found}, this version reads up to format {FORMAT}: continue "
            "it with the version that stored it, or start a new study: "
            f"hydra.sweeper.study_name={name}_2"
        )


def drawn(study: optuna.Study) -> int:
    """How many parameter values are stored: it grows with every draw, in whichever run it was made.

    The number of trials does not: a trial that was asked by a killed run may be drawn by the next.
    """
    return sum(len(trial.params) for trial in study.get_trials(deepcopy=False))


def enqueue(study: optuna.Study, draws: list[Draw]) -> int:
    """Have draws tried before the sampler chooses, but for those tried or waiting already.

    Returns:
        How many were new.
    """
    taken = [draw_of(trial) for trial in study.get_trials(deepcopy=False) if is_taken(trial)]
    new = 0
    for draw in draws:
        if not any(draw.items() <= other.items() for other in taken):
            study.enqueue_trial(draw)
            taken.append(draw)
            new += 1
    return new


def ask(study: optuna.Study) -> Trial:
    """The next trial: what a person queued while the study ran, then the queue, then the sampler's."""
    waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    first = next((trial for trial in waiting if QUEUED_BY in trial.user_attrs), None)
    if first is None:
        return study.ask()
    study._storage.set_trial_state_values(first._trial_id, TrialState.RUNNING)
    return Trial(study, first._trial_id)


def steering_tags(trial: BaseTrial) -> dict[str, str]:
    """What a tracker is told of a trial that a person queued."""
    if QUEUED_BY not in trial.user_attrs:
        return {}
    number = trial.user_attrs.get(CLONE_OF)
    return {"steering": "enqueued" if number is None else f"clone of {number}"}


def ask_again(study: optuna.Study, trial: Trial, space: Space) -> None:
    """Have a trial's point asked once more, to be continued from where it was cancelled."""
    suggest(trial, space)
    study.enqueue_trial(trial.params, user_attrs={"continues": trial.number})


def find_study(plan: StudyPlan, arm: ArmPlan, storage: BaseStorage) -> optuna.Study | None:
    """An arm's study as it stands, if it was ever opened."""
    name = optuna_name(plan.study.study_name, arm.name)
    if name not in optuna.get_all_study_names(storage):
        return None
    study = optuna.load_study(study_name=name, storage=storage)
    require_readable(study)
    return study if "facts" in study.user_attrs else None


def is_taken(trial: FrozenTrial) -> bool:
    """Whether a trial's point needs no further asking: it has a result, will have one, or must not."""
    return trial.state is not TrialState.FAIL or counts(trial) or DROPPED in trial.user_attrs


def draw_of(trial: FrozenTrial) -> Draw:
    """What a trial was drawn as, or what is fixed of it while it waits."""
    fixed: Draw = trial.system_attrs.get("fixed_params", {})
    return {**fixed, **trial.params}


def first_draws(arm: ArmPlan) -> list[Draw]:
    """What to try before the sampler chooses: the whole grid, or the known-good points in range."""
    if arm.sampler.name == "grid":
        return list(itertools.islice(grid(arm.space), arm.n_trials))
    return [draw for point in arm.priors if (draw := locate(arm.space, point))]


def suggest(trial: BaseTrial, space: Space) -> Point:
    """Draw a point; what was drawn before (by a killed driver) is returned again."""
    return walk(space, lambda name, domain: _suggest(trial, name, domain))


def _suggest(trial: BaseTrial, name: str, domain: Domain) -> Scalar:
    if isinstance(domain, Choice):
        return trial.suggest_categorical(name, domain.values)
    if domain.integer:
        step = int(domain.step or 1)
        return trial.suggest_int(name, int(domain.low), int(domain.high), log=domain.log, step=step)
    return trial.suggest_float(name, domain.low, domain.high, log=domain.log, step=domain.step)


def point_of(trial: FrozenTrial) -> Point:
    """The values of the settings that a trial tried."""
    point: Point = trial.user_attrs.get("point", trial.params)
    return point


def shown_point(trial: FrozenTrial) -> Point:
    """The point, and the rank that followed from adapter.trainable_parameters."""
    rank = _decided_rank(trial)
    return {**point_of(trial), **({} if rank is None else {"adapter.r": rank})}


def settings_of(arm: ArmPlan, trial: FrozenTrial) -> TrialSettings:
    """What a trial was trained with."""
    settings: TrialSettings = arm.settings_at(point_of(trial)).trial
    return settings.with_rank(_decided_rank(trial))


def _decided_rank(trial: FrozenTrial) -> int | None:
    sized: dict[str, int] = trial.user_attrs.get("sized", {})
    return sized.get("rank")


def adopt(study: optuna.Study) -> list[Trial]:
    """Trials that a dead driver left RUNNING, as live ones."""
    orphans = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return [Trial(study, orphan._trial_id) for orphan in orphans]


def counted(study: optuna.Study) -> int:
    """How many of n_trials are used up."""
    return sum(map(counts, study.get_trials(deepcopy=False)))


def spent_seconds(studies: Mapping[str, optuna.Study | None], folder: StudyFolder) -> float:
    """Device time of all trials and finalists so far, given each arm's study, if it was begun."""
    return sum(
        _trials_seconds(study) + finalists_seconds(folder, arm)
        for arm, study in studies.items()
        if study is not None
    )


def _trials_seconds(study: optuna.Study) -> float:
    outcomes = (trial.user_attrs.get("outcome") for trial in study.get_trials(deepcopy=False))
    return sum(
        device_seconds(Outcome.model_validate(outcome).spent) for outcome in outcomes if outcome
    )


def twin(study: optuna.Study, point: Point) -> FrozenTrial | None:
    """An earlier trial with a result, pruned ones included, at the very same point."""
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    return next((other for other in done if point_of(other) == point), None)


def question(plan: StudyPlan, arm: ArmPlan, facts: ArmBaseline) -> dict[str, str]:
    """What an arm's study asks, part by part; not how many trials, by which sampler or package."""
    decided = always_decided(arm.space)
    return {
        "costs": ", ".join(plan.study.costs) or "none",
        **({} if arm.run_id is None else {"adopted run": arm.run_id}),
        "data digest": facts.data_digest,
        "base model digest": facts.base_digest,
        **{f"space {key}": str(domain) for key, domain in arm.space.items()},
        **{key: text for key, text in settings_as_json(arm).items() if key not in decided},
    }


def settings_as_json(arm: ArmPlan) -> dict[str, str]:
    """An arm's settings before any point is applied, but for those that change no result."""
    settings = flatten(arm.settings.trial.model_dump(mode="json"))
    return {key: json.dumps(value) for key, value in settings.items() if not _is_machinery(key)}


def _is_machinery(key: str) -> bool:
    return any(f"{key}.".startswith(f"{name}.") for name in MACHINERY)


def _check_question(study: optuna.Study, plan: StudyPlan, arm: ArmPlan, facts: ArmBaseline) -> None:
    asked = question(plan, arm, facts)
    before = study.user_attrs.get("question")
    if before is None:
        study.set_user_attr("format", FORMAT)
        study.set_user_attr("question", asked)
        return
    if changed := changed_parts(before, asked):
        name = plan.study.study_name
        lines = [
            f"    {key}: {stored_text(before, key) or 'absent'} then, {asked.get(key, 'absent')} now"
            for key in changed
        ]
        raise StudyMismatch(
            f"study {name!r} (arm {arm.name}) was started with another question:\n"
            + "\n".join(lines)
            + "\n  ways out:\n"
            f"    start a new study:      hydra.sweeper.study_name={name}_2\n"
            "    keep what still fits:   "
            f"hydra.sweeper.study_name={name}_2 hydra.sweeper.fork_of={name}\n"
            "    continue the old one:   give the values it was started with"
        )
