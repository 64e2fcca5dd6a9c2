"""Every file name under outputs/, in one place, and the one way to write a file: whole or not at all.

Knows nothing about what is in the files.
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

from pydantic_core import to_json


def write_atomic(path: Path, text: str) -> None:
    """Write `text` so that a reader (or a crash) sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with partial.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:  # Ctrl-C too leaves no half-written file behind
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write one JSON document atomically; NaN and infinity are refused (they are not JSON)."""
    json.dumps(value, allow_nan=False)  # refuses; with an indent it would take ten times as long
    write_atomic(path, to_json(value, indent=2).decode() + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object."""
    value = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(value, dict), f"{path} holds no JSON object"
    return value


@dataclass(frozen=True)
class TrialFolder:
    """The folder of one trial: what a worker writes and everybody else only reads."""

    path: Path

    @property
    def config(self) -> Path:
        """The composed config the trial was trained with; `sweeper trial` runs it again."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object a line: step, time (Unix seconds) and metrics by name."""
        return self.path / "metrics.jsonl"

    @property
    def outcome(self) -> Path:
        """How the trial ended; written last, so its presence means the folder is complete."""
        return self.path / "outcome.json"

    @property
    def provenance(self) -> Path:
        """Code, packages, machine, data and base digests."""
        return self.path / "provenance.json"

    @property
    def log_text(self) -> Path:
        """The training log for people."""
        return self.path / "training_log.txt"

    @property
    def log_json(self) -> Path:
        """The training log for machines."""
        return self.path / "training_log.json"

    @property
    def adapter(self) -> Path:
        """The best adapter, in PEFT's layout."""
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """The best weights of a full fine-tune, in transformers' layout."""
        return self.path / "model"

    @property
    def merged(self) -> Path:
        """Base and adapter as one model, where artifacts.merged asks for it."""
        return self.path / "merged"

    @property
    def data_card(self) -> Path:
        """What the trial was trained on: counts, lengths, rows with their loss mask (Markdown)."""
        return self.path / "data_card.md"

    @property
    def samples(self) -> Path:
        """Answers to the qualitative prompts, untuned and tuned (Markdown; JSON beside it)."""
        return self.path / "samples.md"

    @property
    def archive(self) -> Path:
        """The adapter (or the weights) as one file, where artifacts.zip asks for it."""
        return self.path / f"{(self.artifact or self.adapter).name}.zip"

    @property
    def checkpoints(self) -> Path:
        """Resume state while the trial runs; removed when it ends."""
        return self.path / "checkpoints"

    @property
    def lock(self) -> Path:
        """Held by the worker that trains here."""
        return self.path / ".lock"

    @property
    def tracking(self) -> Path:
        """What is to be recorded of a trial without a study (sweeper.tracking.tracking_ledger)."""
        return self.path / ".tracking"

    @property
    def spent(self) -> Path:
        """What the trial's attempts had cost when the newest checkpoint was written."""
        return self.checkpoints / "spent.json"

    @property
    def artifact(self) -> Path | None:
        """What the trial is kept for: the adapter or the full model, if it got that far."""
        return next((path for path in (self.adapter, self.model) if path.is_dir()), None)

    def forget_checkpoints(self) -> None:
        """Remove the resume state of a trial that is never continued."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def continue_from(self, earlier: TrialFolder) -> None:
        """Take over a cancelled trial's resume state, if it left any: its checkpoints and its spool."""
        if not earlier.checkpoints.is_dir() or self.checkpoints.exists():
            return
        self.path.mkdir(parents=True, exist_ok=True)
        if earlier.metrics.exists():
            shutil.copy2(earlier.metrics, self.metrics)
        earlier.checkpoints.replace(self.checkpoints)
        self.spent.unlink(missing_ok=True)  # the cancelled trial's outcome has told it

    def clear_results(self) -> None:
        """Remove what an earlier attempt wrote, keeping its checkpoints."""
        written = (self.outcome, self.log_text, self.log_json, self.data_card, self.samples)
        for path in (*written, self.samples.with_suffix(".json"), *self.path.glob("*.zip")):
            path.unlink(missing_ok=True)
        for folder in (self.adapter, self.model, self.merged):
            shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class StudyFolder:
    """The folder of one study_name: its database, its lock, its arms' trials, its answer."""

    path: Path

    @property
    def database(self) -> Path:
        """Optuna's storage, one study per arm."""
        return self.path / "study.db"

    @property
    def lock(self) -> Path:
        """Held by the one driver."""
        return self.path / "driver.lock"

    @property
    def inbox(self) -> Path:
        """Commands to the driver, one JSON file each; renamed into it, so that each is whole."""
        return self.path / "inbox"

    @property
    def outbox(self) -> Path:
        """The driver's answers, until whoever asked has read them."""
        return self.path / "outbox"

    @property
    def steering(self) -> Path:
        """Every command that was obeyed or refused, and the totals that commands have raised."""
        return self.path / "steering.json"

    @property
    def standing(self) -> Path:
        """Where the study stands, written anew every few seconds by its driver."""
        return self.path / "standing.json"

    @property
    def tracking(self) -> Path:
        """Entries and marks of the study's runs at MLflow (sweeper.tracking.tracking_ledger)."""
        return self.path / ".tracking"

    @property
    def results(self) -> Path:
        """The answer, for machines."""
        return self.path / "results.json"

    @property
    def report(self) -> Path:
        """The answer, for people (Markdown)."""
        return self.path / "report.md"

    @property
    def page(self) -> Path:
        """The whole answer with its figures, for people: one HTML file."""
        return self.path / "report.html"

    @property
    def figures(self) -> Path:
        """The page's pictures, one SVG file each."""
        return self.path / "figures"

    @property
    def answers(self) -> tuple[Path, ...]:
        """The answer in all its forms."""
        return self.results, self.report, self.page, self.figures

    def worker_log(self, worker: int) -> Path:
        """What worker number `worker` printed."""
        return self.path / f"worker_{worker}.log"

    def trial(self, arm: str, number: int) -> TrialFolder:
        """The folder of trial `number` of an arm."""
        return TrialFolder(self.path / arm / f"trial_{number:04d}")

    def finalist(self, arm: str, number: int, seed: int) -> TrialFolder:
        """The folder of trial `number` of an arm, trained again with another seed."""
        return TrialFolder(self.finalists(arm) / f"trial_{number:04d}_seed_{seed}")

    def finalists(self, arm: str) -> Path:
        """Where an arm's repeats over seeds and their figures on the test split are kept."""
        return self.path / arm / "finalists"

    def adopted(self, arm: str) -> Path:
        """Where the model of an earlier run is fetched to, if it lies on a server."""
        return self.path / arm / "adopted"

    def test_examples(self, arm: str, name: str) -> Path:
        """What a model lost on each example of the test split; `name` says which model."""
        return self.finalists(arm) / "test" / f"{name}.json"

    def general_examples(self, arm: str, digest: str, name: str) -> Path:
        """What a model lost on each window of the general text of this digest."""
        return self.finalists(arm) / "general" / digest[:12] / f"{name}.json"


@dataclass(frozen=True)
class NightsFolder:
    """The nights of all sets under one output_dir."""

    path: Path

    @classmethod
    def under(cls, output_dir: Path) -> NightsFolder:
        """Beside the studies that the nights train."""
        return cls(output_dir / "nightly")

    @property
    def database(self) -> Path:
        """Which nights were run: one row per set and local date."""
        return self.path / "nights.db"

    def lock(self, set_name: str) -> Path:
        """Held by the process that runs the set."""
        return self.path / f"{set_name}.lock"

    def holder(self, set_name: str) -> Path:
        """Who holds the lock, and for which night."""
        return self.path / f"{set_name}.running.json"

    def night(self, set_name: str, date: str) -> NightFolder:
        """The folder of one night, by its local date."""
        return NightFolder(self.path / set_name / date)

    def dates(self, set_name: str) -> list[str]:
        """The nights of a set that left a record, the latest first."""
        records = (self.path / set_name).glob("*/night.json")
        return sorted((record.parent.name for record in records), reverse=True)


@dataclass(frozen=True)
class NightFolder:
    """What one night leaves behind."""

    path: Path

    @property
    def record(self) -> Path:
        """What was decided and what came of it; a night that was cut short goes on from here."""
        return self.path / "night.json"

    @property
    def digest(self) -> Path:
        """The morning's page (Markdown)."""
        return self.path / "digest.md"

    @property
    def page(self) -> Path:
        """The same as a web page."""
        return self.path / "digest.html"


def size_mib(folder: Path) -> float:
    """Size of all files under a folder, in MiB."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20
