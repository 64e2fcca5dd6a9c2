"""The last word on a champion: its loss on the test split, which no night ever reads.

Every look is recorded in the registry and counted: a split that was looked at often has become another
validation split. Knows the registry and who judges; promotes nobody.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from sweeper.config.compose import read_yaml
from sweeper.config.settings import trial_settings
from sweeper.core.errors import DataError, SweeperError, TrackingError
from sweeper.core.outcome import ExampleLosses, HeldOutKind, HeldOutLosses
from sweeper.core.paths import StudyFolder, TrialFolder, read_json
from sweeper.core.value import FrozenValue
from sweeper.data.splits import load_splits
from sweeper.reporting.intervals import IntervalEstimate, SeedLosses, contrast
from sweeper.reporting.results import load_results
from sweeper.tracking.registry import ModelRegistry, ModelVersion

CERTIFIED_TAG = "sweeper.certified."
"""Followed by the number of the look."""

Judge = Callable[[TrialFolder], tuple[HeldOutLosses, HeldOutLosses]]
"""What a trial's artifact and its untuned base lose on the test split (and general text, if named)."""

Digest = Callable[[TrialFolder], str]
"""Of the splits that a trial's settings name, as their sources are now."""
DIGEST_CHARS = 12
"""Of a digest, shown to people."""


class Certificate(FrozenValue):
    """What one look at the test split found."""

    at: datetime
    model: str
    version: str
    data_digest: str
    test_loss: float
    """Nats per target token."""
    untuned_test_loss: float
    difference: IntervalEstimate
    """Of the two, with its paired 95 % interval over examples: below zero, the champion is ahead."""
    examples: int
    forgetting: float | None
    """Nats per token that it is worse than its base on general text."""
    look: int
    """Number of this judgement of the model's champions on the test split of these data."""

    @property
    def words(self) -> str:
        """For people."""
        sure = self.difference.high is not None and self.difference.high < 0
        forgot = "" if self.forgetting is None else f"; forgetting {self.forgetting:+.4f} nats"
        times = "the first look" if self.look == 1 else f"look number {self.look}"
        return (
            f"{self.model}, version {self.version}: test loss {self.test_loss:.4f} against the untuned "
            f"base's {self.untuned_test_loss:.4f} on {self.examples} examples (difference "
            f"{self.difference.value:+.4f}, 95 % interval {self.difference.low:+.4f} to "
            f"{self.difference.high:+.4f}: {'better' if sure else 'NOT better beyond doubt'}){forgot}. "
            f"This was {times} at the test split of these data."
        )


def judge_here(trial: TrialFolder) -> tuple[HeldOutLosses, HeldOutLosses]:
    """Judge in this process, as finalists are judged.

    Raises:
        ArtifactError: nothing is stored, or not what the manifest says.
        DataError: the data have no test split.
    """
    from sweeper.training.trial_runner import TransformersRunner

    settings = trial_settings(read_yaml(trial.config))
    general = settings.evaluation.general_text.source is not None
    kinds: Sequence[HeldOutKind] = ("test", "general") if general else ("test",)
    runner = TransformersRunner(threads=os.cpu_count() or 1)
    return runner.test(settings, trial, kinds), runner.test(settings, None, kinds)


def digest_today(trial: TrialFolder) -> str:
    """Read a trial's data again: a source may have changed since it was trained.

    Raises:
        DataError: they cannot be read any more.
    """
    return load_splits(trial_settings(read_yaml(trial.config)).data).digest


def certify(
    model: str,
    registry: ModelRegistry,
    judge: Judge = judge_here,
    digest_now: Digest = digest_today,
) -> Certificate:
    """Judge a model's champion on the test split of its own data, and record that it was done.

    Raises:
        TrackingError: there is no champion, or the registry cannot be asked.
        ArtifactError: its weights are gone, or not what was stored.
        DataError: its data have no test split, or are not those it was trained on.
    """
    champion = registry.champion(model)
    if champion is None:
        raise TrackingError(f"model {model!r} has no champion to certify")
    trial = TrialFolder(champion.folder)
    if not trial.config.exists():
        raise TrackingError(
            f"version {champion.number} of {model!r} was trained in {trial.path}, which is not on this "
            "machine; certify it where it is"
        )
    digest = str(read_json(trial.provenance).get("data.digest", "unknown"))
    _require_same_data(champion, digest, digest_now(trial))
    look = 1 + len(looks(registry.versions(model), digest))
    tuned, untuned = judge(trial)
    certificate = _certificate(champion, digest, tuned, untuned, look)
    registry.tag(champion, f"{CERTIFIED_TAG}{look}", certificate.model_dump_json())
    return certificate


def _require_same_data(champion: ModelVersion, trained_on: str, now: str) -> None:
    """Other rows are dealt to other splits: today's test rows may be among those it was trained on.

    Raises:
        DataError: the digests differ.
    """
    if now == trained_on:
        return
    raise DataError(
        f"version {champion.number} of {champion.model!r}: its data changed since it was trained: "
        f"data.digest is {now[:DIGEST_CHARS]} now, not the {trained_on[:DIGEST_CHARS]} of its "
        "provenance, so that it may have been trained on rows of today's test split. Nothing was "
        f"judged; put back the data that {TrialFolder(champion.folder).config} names as they were, "
        "or certify the champion of a study on today's data"
    )


def looks(versions: Sequence[ModelVersion], data_digest: str) -> list[Certificate]:
    """All certificates of a model's versions on the test split of some data."""
    found = [
        Certificate.model_validate_json(text)
        for version in versions
        for key, text in version.tags.items()
        if key.startswith(CERTIFIED_TAG)
    ]
    return [each for each in found if each.data_digest == data_digest]


def other_looks(champion: ModelVersion, output_dir: Path) -> str | None:
    """Whether the champion's own study judged its finalists on the test split, in words."""
    try:
        results = load_results(champion.study, output_dir)
    except (SweeperError, OSError, json.JSONDecodeError):
        return None
    judged = [arm.name for arm in results.arms if arm.final is not None and arm.final.test_losses]
    if not judged:
        return None
    return (
        f"Its study {StudyFolder(output_dir / champion.study).path} judged the winners of "
        f"{', '.join(judged)} on the test split as well (finalists.test)."
    )


def _certificate(
    champion: ModelVersion, digest: str, tuned: HeldOutLosses, untuned: HeldOutLosses, look: int
) -> Certificate:
    assert tuned.test is not None
    assert untuned.test is not None
    base = _judged(untuned.test)
    found = contrast(("champion", "untuned"), _judged(tuned.test), base, base)
    forgetting = None
    if tuned.general is not None and untuned.general is not None:
        forgetting = tuned.general.loss - untuned.general.loss
    return Certificate(
        at=datetime.now(UTC),
        model=champion.model,
        version=champion.number,
        data_digest=digest,
        test_loss=tuned.test.loss,
        untuned_test_loss=untuned.test.loss,
        difference=found.difference,
        examples=found.examples,
        forgetting=forgetting,
        look=look,
    )


def _judged(examples: ExampleLosses) -> SeedLosses:
    return SeedLosses(np.array([examples.nll]), np.array(examples.tokens, dtype=np.float64))
