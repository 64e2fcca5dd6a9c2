"""The certificate of a champion: its loss on the test split, which no night reads.

Every evaluation is recorded in the registry and counted, because a test split that was used often has
become another validation split. The module promotes no model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from sweeper.config.compose import read_yaml
from sweeper.config.settings import stored_settings
from sweeper.core.errors import DataError, SweeperError, TrackingError
from sweeper.core.outcome import ExampleLosses, HeldOutKind, HeldOutLosses
from sweeper.core.paths import StudyFolder, TrialFolder
from sweeper.core.stored_files import read_object
from sweeper.core.value import FrozenValue
from sweeper.data.splits import load_splits
from sweeper.reporting.intervals import IntervalEstimate, SeedLosses, contrast
from sweeper.reporting.results import load_results
from sweeper.tracking.registry import ModelRegistry, ModelVersion

CERTIFIED_TAG = "sweeper.certified."
"""Prefix of a version tag, followed by the number of the evaluation."""

Judge = Callable[[TrialFolder], tuple[HeldOutLosses, HeldOutLosses]]
"""Function that returns the losses of a trial's artifact and of its untuned base.

The losses are those on the test split, and on general text if the settings name one.
"""

Digest = Callable[[TrialFolder], str]
"""Function that returns the digest of a trial's splits, as their sources are now."""
DIGEST_CHARS = 12
"""Characters of a digest that messages show."""


class Certificate(FrozenValue):
    """The result of one evaluation of a champion on the test split."""

    at: datetime
    model: str
    version: str
    data_digest: str
    test_loss: float
    """Mean loss in nats per target token."""
    untuned_test_loss: float
    difference: IntervalEstimate
    """Test loss minus the base's, with its paired 95 % interval. Below zero the champion is better."""
    examples: int
    forgetting: float | None
    """Loss on general text minus the untuned base's, in nats per token. None if not measured."""
    look: int
    """Number of this evaluation among those of the model's champions on this test split."""

    @property
    def words(self) -> str:
        """The result in a few sentences."""
        better = self.difference.high is not None and self.difference.high < 0
        verdict = "The champion is better" if better else "The champion is NOT certainly better"
        forgot = "" if self.forgetting is None else f" Forgetting: {self.forgetting:+.4f} nats."
        return (
            f"{self.model}, version {self.version}: test loss {self.test_loss:.4f} against "
            f"{self.untuned_test_loss:.4f} of the untuned base, on {self.examples} examples. {verdict} "
            f"(difference {self.difference.value:+.4f} nats, {self.difference.ends}).{forgot} "
            f"{self._use_of_split}"
        )

    @property
    def _use_of_split(self) -> str:
        if self.look == 1:
            return "This was the first evaluation on this test split."
        return (
            f"This was evaluation {self.look} on this test split. Champions that are selected by "
            "repeated evaluations fit the split, so its losses become too good."
        )


def judge_here(trial: TrialFolder) -> tuple[HeldOutLosses, HeldOutLosses]:
    """Return the losses of a trial's artifact and of its untuned base, computed in this process.

    Raises:
        ArtifactError: nothing is stored, or the files differ from their manifest.
        DataError: the data have no test split.
    """
    # Imported here, because it loads torch, which no other command of the registry needs.
    from sweeper.training.trial_runner import TransformersRunner

    settings = stored_settings(read_yaml(trial.config))
    general = settings.evaluation.general_text.source is not None
    kinds: Sequence[HeldOutKind] = ("test", "general") if general else ("test",)
    runner = TransformersRunner(threads=os.cpu_count() or 1)
    return runner.test(settings, trial, kinds), runner.test(settings, None, kinds)


def digest_today(trial: TrialFolder) -> str:
    """Return the digest of a trial's data, read again: a source may have changed since training.

    Raises:
        DataError: the data cannot be read any more.
    """
    return load_splits(stored_settings(read_yaml(trial.config)).data).digest


def certify(
    model: str,
    registry: ModelRegistry,
    judge: Judge = judge_here,
    digest_now: Digest = digest_today,
) -> Certificate:
    """Evaluate a model's champion on its own test split, and record the result in the registry.

    Args:
        model: name of the registered model.
        registry: the registry that holds the model.
        judge: function that computes the losses.
        digest_now: function that reads the data's digest again.

    Raises:
        TrackingError: there is no champion, or the registry cannot be reached.
        ArtifactError: the champion's weights are missing or were changed.
        DataError: the data have no test split, or changed since the champion was trained.
    """
    # The champion is read once, so that a promotion in the meantime changes nothing.
    champion = registry.champion(model)
    if champion is None:
        raise TrackingError(f"model {model!r} has no champion to certify")
    trial = TrialFolder(champion.folder)
    if not trial.config.exists():
        raise TrackingError(
            f"version {champion.number} of {model!r} was trained in {trial.path}, which is not on this "
            "machine. Certify it on the machine that has the folder."
        )
    digest = str(
        read_object(trial.provenance, "its data count as unknown").get("data.digest", "unknown")
    )
    # Checked before anything is evaluated, so that a refusal uses up nothing.
    _require_same_data(champion, digest, digest_now(trial))
    # Counted per data digest: another test split has not been used yet.
    look = 1 + len(certificates(registry.versions(model), digest))
    tuned, untuned = judge(trial)
    certificate = _certificate(champion, digest, tuned, untuned, look)
    # Certificates are stored as tags, so that all machines count the same evaluations.
    registry.tag(champion, f"{CERTIFIED_TAG}{look}", certificate.model_dump_json())
    return certificate


def _require_same_data(champion: ModelVersion, trained_on: str, now: str) -> None:
    """Raise DataError if the data's digest changed since the champion was trained."""
    # Changed data are split differently, so today's test split may hold rows of the training.
    if now == trained_on:
        return
    raise DataError(
        f"version {champion.number} of {champion.model!r}: its data changed since it was trained "
        f"(data.digest is {now[:DIGEST_CHARS]}, not {trained_on[:DIGEST_CHARS]} as in its provenance). "
        "It may have been trained on rows of today's test split, so nothing was evaluated. Restore the "
        f"data that {TrialFolder(champion.folder).config} names, or certify the champion of a study "
        "on today's data."
    )


def certificates(versions: Sequence[ModelVersion], data_digest: str) -> list[Certificate]:
    """Return all certificates of a model's versions on the test split of the given data."""
    found = [
        _certificate_in(text)
        for version in versions
        for key, text in version.tags.items()
        if key.startswith(CERTIFIED_TAG)
    ]
    return [each for each in found if each is not None and each.data_digest == data_digest]


def _certificate_in(text: str) -> Certificate | None:
    """Return the certificate in a tag, or None if somebody else has written the tag."""
    try:
        return Certificate.model_validate_json(text)
    except ValidationError:
        return None


def evaluation_by_study(champion: ModelVersion, output_dir: Path) -> str | None:
    """Return a note if the champion's own study evaluated its finalists on the test split, else None."""
    try:
        results = load_results(champion.study, output_dir)
    # The note is optional: the study may be deleted or on another machine.
    except (SweeperError, OSError, json.JSONDecodeError):
        return None
    arms = [arm.name for arm in results.arms if arm.final is not None and arm.final.test_losses]
    if not arms:
        return None
    return (
        f"Its study {StudyFolder(output_dir / champion.study).path} also evaluated the winners of "
        f"{', '.join(arms)} on the test split (finalists.test)."
    )


def _certificate(
    champion: ModelVersion, digest: str, tuned: HeldOutLosses, untuned: HeldOutLosses, look: int
) -> Certificate:
    assert tuned.test is not None
    assert untuned.test is not None
    base = _as_one_seed(untuned.test)
    # The untuned base is both the reference and the zero line here.
    found = contrast(("champion", "untuned"), _as_one_seed(tuned.test), base, base)
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


def _as_one_seed(examples: ExampleLosses) -> SeedLosses:
    return SeedLosses(np.array([examples.nll]), np.array(examples.tokens, dtype=np.float64))
