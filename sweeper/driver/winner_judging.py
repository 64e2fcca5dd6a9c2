"""The judging of an arm's winner and of its untuned base on the test split and on general text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sweeper.config.decisive_settings import accepted_digests, settings_digest
from sweeper.config.input_sources import expected_inputs
from sweeper.config.settings import SCORED_METRICS, TrialSettings
from sweeper.core.input_digests import InputDigests
from sweeper.core.outcome import (
    ArmBaseline,
    ExampleLosses,
    HeldOutKind,
    HeldOutLosses,
    ServeForm,
)
from sweeper.core.paths import TrialFolder, write_atomic
from sweeper.core.stored_files import read_stored
from sweeper.core.trial_identity import TrialIdentity
from sweeper.driver.dispatcher import Dispatcher
from sweeper.driver.finalist_jobs import Candidate, FinalistTraining, JudgeJob
from sweeper.driver.folder_claims import contradictions
from sweeper.driver.jobs import JobList
from sweeper.driver.study_services import StudyServices
from sweeper.reporting.finalist_results import ArmConclusion, FinalistRanking, unseen_metrics

KIND_NAMES: Mapping[HeldOutKind, str] = {"test": "the test split", "general": "general text"}


@dataclass
class WinnerJudging:
    """Judges the seeds of one winner and its untuned base, unless their judgements are on disk."""

    services: StudyServices
    reads_test: bool
    """True if the test split may be read."""
    winner: Candidate
    facts: ArmBaseline
    fresh: Sequence[FinalistTraining] | None = None
    """Trainings with seeds that took no part in the choice. None: the seeds of the choice are judged."""

    def run(self, final: FinalistRanking, dispatcher: Dispatcher) -> ArmConclusion:
        """Return the arm's end with the losses on the unseen texts that there are."""
        kinds = self._kinds()
        if not kinds:
            return ArmConclusion(final)
        # the base as this arm holds it: NF4 alone moves the embedded base's loss by 0.014 nats
        untuned = self._job("untuned", self.winner.settings, None, kinds)
        seeds = self._seed_jobs(kinds)
        served = self._served_jobs(kinds, seeds)
        jobs = [untuned, *seeds.values(), *served.values()]
        # each job once: a form in which the winner is served may be the verdict's own
        self._judge(list(dict.fromkeys(jobs)), dispatcher)
        found = {seed: job.losses for seed, job in seeds.items() if job.losses}
        ended = ArmConclusion.judged(final, found, untuned.losses or HeldOutLosses())
        forms = {form: job.losses for form, job in served.items() if job.losses}
        ended = replace(ended, served=forms)
        for seed in found:
            self._record(ended, seed, self._files(seeds[seed]))
        return ended

    def run_on_test_split(self, dispatcher: Dispatcher) -> dict[int, HeldOutLosses]:
        """Return the losses of the fresh seeds on the test split, by seed, as far as it may be read.

        A configuration that is compared with the winner shares its untuned base, and is not served.
        """
        kinds: tuple[HeldOutKind, ...] = ("test",)
        if "test" not in self._kinds():
            return {}
        jobs = self._seed_jobs(kinds)
        self._judge(list(jobs.values()), dispatcher, "the recipe")
        found = {seed: job.losses for seed, job in jobs.items() if job.losses}
        for seed, losses in found.items():
            loss = None if losses.test is None else losses.test.loss
            self._amend(seed, unseen_metrics(loss, None, None), self._files(jobs[seed]))
        return found

    @property
    def _trial_key(self) -> str:
        return f"{self.winner.arm.name}/{self.winner.number:04d}"

    def _kinds(self) -> tuple[HeldOutKind, ...]:
        """Return the kinds of unseen text that exist and may be read."""
        tested = self.reads_test and self.facts.rows.get("test", 0)
        general = self.facts.general_digest is not None
        return (*(("test",) if tested else ()), *(("general",) if general else ()))

    def _seed_jobs(self, kinds: tuple[HeldOutKind, ...]) -> dict[int, JudgeJob]:
        """Return a job for each seed of the winner that was trained to its end."""
        winner = self.winner
        if self.fresh is not None:
            return self._jobs_of(
                {
                    each.settings.seed: (each.record.folder, each.settings)
                    for each in self.fresh
                    if each.complete
                },
                kinds,
            )
        own = self.services.folder.trial(winner.arm.name, winner.number)
        trained = {winner.settings.seed: (own, winner.settings)} if self._owns(own) else {}
        for training in winner.trainings:
            if training.complete:
                trained[training.settings.seed] = (training.record.folder, training.settings)
        return self._jobs_of(trained, kinds)

    def _served_jobs(
        self, kinds: tuple[HeldOutKind, ...], seeds: Mapping[int, JudgeJob]
    ) -> dict[ServeForm, JudgeJob]:
        """Return a job for each form in which the winner can be served, on the test split.

        The model is the one that `sweeper best` names. Jobs of the verdict are used again.
        """
        winner = self.winner
        own = self.services.folder.trial(winner.arm.name, winner.number)
        if "test" not in kinds or own.artifact is None or not self._owns(own):
            return {}
        known = {} if self.fresh is not None else {self._form: seeds.get(winner.settings.seed)}
        return {
            form: known.get(form) or self._job("served", winner.settings, own, ("test",), form)
            for form in winner.settings.serve_forms
        }

    @property
    def _form(self) -> ServeForm:
        """The form that the verdict is about."""
        return self.winner.settings.evaluation.serve_as

    def _jobs_of(
        self,
        trained: Mapping[int, tuple[TrialFolder, TrialSettings]],
        kinds: tuple[HeldOutKind, ...],
    ) -> dict[int, JudgeJob]:
        return {
            seed: self._job(f"seed_{seed}", settings, folder, kinds)
            for seed, (folder, settings) in trained.items()
        }

    def _job(
        self,
        name: str,
        settings: TrialSettings,
        folder: TrialFolder | None,
        kinds: tuple[HeldOutKind, ...],
        form: ServeForm | None = None,
    ) -> JudgeJob:
        # the seed does not change what is read
        form = form or self._form
        judged = settings.served_as(form)
        served = "" if form == "trained" or judged is settings else f"_{form}"
        return JudgeJob(f"{self._trial_key}_{name}{served}", judged, folder, kinds, self._inputs)

    def _owns(self, folder: TrialFolder) -> bool:
        """Return True if the winner's folder holds the winner's model, and say so if it does not."""
        settings = self.winner.settings
        # neither study nor number: the folder of a copied trial is that of the study it came from
        identity = TrialIdentity(
            study=None,
            trial=None,
            seed=settings.seed,
            settings=settings_digest(settings),
            inputs=self._inputs.of_training,
        )
        reasons = contradictions(folder, identity, accepted_digests(settings, self.winner.asked))
        if reasons:
            self.services.view.event(
                f"{self._trial_key}: not judged: {folder.path} holds the work of another trial "
                f"({', '.join(reasons)})"
            )
        return not reasons

    @property
    def _inputs(self) -> InputDigests:
        winner = self.winner
        return expected_inputs(self.facts, winner.arm.settings.trial, winner.settings)

    def _files(self, job: JudgeJob) -> dict[HeldOutKind, Path]:
        """Return the file in which a model's losses on each kind of text are kept."""
        return {kind: self._file(job, kind) for kind in job.kinds}

    def _file(self, job: JudgeJob, kind: HeldOutKind) -> Path:
        folder, arm = self.services.folder, self.winner.arm.name
        name = f"trial_{job.key.split('/')[-1]}"
        text = {"test": self.facts.test_digest, "general": self.facts.general_digest}[kind]
        parts = [text, settings_digest(job.settings), self._inputs.of_training.model_dump()]
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        path = folder.judged_examples(arm, kind, digest, name)
        # an older version's files were found by the model's name alone, or with the text's digest
        earlier = folder.finalists(arm) / kind / ("" if kind == "test" else f"{text}"[:12])
        older = earlier / path.name
        return older if older.exists() and not path.exists() else path

    def _judge(
        self, jobs: Sequence[JudgeJob], dispatcher: Dispatcher, judged: str = "the winner"
    ) -> None:
        """Read the judgements that are stored, run the others, and store each as it ends."""
        metric = self.winner.settings.objective.metric
        stored = {job.key: _stored(self._files(job), metric) for job in jobs}
        for job in jobs:
            if len(stored[job.key]) == len(job.kinds):
                job.losses = HeldOutLosses(**stored[job.key])
        missing = [job for job in jobs if job.losses is None]
        if missing:
            words = " and ".join(KIND_NAMES[kind] for kind in missing[0].kinds)
            self.services.view.event(f"arm {self.winner.arm.name}: judging {judged} on {words}")
        dispatcher.run(JobList(missing, lambda job: self._ended(job, stored[job.key])))

    def _ended(self, job: JudgeJob, stored: Mapping[str, ExampleLosses]) -> None:
        """Store a judgement, or say why there is none."""
        if job.losses is None:
            if job.problem is not None:  # none if the run was stopped: the next one judges it
                reason = (job.problem.splitlines() or ["no answer"])[-1]
                self.services.view.event(f"{job.key}: not judged: {reason}")
            return
        # kinds that were judged before keep their figures
        job.losses = job.losses.model_copy(update=dict(stored))
        for kind, path in self._files(job).items():
            if (examples := getattr(job.losses, kind)) is not None:
                write_atomic(path, examples.model_dump_json())

    def _record(self, ended: ArmConclusion, seed: int, files: Mapping[HeldOutKind, Path]) -> None:
        """Add a seed's figures to its run."""
        metrics = unseen_metrics(
            ended.final.test_losses.get(seed),
            ended.final.general_losses.get(seed),
            ended.final.untuned_general_loss,
        )
        self._amend(seed, metrics, files)

    def _amend(
        self, seed: int, metrics: dict[str, float], files: Mapping[HeldOutKind, Path]
    ) -> None:
        """Add metrics to a seed's run, dated by the files, so that a repeat adds nothing."""
        trainings = (*self.winner.trainings, *(self.fresh or ()))
        trained = {training.settings.seed: training.record for training in trainings}
        record = trained.get(seed) or self.winner.record(self.services.folder)
        judged_at = max(path.stat().st_mtime for path in files.values())
        self.services.tracker.amend(record, metrics, judged_at)


def _stored(files: Mapping[HeldOutKind, Path], metric: str) -> dict[str, ExampleLosses]:
    """Return the judgements on disk that say all that is asked of them."""
    found = {
        kind: read_stored(path, ExampleLosses, "the model is judged again")
        for kind, path in files.items()
    }
    test = found.get("test")
    # An earlier version kept losses only, which say nothing about an objective such as ROUGE.
    if test is not None and metric in SCORED_METRICS and test.scores is None:
        del found["test"]
    return {str(kind): losses for kind, losses in found.items() if losses is not None}
