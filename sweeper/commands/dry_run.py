"""`dry_run=true`: show what a command would do, without training, storing or tracking anything.

The plan is the real one. The points come from the real sampler, on a study in memory. A process
with torch counts parameters and times a few steps of each arm's largest point. A study that has
finished trials is forecast from these instead.
"""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna
from rich.console import Console

from sweeper.commands.study_forecast import (
    ArmForecast,
    data_lines,
    forecast_lines,
    planned_workers,
    side_by_side,
    trainings_line,
)
from sweeper.commands.torch_process import Tell, ask
from sweeper.config import compose
from sweeper.config.settings import RunSettings, TrialSettings, flatten
from sweeper.config.space import Branches, Choice, Point, Space
from sweeper.core.errors import ConfigError
from sweeper.core.outcome import TrialFootprint, TrialTiming
from sweeper.core.paths import StudyFolder
from sweeper.reporting.console import make_console, say
from sweeper.reporting.results import ArmResult, StudyResults, load_results
from sweeper.reporting.study_progress import short_names
from sweeper.reporting.text_table import TextTable, duration, number
from sweeper.reporting.verdict_doubts import with_override
from sweeper.search.largest_point import largest_trials
from sweeper.search.samplers import make_sampler
from sweeper.search.searched_epochs import FEW_ROWS_WORDS, mean_epochs, with_few_rows
from sweeper.search.stored_defaults import with_stored_defaults
from sweeper.search.study import (
    WORKERS,
    enqueue,
    find_study,
    first_draws,
    open_storage,
    share_cache,
    suggest,
)
from sweeper.search.study_plan import ArmPlan, StudyPlan
from sweeper.workers.worker_count import MachineShare, WorkerCount, this_machine, usable_cores

POINTS = 5
SHOWN = ("model", "data", "quantization", "adapter", "training", "evaluation", "seed")
"""Sections of the configuration that decide what is computed."""


@dataclass(frozen=True)
class ArmDraft:
    """First points of an arm: settings of the possible ones, reasons for the impossible ones."""

    points: tuple[Point, ...]
    settings: tuple[TrialSettings, ...]
    problems: tuple[str | None, ...]


ESTIMATE_SECONDS = 900.0
"""Time limit of counting, which takes a second for each model and may fetch its configuration first."""
TIMING_SECONDS = 3600.0
"""Time limit of timing, which loads each arm's base and takes a few steps."""
Timer = Callable[[Sequence[TrialSettings], int, Tell], list[TrialTiming]]
"""Times trials with a number of CPU threads, and tells what it does."""
Estimator = Callable[[Sequence[TrialSettings]], list[TrialFootprint]]


def estimate(settings: Sequence[TrialSettings]) -> list[TrialFootprint]:
    """Count the parameters of trials in a process with torch, and return one footprint each.

    Raises:
        WorkerError: that process died or gave no answer.
    """
    documents = ask("sweeper.modeling.footprint", settings, "counts parameters", ESTIMATE_SECONDS)
    return [TrialFootprint.model_validate(document) for document in documents]


def time_steps(settings: Sequence[TrialSettings], threads: int, tell: Tell) -> list[TrialTiming]:
    """Train a few steps of trials in a process with torch, and return one timing each.

    Args:
        settings: the trials.
        threads: CPU threads that a worker of the study has.
        tell: receives words on what is being timed.

    Raises:
        WorkerError: that process died or gave no answer.
    """
    module = "sweeper.commands.step_timing"
    documents = ask(module, settings, "times steps", TIMING_SECONDS, str(threads), tell=tell)
    return [TrialTiming.model_validate(document) for document in documents]


def show(plans: Sequence[StudyPlan | RunSettings]) -> None:
    """Print what a command line would do."""
    console = make_console()
    for plan in plans:
        if isinstance(plan, RunSettings):
            show_single(plan, console)
        else:
            show_study(plan, console)


def show_study(
    plan: StudyPlan,
    console: Console,
    estimator: Estimator = estimate,
    timer: Timer = time_steps,
    machine: Callable[[], MachineShare] = this_machine,
) -> None:
    """Print what a study would do: data, trainings, time and memory first, all settings last."""
    # Optuna would announce the studies in memory that the first points are asked of
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    name = plan.study.study_name
    _line(console, f"dry run of study {name}: nothing is trained, stored or tracked")
    if plan.name_note:
        _line(console, plan.name_note)
    earlier = _earlier(plan)
    plan, kept, stored_workers = _as_stored(plan)
    _line(console, *kept)
    workers = planned_workers(plan, machine, stored_workers)
    drafts = [draft(arm) for arm in plan.arms]
    largest = [[] if arm.run_id is not None else largest_trials(arm) for arm in plan.arms]
    first = [trial for found in drafts for trial in found.settings]
    # One process counts all of them, because its imports take seconds.
    estimated = estimator([*first, *itertools.chain.from_iterable(largest)])
    sizes = iter(estimated)
    of_points = [list(itertools.islice(sizes, len(found.settings))) for found in drafts]
    if earlier is None:
        chosen = [_largest(trials, itertools.islice(sizes, len(trials))) for trials in largest]
        timed = forecasts(plan, chosen, timer, workers.threads, console)
        _show_forecast(console, plan, timed, workers)
    else:  # what earlier trials really took is better than a few steps
        _line(console, trainings_line(plan), forecast(plan, earlier, workers))
    for arm, found, arm_sizes in zip(plan.arms, drafts, of_points, strict=True):
        _show_arm(console, plan, arm, earlier)
        further = plan.further_seeds(arm) + plan.recipe_seeds_at_most(arm)
        _show_points(console, arm, found, arm_sizes, further)
    _line(console, "", f"run it:     python -m sweeper {without_dry_run(plan.command)}", "")
    _show_settings(console, plan.settings)


def forecasts(
    plan: StudyPlan,
    largest: Sequence[TrialSettings | None],
    timer: Timer,
    threads: int,
    console: Console,
) -> list[ArmForecast]:
    """Return the forecast of each arm, after timing its largest trial."""
    timed = [trial for trial in largest if trial is not None]
    _line(console, f"timing a few steps of {len(timed)} trials, of which nothing is kept …")
    timings = iter(timer(timed, threads, lambda words: _line(console, words)))
    return [
        _forecast_of(plan, arm, trial, None if trial is None else next(timings))
        for arm, trial in zip(plan.arms, largest, strict=True)
    ]


def _forecast_of(
    plan: StudyPlan, arm: ArmPlan, trial: TrialSettings | None, timing: TrialTiming | None
) -> ArmForecast:
    """Return the forecast of an arm whose trials are on average longer than the one that was timed."""
    if trial is not None and timing is not None and timing.rows:
        arm = with_few_rows(arm, timing.rows["train"])
        longer = mean_epochs(arm) / trial.training.num_train_epochs
        timing = timing.model_copy(update={"steps": round(longer * timing.steps)})
    return ArmForecast.of(plan, arm, timing)


def _largest(
    trials: Sequence[TrialSettings], sizes: Iterable[TrialFootprint]
) -> TrialSettings | None:
    """Return the trial that needs the most memory or, where that is unknown, trains the most."""
    pairs = zip(trials, sizes, strict=True)
    known = [(size.peak_mib or 0.0, size.trainable or 0, trial) for trial, size in pairs]
    return max(known, key=lambda each: each[:2])[2] if known else None


def _show_forecast(
    console: Console, plan: StudyPlan, arms: Sequence[ArmForecast], workers: WorkerCount
) -> None:
    known = next((each.timing for each in arms if each.timing and each.timing.rows), None)
    if known is not None:
        _line(
            console,
            *data_lines(known),
            "            all of it: the same overrides with sweeper data",
        )
    if any(each.arm not in plan.arms for each in arms):
        _line(console, f"epochs:     {FEW_ROWS_WORDS}")
    _line(console, *forecast_lines(plan, arms, workers))


def show_single(
    settings: RunSettings,
    console: Console,
    estimator: Estimator = estimate,
    timer: Timer = time_steps,
) -> None:
    """Print what one trial would do: data, size and time first, all settings last."""
    _line(console, "dry run of one trial: nothing is trained, stored or tracked")
    (found,) = estimator([settings.trial])
    _line(console, "timing a few steps of the trial …")
    (timing,) = timer([settings.trial], usable_cores(), lambda words: _line(console, words))
    if timing.rows:
        _line(console, *data_lines(timing))
    _line(console, f"size:       {describe(found)}", disk(settings, [found.artifact_mib]))
    words = timing.problem or "the trial does not fit the device's memory"
    about = f"unknown: {words}"
    if timing.training_s is not None:
        about = f"about {duration((timing.start_s or 0.0) + timing.untuned_s + timing.training_s)}"
    _line(console, f"time:       {about}", "")
    _show_settings(console, settings)


def first_asked(arm: ArmPlan, count: int) -> list[Point]:
    """Return the points that an arm's sampler proposes first. Its first draws are random."""
    sampler = make_sampler(arm.sampler, arm.space, arm.n_trials)
    study = optuna.create_study(sampler=sampler)
    enqueue(study, first_draws(arm))
    wanted = min(count, arm.n_trials)
    return [suggest(study.ask(), arm.space) for _ in range(wanted)]


def space_size(space: Space) -> str:
    """Count the points of a space, every branch with its own points."""
    counts = []
    for domain in space.values():
        if isinstance(domain, Branches):
            inner = ", ".join(space_size(branch.space) for branch in domain.branches.values())
            return f"{len(domain.branches)} branches: {inner}"
        if isinstance(domain, Choice):
            counts.append(len(domain.values))
        elif domain.integer or domain.step is not None:
            counts.append(round((domain.high - domain.low) / (domain.step or 1)) + 1)
    points = math.prod(counts)
    if len(counts) == len(space):
        return f"{points:,} points"
    continuous = len(space) - len(counts)
    combined = f"{points:,} combinations and " if counts else ""
    return f"{combined}{continuous} continuous key{'s' if continuous > 1 else ''}"


def forecast(plan: StudyPlan, earlier: StudyResults | None, workers: WorkerCount) -> str:
    """Forecast the remaining duration of a study from its earlier trials of every arm."""
    seconds = 0.0
    for arm in plan.arms:
        if arm.run_id is not None:
            continue  # a judgement takes no trial's time
        done = _of_arm(earlier, arm)
        typical = None if done is None else done.seconds_per_trial
        if typical is None:
            return f"time:       cannot be known before the first finished trial of arm {arm.name}"
        assert done is not None
        further = plan.further_seeds(arm) + plan.recipe_seeds_at_most(arm)
        more = max(arm.n_trials - done.tried, 0) + (further if done.final is None else 0)
        seconds += more * typical
    jobs = side_by_side(plan, workers)
    beside = f" with {jobs} workers" if jobs > 1 else ""
    return (
        f"time:       about {duration(seconds / jobs)}{beside} at most, from the median of this "
        "study's earlier trials (pruned ones take less)"
    )


def disk(settings: RunSettings, artifacts_mib: Sequence[float | None]) -> str:
    """Compare the space for artifacts with the free space. Resume states of running trials come on
    top.
    """
    free = shutil.disk_usage(_existing(Path(settings.output_dir))).free / 2**20
    known = [size for size in artifacts_mib if size is not None]
    if len(known) < len(artifacts_mib):
        return f"disk:       unknown, {free:,.0f} MiB free"
    short = ", which is NOT ENOUGH" if sum(known) > free else ""
    return f"disk:       {sum(known):,.1f} MiB of artifacts, {free:,.0f} MiB free{short}"


def describe(found: TrialFootprint) -> str:
    """Format a footprint."""
    if found.problem is not None:
        return f"unknown: {found.problem}"
    assert found.trainable is not None
    assert found.total is not None
    memory = "not estimated" if found.peak_mib is None else f"about {found.peak_mib:,.0f} MiB"
    return (
        f"{found.trainable:,} of {found.total:,} parameters trained "
        f"({100 * found.trainable / found.total:.4g} %), memory {memory}"
    )


def without_dry_run(command: str) -> str:
    """Return the command that runs what the dry run shows."""
    # Set first, because that replaces the override whatever its value is.
    return with_override(command, "dry_run", "false").replace(" dry_run=false", "")


def _show_settings(console: Console, settings: RunSettings) -> None:
    config = settings.model_dump(mode="json", include=set(SHOWN))
    _line(console, compose.to_yaml(config).rstrip())
    _line(console, "(all of it: the same command with --cfg job)", "")


def _show_arm(
    console: Console, plan: StudyPlan, arm: ArmPlan, earlier: StudyResults | None
) -> None:
    done = _of_arm(earlier, arm)
    before = "" if done is None else f", {done.tried} of them done before"
    _line(console, "", f"arm {arm.name}: {arm.n_trials} trials by {arm.sampler.name}{before}")
    if arm.run_id is not None:
        _line(console, f"  adopted from MLflow run {arm.run_id}: judged, and not trained")
    for key, value in _differences(plan.settings, arm.settings).items():
        _line(console, f"  {key} = {value}")
    if more := plan.further_seeds(arm):
        wanted = plan.study.finalists
        fresh = f"the winner with {wanted.fresh_seeds} fresh seeds"
        best = f"the best {wanted.top} over {wanted.seeds} seeds, " if wanted.seeds > 1 else ""
        _line(console, f"  then {more} more: {best}{fresh}")
    if most := plan.recipe_seeds_at_most(arm):
        names = " or ".join(recipe.name for recipe in arm.recipes)
        _line(console, f"  then up to {most} more: the recipe {names}, unless it wins")
    _line(console, f"  space: {space_size(arm.space)}")
    for key, domain in arm.space.items():
        _line(console, f"    {key}: {domain}")


def _show_points(
    console: Console, arm: ArmPlan, found: ArmDraft, sizes: list[TrialFootprint], repeats: int
) -> None:
    """Print the first points, and the disk space if all trials were as large as the largest of them."""
    console.print(points_sheet(found, sizes).draw())
    known = [size.artifact_mib for size in sizes if size.artifact_mib is not None]
    largest = max(known) if known and len(known) == len(sizes) else None
    count = arm.n_trials + repeats
    _line(console, f"{disk(arm.settings, [largest] * count)} (all as large as the largest)")


def draft(arm: ArmPlan) -> ArmDraft:
    """Return an arm's first points, divided into possible and impossible ones."""
    points = first_asked(arm, POINTS)
    settings: list[TrialSettings] = []
    problems: list[str | None] = []
    for point in points:
        try:
            settings.append(arm.settings_at(point).trial)
            problems.append(None)
        except ConfigError as error:
            problems.append(error.problems[0])
    return ArmDraft(tuple(points), tuple(settings), tuple(problems))


def points_sheet(found: ArmDraft, sizes: Sequence[TrialFootprint]) -> TextTable:
    """Return a table of the first points, without columns in which nothing is known."""
    keys = list(dict.fromkeys(key for point in found.points for key in point))
    names = [key.rsplit(".", 1)[-1] for key in keys]
    of_possible = iter(sizes)
    rows = []
    for place, (point, problem) in enumerate(zip(found.points, found.problems, strict=True)):
        shown = short_names(point)
        size = TrialFootprint() if problem else next(of_possible)
        cells = (number(size.trainable), number(size.peak_mib, "{:,.0f} MiB"))
        values = (shown.get(name, "") for name in names)
        rows.append((str(place), *values, *cells, problem or size.problem or ""))
    columns = ("trial", *names, "trainable", "memory", "impossible because")
    sheet = TextTable("first points", columns, tuple(rows), frozenset({"impossible because"}))
    if not any(row[-1] for row in rows):
        sheet = sheet.without("impossible because")
    return sheet if any(size.peak_mib for size in sizes) else sheet.without("memory")


def _differences(shared: RunSettings, own: RunSettings) -> dict[str, object]:
    """Return the settings that an arm changes besides its space."""
    before = flatten(shared.trial.model_dump(mode="json"))
    after = flatten(own.trial.model_dump(mode="json"))
    # `...` stands for a missing key, because None is a value of settings.
    return {key: value for key, value in after.items() if before.get(key, ...) != value}


def _earlier(plan: StudyPlan) -> StudyResults | None:
    """Return the results of the same study, or None if it never started."""
    output_dir = Path(plan.settings.output_dir)
    if not StudyFolder(output_dir / plan.study.study_name).results.exists():
        return None
    return load_results(plan.study.study_name, output_dir)


def _as_stored(plan: StudyPlan) -> tuple[StudyPlan, list[str], list[dict[str, int] | None]]:
    """Return the plan with what its stored study keeps, sentences on that, and its arms' workers.

    An arm that has stored nothing about its workers has None.
    """
    folder = StudyFolder(Path(plan.settings.output_dir) / plan.study.study_name)
    if not (folder.database if plan.study.storage is None else folder.path).exists():
        return plan, [], []  # a study that never ran, whose storage would be created by opening it
    storage = share_cache(open_storage(plan.study.storage, folder))
    found = {arm.name: find_study(plan, arm, storage) for arm in plan.arms}
    studies = {name: study for name, study in found.items() if study is not None}
    kept, notes = with_stored_defaults(plan, studies, storage)
    return kept, notes, [study.user_attrs.get(WORKERS) for study in studies.values()]


def _of_arm(results: StudyResults | None, arm: ArmPlan) -> ArmResult | None:
    if results is None:
        return None
    return next((found for found in results.arms if found.name == arm.name), None)


def _existing(path: Path) -> Path:
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def _line(console: Console, *texts: str) -> None:
    for text in texts:
        say(console, text)
