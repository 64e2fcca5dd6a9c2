"""Names of all files under outputs/, and functions that write files atomically.

Does not know the contents of the files.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from pydantic_core import from_json, to_json

from sweeper.core.references import referenced


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that readers see the old or the new content, never a part, even after a crash.

    Values that the configuration takes from the environment are written as their references.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, because a rename is atomic only within one file system.
    partial = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with partial.open("x", encoding="utf-8") as file:
            file.write(referenced(text))
            file.flush()
            # Without it a power cut could leave the new name with no content
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:  # also on Ctrl-C, which must not leave a partial file
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write one JSON document atomically.

    Raises:
        ValueError: A value is NaN or infinite, which JSON cannot hold.
    """
    # json.dumps only checks: with an indent it runs in Python, not in C, and would take most of the
    # driver's CPU time. pydantic's serializer is fast, but accepts NaN.
    json.dumps(value, allow_nan=False)
    write_atomic(path, to_json(value, indent=2).decode() + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object.

    Raises:
        ValueError: The file holds no JSON, or another value than an object.
    """
    # unlike json.loads it refuses halves of characters, which no file and no page could hold
    value = from_json(path.read_bytes())
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def path_inside(root: Path, name: str, start: Path | None = None) -> Path:
    """Return the path that a name in a file stands for. Every name that is read from a file comes here,
    unless its class allows no separators (StudyName, ArmName).

    Args:
        root: the folder that the name may not lead out of, also not through a link.
        name: the name, as it was read.
        start: the folder that the name is relative to, if it is not the root.

    Raises:
        ValueError: the name leads out of the root, or no file can have it.
    """
    place = (start or root) / name
    if not place.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{name!r} lies outside {root}")
    return place


@dataclass(frozen=True)
class TrialFolder:
    """The folder of one trial, which only the trial's worker writes."""

    path: Path

    @property
    def config(self) -> Path:
        """Composed configuration of the trial, which `sweeper trial` runs again."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """Observations, one JSON object per line: step, time (Unix seconds) and metrics by name."""
        return self.path / "metrics.jsonl"

    @property
    def look_losses(self) -> Path:
        """Losses of each row that the trial's looks were at, one JSON object per look."""
        return self.path / "look_losses.jsonl"

    @property
    def outcome(self) -> Path:
        """Result of the trial, written last: if the file exists, the folder is complete."""
        return self.path / "outcome.json"

    @property
    def provenance(self) -> Path:
        """Record of code, packages, machine, data digest and base digest."""
        return self.path / "provenance.json"

    @property
    def identity(self) -> Path:
        """The trial and the inputs that the folder belongs to (sweeper.core.trial_identity)."""
        return self.path / "identity.json"

    @property
    def log_text(self) -> Path:
        """Training log for people."""
        return self.path / "training_log.txt"

    @property
    def log_json(self) -> Path:
        """Training log for programs."""
        return self.path / "training_log.json"

    @property
    def adapter(self) -> Path:
        """Adapter of the best checkpoint, in PEFT's layout."""
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """Weights of the best checkpoint of a full fine-tune, in transformers' layout."""
        return self.path / "model"

    @property
    def merged(self) -> Path:
        """Base and adapter merged into one model, if artifacts.merged is set."""
        return self.path / "merged"

    @property
    def data_card(self) -> Path:
        """Summary of the trial's data: counts, lengths, sample rows with their loss mask (Markdown)."""
        return self.path / "data_card.md"

    @property
    def samples(self) -> Path:
        """Answers to the qualitative prompts, untuned and tuned (Markdown, and JSON with it)."""
        return self.path / "samples.md"

    @property
    def archive(self) -> Path:
        """Zip file of the adapter (or of the weights), if artifacts.zip is set."""
        return self.path / f"{(self.artifact or self.adapter).name}.zip"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints to resume from, removed when the trial ends."""
        return self.path / "checkpoints"

    @property
    def lock(self) -> Path:
        """Lock file held by the worker that trains in this folder."""
        return self.path / ".lock"

    @property
    def tracking(self) -> Path:
        """MLflow ledger of a trial without a study (sweeper.tracking.tracking_ledger)."""
        return self.path / ".tracking"

    @property
    def spent(self) -> Path:
        """Costs of all attempts of the trial up to the newest checkpoint."""
        return self.checkpoints / "spent.json"

    @property
    def artifact(self) -> Path | None:
        """Folder of the trained adapter or full model, or None if neither was written."""
        return next((path for path in (self.adapter, self.model) if path.is_dir()), None)

    def forget_checkpoints(self) -> None:
        """Remove the checkpoints of a trial that will not be resumed."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def continue_from(self, earlier: TrialFolder) -> None:
        """Take over the checkpoints and looks of a cancelled trial, if it left checkpoints."""
        # Existing checkpoints mean that an earlier attempt has taken them over already.
        if not earlier.checkpoints.is_dir() or self.checkpoints.exists():
            return
        self.path.mkdir(parents=True, exist_ok=True)
        for source, target in (
            (earlier.metrics, self.metrics),
            (earlier.look_losses, self.look_losses),
        ):
            if source.exists():
                shutil.copy2(source, target)
        # last, because checkpoints in this folder mean that everything was taken over
        earlier.checkpoints.replace(self.checkpoints)
        # The cancelled trial's outcome already counts its costs, so this trial starts at zero.
        self.spent.unlink(missing_ok=True)

    def clear_results(self) -> None:
        """Remove the files of an earlier attempt except its checkpoints."""
        # The outcome goes first: without it no reader takes the folder for complete.
        written = (self.outcome, self.log_text, self.log_json, self.data_card, self.samples)
        for path in (*written, self.samples.with_suffix(".json"), *self.path.glob("*.zip")):
            path.unlink(missing_ok=True)
        for folder in (self.adapter, self.model, self.merged):
            shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class StudyFolder:
    """The folder of one study: its database, lock, trials by arm, and results."""

    path: Path

    @property
    def database(self) -> Path:
        """Optuna's SQLite storage, with one Optuna study per arm."""
        return self.path / "study.db"

    @property
    def lock(self) -> Path:
        """Lock file held by the study's driver."""
        return self.path / "driver.lock"

    @property
    def inbox(self) -> Path:
        """Folder of commands to the driver, one JSON file each, moved in by rename when complete."""
        return self.path / "inbox"

    @property
    def outbox(self) -> Path:
        """Folder of the driver's answers, each kept until the sender of the command has read it."""
        return self.path / "outbox"

    @property
    def steering(self) -> Path:
        """Record of all handled commands, and the values of n_trials raised by commands."""
        return self.path / "steering.json"

    @property
    def standing(self) -> Path:
        """Status of the study, rewritten by its driver every few seconds."""
        return self.path / "standing.json"

    @property
    def identity(self) -> Path:
        """The UUID of the study that the folder belongs to (sweeper.driver.folder_owner)."""
        return self.path / "identity.json"

    @property
    def set_aside(self) -> Path:
        """Folder of trials, and of whole studies, that do not belong to this study."""
        return self.path / "set_aside"

    @property
    def tracking(self) -> Path:
        """MLflow ledger of the study's runs (sweeper.tracking.tracking_ledger)."""
        return self.path / ".tracking"

    @property
    def looks(self) -> Path:
        """Record of the looks at the test split, of this study and of its forks."""
        return self.path / "looks.json"

    @property
    def results(self) -> Path:
        """Results of the study for programs (JSON)."""
        return self.path / "results.json"

    @property
    def report(self) -> Path:
        """Report of the study (Markdown)."""
        return self.path / "report.md"

    @property
    def page(self) -> Path:
        """Report of the study with its figures, as one HTML file."""
        return self.path / "report.html"

    @property
    def figures(self) -> Path:
        """Folder of the report's figures, one SVG file each."""
        return self.path / "figures"

    @property
    def answers(self) -> tuple[Path, ...]:
        """Paths of the results in all their forms."""
        return self.results, self.report, self.page, self.figures

    def worker_log(self, worker: int) -> Path:
        """Return the file that receives the output of a worker, by its number."""
        return self.path / f"worker_{worker}.log"

    def trial(self, arm: str, number: int) -> TrialFolder:
        """Return the folder of trial `number` of an arm."""
        return TrialFolder(self.path / arm / f"trial_{number:04d}")

    def finalist(self, arm: str, number: int, seed: int) -> TrialFolder:
        """Return the folder of trial `number` of an arm, trained again with another seed."""
        return TrialFolder(self.finalists(arm) / f"trial_{number:04d}_seed_{seed}")

    def finalists(self, arm: str) -> Path:
        """Return the folder of an arm's finalists: repeats over seeds and losses on held-out texts."""
        return self.path / arm / "finalists"

    def adopted(self, arm: str) -> Path:
        """Return the folder for the downloaded model of an arm's baseline run."""
        return self.path / arm / "adopted"

    def judged_examples(self, arm: str, kind: str, digest: str, name: str) -> Path:
        """Return the file of a model's losses on a text.

        Args:
            arm: the arm's name.
            kind: "test" or "general".
            digest: the digest of everything that the losses follow from.
            name: the model's name, such as trial_0007_seed_0.
        """
        # The digest is part of the path, so that losses of another model or on another text are
        # measured, not reused.
        return self.finalists(arm) / kind / digest[:12] / f"{name}.json"


@dataclass(frozen=True)
class NightsFolder:
    """The folder of the nightly runs of all sets under one output_dir."""

    path: Path

    @classmethod
    def under(cls, output_dir: Path) -> NightsFolder:
        """Return the folder for nightly runs in an output_dir."""
        return cls(output_dir / "nightly")

    @property
    def database(self) -> Path:
        """SQLite database of the nights that were run: one row per set and local date."""
        return self.path / "nights.db"

    def lock(self, set_name: str) -> Path:
        """Return the lock file that the process running the set holds."""
        return self.path / f"{set_name}.lock"

    def holder(self, set_name: str) -> Path:
        """Return the file that names the lock's holder and the night being run."""
        return self.path / f"{set_name}.running.json"

    def night(self, set_name: str, date: str) -> NightFolder:
        """Return the folder of one night, given its local date."""
        return NightFolder(self.path / set_name / date)

    def dates(self, set_name: str) -> list[str]:
        """Return the dates of a set's recorded nights, latest first."""
        records = (self.path / set_name).glob("*/night.json")
        return sorted((record.parent.name for record in records), reverse=True)


@dataclass(frozen=True)
class NightFolder:
    """The folder of one night's record and summary."""

    path: Path

    @property
    def record(self) -> Path:
        """Decisions and results of the night. An interrupted night continues from this file."""
        return self.path / "night.json"

    @property
    def digest(self) -> Path:
        """Summary of the night (Markdown)."""
        return self.path / "digest.md"

    @property
    def page(self) -> Path:
        """Summary of the night (HTML)."""
        return self.path / "digest.html"


def size_mib(folder: Path) -> float:
    """Return the size of all files under a folder in MiB."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20
