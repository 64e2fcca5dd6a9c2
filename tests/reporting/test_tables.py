"""The answer in tables and words."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from sweeper.outcome import Facts, Outcome
from sweeper.reporting.results import (
    ArmResult,
    Results,
    TrialResult,
    from_document,
    rank,
    to_document,
)
from sweeper.reporting.tables import comparison, leaderboard, markdown_report, verdict

FACTS = Facts(
    base_digest="b",
    base_commit=None,
    base_metrics={"eval/loss": 4.5, "eval/perplexity": 90.0},
    base_parameters=1000,
    data_digest="d" * 64,
    data_source="rows.jsonl",
    data_format="alpaca",
    rows={"train": 10, "validation": 2, "test": 1},
    dropped={"over_max_length": 3},
    target_tokens=20,
    device="cpu",
    dtype="float32",
)


def _trial(arm: str, number: int, cause: str, value: float | None, **metrics: float) -> TrialResult:
    outcome = Outcome(cause=cause, best_value=value, metrics=metrics)  # type: ignore[arg-type]
    return TrialResult(arm, number, {"training.learning_rate": 1e-3 * (number + 1)}, outcome)


def _results(lora: float | None, full: float | None) -> Results:
    costs = {"parameters/trainable": 50.0, "cost/seconds": 10.0}
    arms = [
        ArmResult("lora", 2, "QLoRA", "nf4", FACTS, (_trial("lora", 0, "finished", lora, **costs),))
    ]
    if full is not None:
        costs = {"parameters/trainable": 1000.0, "cost/seconds": 20.0}
        trials = (_trial("full", 0, "finished", full, **costs),)
        arms.append(ArmResult("full", 1, "full fine-tuning", "float32", FACTS, trials))
    return Results("mine", "+experiment=mine -m", {"git.commit": "abc"}, tuple(arms))


def test_ranking_puts_complete_trials_first() -> None:
    """A pruned trial never ranks above a finished one, a failed one never above a pruned one."""
    trials = [
        _trial("lora", 0, "oom", 1.0),
        _trial("lora", 1, "pruned", 3.0),
        _trial("lora", 2, "finished", 4.2),
        _trial("lora", 3, "early_stopped", 4.1),
    ]
    ranked = rank(trials)
    assert [trial.number for trial in ranked] == [3, 2, 1, 0]
    assert ArmResult("lora", 4, "QLoRA", "nf4", FACTS, ranked).best is ranked[0]


def test_verdict_gives_share_parameters_and_time() -> None:
    """0.45 of 0.5 nats is 90 %, with 5 % of the parameters in half the time."""
    text = verdict(_results(4.05, 4.0))
    assert "reaches 90.0 % of full fine-tuning's improvement" in text
    assert "with 5.0 % of the trainable parameters" in text
    assert "in 0.5× the time a trial" in text


@pytest.mark.parametrize(
    ("lora", "full", "words"),
    [
        (4.6, 4.0, "no better than the untuned base"),
        (4.0, None, "no full fine-tune to compare"),
        (4.0, 4.6, "full fine-tuning does not lower it at all"),
        (None, 4.0, "No LoRA trial has finished yet"),
    ],
)
def test_verdict_claims_no_more_than_the_numbers(
    lora: float | None, full: float | None, words: str
) -> None:
    """No share is computed where there is nothing to take a share of."""
    assert words in verdict(_results(lora, full))


def test_the_share_has_one_zero_line() -> None:
    """A base that NF4 made worse does not flatter QLoRA: both gains count from the full arm's base."""
    results = _results(4.05, 4.0)
    worse = FACTS.model_copy(update={"base_metrics": {"eval/loss": 4.9, "eval/perplexity": 134.0}})
    lora = dataclasses.replace(results.arms[0], facts=worse)
    shown = verdict(dataclasses.replace(results, arms=(lora, results.arms[1])))
    assert "reaches 90.0 % of full fine-tuning's improvement" in shown


def test_comparison_has_a_row_per_base_and_per_arm() -> None:
    """Untuned base in both precisions, QLoRA, full fine-tuning; missing figures are dashes."""
    sheet = comparison(_results(4.05, 4.0))
    assert [row[0] for row in sheet.rows] == [
        *("untuned, nf4", "untuned, float32", "QLoRA", "full fine-tuning")
    ]
    assert sheet.rows[2][5] == "-0.4500"
    assert sheet.rows[2][9] == "–"
    assert all(len(row) == len(sheet.columns) for row in sheet.rows)


def test_results_survive_their_document() -> None:
    """results.json holds everything the tables need."""
    results = _results(4.05, 4.0)
    again = from_document(json.loads(json.dumps(to_document(results))))
    assert again == results
    assert markdown_report(again) == markdown_report(results)


def test_markdown_has_aligned_tables() -> None:
    """Every table row of the report has as many cells as its header."""
    lines = leaderboard(_results(4.05, 4.0).arms[0]).markdown().splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "dropped 3 (3 over_max_length)" in markdown_report(_results(4.05, 4.0))


def test_report_names_the_studies_that_exist(tmp_path: Path) -> None:
    """An unknown study is answered with the known ones."""
    from sweeper.errors import StudyError
    from sweeper.folders import StudyFolder, write_json
    from sweeper.reporting.results import load_results

    write_json(StudyFolder(tmp_path / "mine").results, to_document(_results(4.0, None)))
    assert load_results("mine", tmp_path).study_name == "mine"
    with pytest.raises(StudyError, match=r"no results of a study 'other'.*mine"):
        load_results("other", tmp_path)
