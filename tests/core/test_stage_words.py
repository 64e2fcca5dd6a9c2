"""Words about the work of a process: who hears them, and how often."""

from __future__ import annotations

from typing import get_args

from sweeper.core.stage_words import StageListener, count, heard_by, report, stage
from sweeper.evaluation.judgement_readers import JudgementReader
from sweeper.training.trial_costs import STAGE_WORDS, Stage


def test_stages_are_heard_at_once_and_counts_every_two_seconds() -> None:
    """A nested stage gives its counts its own words, and after it the outer one has its own again."""
    said: list[str] = []
    now = 100.0
    with heard_by(StageListener(said.append, lambda: now)), stage("training"):
        for step in range(6):
            now += 1
            report(f"step {step}")
        with stage("judging a sample"):
            now += 2
            count(1000, 20_000, "rows")
        now += 2
        count(1, 2, "epochs")
    assert said == [
        "training",
        "step 1",
        "step 3",
        "step 5",
        "judging a sample",
        "judging a sample: 1,000 of 20,000 rows",
        "training: 1 of 2 epochs",
    ]


def test_without_a_listener_nothing_is_said() -> None:
    """Code that counts runs anywhere."""
    said: list[str] = []
    with heard_by(StageListener(said.append)):
        pass
    with stage("loading"):
        count(1, 2, "rows")
    assert said == []


def test_every_stage_and_every_reader_has_words() -> None:
    """No part of a trial and no judgement is silent."""
    assert set(STAGE_WORDS) == set(get_args(Stage))
    assert all(reader.subject for reader in JudgementReader)
