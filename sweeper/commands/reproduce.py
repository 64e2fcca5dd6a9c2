"""`sweeper reproduce`: train a stored trial again and compare its figure with the record.

Needs only the trial's config, provenance and outcome, no study and no database. Differences from
the record (code, packages, machine, data, base) are reported before training. Different data or
another base end the command there, because their figure would answer another question.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from sweeper.commands.run_trial import train_single
from sweeper.config.compose import compose, key_of, read_yaml
from sweeper.config.settings import (
    RunSettings,
    TrialSettings,
    metric_words,
    stored_settings,
    validate,
)
from sweeper.config.trusted_files import require_trusted_modules
from sweeper.core.errors import ConfigError, StudyError, SweeperError, TrialFailed
from sweeper.core.outcome import ArmBaseline, stored_outcome
from sweeper.core.paths import StudyFolder, TrialFolder
from sweeper.core.stored_files import read_object
from sweeper.core.value import FrozenValue
from sweeper.reporting.console import say
from sweeper.reporting.results import load_results
from sweeper.reporting.winner import find_winner
from sweeper.search.states import STATES
from sweeper.tracking.provenance import origin, provenance
from sweeper.tracking.store import TrackingStore

INPUTS = ("data.digest", "base.digest")
"""Parts of the record that define the figure. With others it answers another question."""
ARITHMETIC = (
    *("package.torch", "package.transformers", "package.peft", "package.bitsandbytes"),
    *("package.accelerate", "machine", "cpu", "device", "dtype"),
)
"""Parts of the record that decide the order in which numbers are added, and so the last bits."""
COMPARED = (*INPUTS, "git.commit", "git.dirty", "sweeper", "python", *ARITHMETIC)
EXACT = 1e-6
"""Tolerance as a share of the recorded value on a CPU with the same packages and threads, which
computes the same bits. Allows only for a figure that went through JSON.
"""
ROUNDING = 0.02
"""Tolerance as a share of the trial's gain over the untuned base, on other packages or machines.

Other kernels round differently, and training amplifies the difference, at worst to that between two
seeds (±0.006 of 0.54 nats on the embedded base).
"""
MLFLOW_RUN = re.compile(r"[0-9a-f]{32}")
LOST_RECORD = "the trial's packages, machine, data and base model count as unknown"
MODULES = "evaluation.metric_modules"
"""Setting that names, on the command line, the code which a record may import."""
NUMBER = re.compile(r"(?:trial_)?(\d+)(?:_seed_(\d+))?")

Verdict = Literal["reproduced", "differs", "other_inputs", "failed"]
EXIT_CODES: Mapping[Verdict, int] = {
    "reproduced": 0,
    "differs": 10,
    "failed": 10,
    "other_inputs": 11,
}


class RecordedDifference(FrozenValue):
    """One part of the record that differs today."""

    what: str
    recorded: str | None
    """The recorded value, or None if the record lacks it."""
    now: str | None

    def __str__(self) -> str:
        return f"{self.what}: {self.recorded or 'not recorded'} → {self.now or 'none'}"


class Reproduction(FrozenValue):
    """Result of a reproduction."""

    trial: str
    verdict: Verdict
    metric: str
    recorded: float
    found: float | None = None
    tolerance: float | None = None
    why: str | None = None
    """Reason for the tolerance, or for the missing figure."""
    differences: tuple[RecordedDifference, ...] = ()
    folder: str | None = None
    """Folder of the new trial."""


@dataclass(frozen=True)
class RecordedTrial:
    """A stored trial that ran to its own end."""

    name: str
    settings: TrialSettings
    """Its settings, with the base pinned to the commit it was trained on."""
    origin: Mapping[str, str]
    value: float
    """Value of the objective."""
    config: Path
    """The file that the settings were read from."""


class OtherInputs(SweeperError):
    """The data or the base differ from the record's."""


def find_record(run: str, output_dir: Path, store: TrackingStore | None) -> RecordedTrial:
    """Return the trial that `run` names.

    Args:
        run: a trial's folder, the id of its MLflow run, STUDY/ARM/NUMBER (the number of a further
            seed is 7_seed_1), or STUDY or STUDY/ARM for the winner.
        output_dir: the folder that contains the studies.
        store: the MLflow store in which run ids are looked up, None without MLflow.

    Raises:
        StudyError: there is no such trial, or it has no figure of its own.
        TrackingError: MLflow has no such run, or cannot be reached.
    """
    # a folder that exists is meant, whatever else its name looks like
    if TrialFolder(Path(run)).config.exists():
        return read_record(run, TrialFolder(Path(run)))
    if MLFLOW_RUN.fullmatch(run):
        if store is None:
            raise ConfigError([f"{run}: the id of an MLflow run, but tracking=none. Remove it"])
        with tempfile.TemporaryDirectory() as folder:
            return read_record(f"MLflow run {run}", store.fetch_trial(run, Path(folder)))
    name, *parts = run.strip("/").split("/")
    number = NUMBER.fullmatch(parts[-1]) if len(parts) == 2 else None
    if len(parts) > 2 or (len(parts) == 2 and number is None):
        raise StudyError(
            f"{run}: no trial's folder. Name one, an MLflow run id (32 hex digits), STUDY/ARM/NUMBER, "
            "or STUDY for its winner"
        )
    study = StudyFolder(output_dir / name)
    if number is None:
        arm = parts[0] if parts else None
        winner = find_winner(load_results(name, output_dir), study, arm)
        key = f"{winner.arm.name}/{winner.trial.number:04d}"
        return read_record(f"{name}/{key}", winner.folder)
    place, seed = int(number[1]), number[2]
    folder_of = study.trial(parts[0], place)
    if seed is not None:
        folder_of = study.finalist(parts[0], place, int(seed))
    return read_record(run, folder_of)


def read_record(name: str, folder: TrialFolder) -> RecordedTrial:
    """Read a trial from its folder.

    Raises:
        StudyError: a file is missing, or the trial did not run to its own end.
        ConfigError: a version with other settings wrote its config.
    """
    for path in (folder.config, folder.provenance, folder.outcome):
        if not path.exists():
            raise StudyError(f"{name}: {path} is not there, so nothing can be held against it")
    outcome = stored_outcome(folder)
    if outcome is None:
        raise StudyError(
            f"{name}: {folder.outcome} is damaged, so there is no figure to compare with. Train the "
            f"trial again: python -m sweeper trial {folder.path} --into NEW_FOLDER"
        )
    if not STATES[outcome.cause].complete or outcome.best_value is None:
        raise StudyError(
            f"{name} ended as {outcome.cause} after {outcome.steps} steps: only a trial that ran to its "
            "own end has a figure that can be reproduced (`sweeper trial` trains any of them again)"
        )
    kept = {key: str(value) for key, value in read_object(folder.provenance, LOST_RECORD).items()}
    settings = stored_settings(read_yaml(folder.config))
    commit = kept.get("base.commit")
    if commit is not None and settings.model.revision is None:
        # a branch of the hub may have moved since the training
        pinned = settings.model.model_copy(update={"revision": commit})
        settings = settings.model_copy(update={"model": pinned})
    return RecordedTrial(name, settings, kept, outcome.best_value, folder.config)


def new_folder(output_dir: Path, record: RecordedTrial) -> Path:
    """Return the default folder of a reproduction."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", record.name).strip("_")
    return output_dir / "reproduced" / f"{name}_{time.strftime('%Y-%m-%d_%H-%M-%S')}"


def machinery(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the default configuration with other workers or another tracking.

    Raises:
        ConfigError: an override would change the trial.
    """
    foreign = [
        text
        for text in overrides
        if key_of(text).split(".")[0] not in ("workers", "tracking") and key_of(text) != MODULES
    ]
    if foreign:
        raise ConfigError(
            [
                f"{text}: would be another trial. Only workers, tracking and {MODULES} may be set"
                for text in foreign
            ]
        )
    return compose(overrides).config


def reproduce(
    record: RecordedTrial,
    machine: Mapping[str, Any],
    folder: TrialFolder,
    console: Console,
    tolerance: float | None = None,
) -> Reproduction:
    """Train a recorded trial again, through the code path of every trial.

    Args:
        record: the trial.
        machine: see `machinery`. The record's own settings take precedence.
        folder: the folder of the new trial.
        console: receives the differences, then every evaluation.
        tolerance: in the metric's unit. None derives it from the differences (EXACT, ROUNDING).

    Raises:
        SweeperError: the trial cannot start: a used folder, workers that do not start.
    """
    named = machine["evaluation"]["metric_modules"]
    require_trusted_modules(record.settings.evaluation, record.config, named)
    # the record decides what is computed, the command line only where and by whom
    settings = validate(RunSettings, {**machine, **record.settings.model_dump(mode="json")})
    metric = record.settings.objective.metric
    made = Reproduction(trial=record.name, verdict="failed", metric=metric, recorded=record.value)
    seen: list[ArmBaseline] = []

    def accept(facts: ArmBaseline) -> None:
        seen.append(facts)
        refuse_other_inputs(record, facts, console)

    try:
        outcome = train_single(settings, folder, f"reproduce {record.name}", console, accept)
    except OtherInputs as error:
        differences = differing(record, seen[0])
        update = {"verdict": "other_inputs", "why": str(error), "differences": differences}
        return made.model_copy(update=update)
    except TrialFailed as error:
        # without an answer to the probe there is nothing to compare
        differences = differing(record, seen[0]) if seen else ()
        update = {"why": str(error), "differences": differences, "folder": str(folder.path)}
        return made.model_copy(update=update)
    assert outcome.best_value is not None
    differences = differing(record, seen[0])
    allowed, why = allowance(record, seen[0], differences)
    if tolerance is not None:
        allowed, why = tolerance, "as asked for"
    same = abs(outcome.best_value - record.value) <= allowed
    return Reproduction(
        trial=record.name,
        verdict="reproduced" if same else "differs",
        metric=metric,
        recorded=record.value,
        found=outcome.best_value,
        tolerance=allowed,
        why=why,
        differences=differences,
        folder=str(folder.path),
    )


def refuse_other_inputs(record: RecordedTrial, facts: ArmBaseline, console: Console) -> None:
    """Print the differences from the record, and refuse different data or another base.

    Raises:
        OtherInputs: names them.
    """
    differences = differing(record, facts)
    for found in differences:
        say(console, f"differs    {found}")
    if not differences:
        console.print("differs    nothing: code, packages, machine, data and base are the record's")
    other = [found for found in differences if found.what in INPUTS]
    if other:
        raise OtherInputs(f"not trained, for the inputs are others: {'; '.join(map(str, other))}")


def differing(record: RecordedTrial, facts: ArmBaseline) -> tuple[RecordedDifference, ...]:
    """Return the differences from the record. Uncommitted changes always count as one."""
    now = origin(provenance(""), facts)
    return tuple(
        RecordedDifference(what=key, recorded=record.origin.get(key), now=now.get(key))
        for key in COMPARED
        # two changed work trees may differ, although both count as changed
        if record.origin.get(key) != now.get(key) or (key == "git.dirty" and now.get(key) == "true")
    )


def allowance(
    record: RecordedTrial, facts: ArmBaseline, differences: Sequence[RecordedDifference]
) -> tuple[float, str]:
    """Return the allowed deviation of the figure, and its reason."""
    other = [found.what for found in differences if found.what in ARITHMETIC]
    if facts.repeatable and not other:
        return EXACT * abs(record.value), "the same packages on the same machine: the same bits"
    objective = record.settings.objective
    gain = abs(objective.gain(record.value, over=facts.base_value(objective.metric)))
    reason = ", ".join(other) if other else "a GPU, whose kernels add in any order"
    # of a gain of zero a share would allow no rounding at all
    allowed = max(ROUNDING * gain, EXACT * abs(record.value))
    return (
        allowed,
        f"{ROUNDING:.0%} of the gain over the untuned base, for other rounding: {reason}",
    )


def describe(found: Reproduction) -> str:
    """Return the last lines for a terminal."""
    name = metric_words(found.metric)
    recorded = f"{found.trial}: recorded {name} {found.recorded:.6f}"
    if found.found is None:
        return f"{found.verdict.upper().replace('_', ' ')}: {recorded}; {found.why}"
    difference = f"difference {found.found - found.recorded:+.2g}, allowed {found.tolerance:.2g}"
    return (
        f"{found.verdict.upper()}: {recorded}, found {found.found:.6f}; {difference} ({found.why})"
    )


def to_json(found: Reproduction) -> str:
    """Return the reproduction as JSON."""
    return json.dumps(found.model_dump(mode="json"), indent=2, ensure_ascii=False)
