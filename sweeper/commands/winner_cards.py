"""Add to the cards of a study's winners how good they are as they are served."""

from __future__ import annotations

from sweeper.core.manifest import renew_entry
from sweeper.core.paths import StudyFolder, write_atomic
from sweeper.core.stored_files import read_words
from sweeper.reporting.results import StudyResults
from sweeper.reporting.served_forms import served_sentences
from sweeper.reporting.verdict_doubts import label


def add_served_losses(results: StudyResults, folder: StudyFolder) -> None:
    """Write the test losses of each winner in every form into the card of its artifact."""
    for arm in results.arms:
        served = [each for each in results.served if each.arm == arm.name]
        if not served or arm.final is None:
            continue
        artifact = folder.trial(arm.name, arm.final.winner).artifact
        if artifact is None:
            continue
        # After the search, not before: they load torch
        from sweeper.training.artifact import archive_differs, write_zip
        from sweeper.training.model_card import README, with_served

        card = artifact / README
        text = with_served(read_words(card), list(served_sentences(served, {arm.name: label(arm)})))
        if text != read_words(card):
            write_atomic(card, text)
        # Not only with a new card: a driver that was killed after the card left the others as they were
        renew_entry(artifact, README)
        archive = folder.trial(arm.name, arm.final.winner).archive
        if archive.exists() and archive_differs(artifact, archive):
            write_zip(artifact, archive)
