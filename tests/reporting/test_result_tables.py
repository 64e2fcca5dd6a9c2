"""The answer in tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sweeper.config.space import Choice, Interval
from sweeper.core.errors import StudyError
from sweeper.core.outcome import LOOK_ROWS
from sweeper.core.paths import StudyFolder, write_json
from sweeper.reporting.intervals import ArmContrast, IntervalEstimate
from sweeper.reporting.result_tables import comparison, conditions, leaderboard, markdown_report
from sweeper.reporting.results import from_document, load_results, number_ranges, to_document
from sweeper.reporting.verdict import judge
from tests.reporting.studies import (
    FACTS,
    FULL_COSTS,
    LORA_COSTS,
    ROUGE,
    ROUGE_FACTS,
    make_arm,
    make_results,
    make_trial,
    two_arms,
)

CONTRAST = ArmContrast(
    arm="lora",
    reference="full",
    split="test",
    examples=300,
    seeds=(3, 2),
    losses=(4.06, 4.01),
    base_loss=4.5,
    difference=IntervalEstimate(value=0.05, low=0.03, high=0.07),
    retained=IntervalEstimate(value=90.0, low=86.0, high=94.0),
    noise=(0.004, 0.006),
    standard_error=0.01,
    freedom=8.0,
    seed_share=0.4,
    p_value=0.001,
    fresh=True,
)


def test_ranking_puts_complete_trials_first() -> None:
    """A pruned trial never ranks above a finished one, a failed one never above a pruned one."""
    arm = make_arm(
        "lora",
        [
            make_trial("lora", 0, "oom", 1.0),
            make_trial("lora", 1, "pruned", 3.0),
            make_trial("lora", 2, "finished", 4.2),
            make_trial("lora", 3, "early_stopped", 4.1),
        ],
    )
    assert [trial.number for trial in arm.trials] == [3, 2, 1, 0]
    assert arm.best is arm.trials[0]
    assert arm.finished == 2


def test_a_leaderboard_names_the_rows_of_a_value_of_a_sample() -> None:
    """Only where a pruned trial's value is not of the whole split."""
    sampled = make_trial("lora", 1, "pruned", 3.5, {LOOK_ROWS: 96.0})
    arm = make_arm("lora", [make_trial("lora", 0, "finished", 4.0), sampled])
    sheet = leaderboard(arm)
    assert [row[-1] for row in sheet.rows] == ["finished", "pruned (value of 96 rows)"]
    assert [row[-3] for row in sheet.rows] == ["4.0000", "3.5000"]


def test_ranking_of_a_maximised_objective_puts_the_highest_first() -> None:
    """ROUGE 0.5 before 0.4, pruned ones after them likewise."""
    trials = [
        make_trial("lora", 0, "pruned", 0.7),
        make_trial("lora", 1, "finished", 0.4),
        make_trial("lora", 2, "pruned", 0.8),
        make_trial("lora", 3, "finished", 0.5),
        make_trial("lora", 4, "oom", None),
    ]
    arm = make_arm("lora", trials, objective=ROUGE, facts=ROUGE_FACTS)
    assert [trial.number for trial in arm.trials] == [3, 1, 2, 0, 4]
    assert arm.best is arm.trials[0]


def test_columns_are_named_after_the_objective() -> None:
    """eval rougeL, and a ROUGE above the base's is a plus."""
    sheet = comparison(two_arms(0.4, 0.5, objective=ROUGE, facts=ROUGE_FACTS))
    row = dict(zip(sheet.columns, sheet.rows[2], strict=True))
    assert (row["eval rougeL"], row["change"]) == ("0.4000", "+0.3000")
    assert sheet.rows[0][sheet.columns.index("eval rougeL")] == "0.1000"
    assert "eval loss" not in sheet.columns


def test_comparison_has_a_row_per_base_and_per_arm() -> None:
    """Untuned base in both precisions, QLoRA, full fine-tuning; every row has every column."""
    sheet = comparison(two_arms(4.05, 4.0))
    assert [row[0] for row in sheet.rows] == [
        *("untuned, nf4", "untuned, float32", "QLoRA", "full fine-tuning")
    ]
    assert sheet.rows[2][sheet.columns.index("change")] == "-0.4500"
    assert "test loss" not in sheet.columns
    assert all(len(row) == len(sheet.columns) for row in sheet.rows)


def test_comparison_shows_the_test_loss_where_there_is_one() -> None:
    """Once finalists were judged on the test split, their mean loss is a column."""
    results = two_arms(4.05, 4.0)
    sheet = comparison(make_results(*results.arms, contrasts=(CONTRAST,)))
    at = sheet.columns.index("test loss")
    assert [row[at] for row in sheet.rows] == ["–", "–", "4.0600", "4.0100"]
    assert all(len(row) == len(sheet.columns) for row in sheet.rows)


def test_reduction_of_parameters_agrees_with_a_published_report() -> None:
    """GPT-2 with LoRA r=8 on c_attn: 0.2364 % of all weights, and 99.76 % fewer than the base's."""
    costs = {
        **LORA_COSTS,
        "parameters/trainable": 294_912.0,
        "parameters/trainable_percent": 100 * 294_912 / 124_734_720,
        "parameters/trainable_percent_of_base": 100 * 294_912 / 124_439_808,
    }
    facts = FACTS.model_copy(update={"base_parameters": 124_439_808})
    arm = make_arm("lora", [make_trial("lora", 0, "finished", 4.0, costs)], facts=facts)
    sheet = comparison(make_results(arm))
    row = dict(zip(sheet.columns, sheet.rows[-1], strict=True))
    assert row["trainable"] == "294,912"
    assert row["of total"] == "0.2364 %"
    assert row["of base"] == "0.237 %"
    assert row["fewer"] == "99.76 %"


def test_conditions_name_what_an_arm_was_trained_with() -> None:
    """Trials, seeds, weights, optimiser, effective batch, and the best rate within its range."""
    trials = [make_trial("lora", n, "finished", 4.0 + n, LORA_COSTS) for n in range(2)]
    failed = [make_trial("full", 0, "oom", None, FULL_COSTS)]
    sheet = conditions(
        make_results(
            make_arm("lora", trials, rates=(3e-4, 3e-2)),
            make_arm("full", failed, "full fine-tuning", "float32"),
        )
    )
    row = dict(zip(sheet.columns, sheet.rows[0], strict=True))
    assert row["trials"] == "2"
    assert row["weights"] == "nf4 + float32"
    assert row["optimiser"] == "adamw_torch"
    assert row["batch"] == "8"
    assert row["learning rate"] == "0.001"
    assert row["rates searched"] == "0.0003…0.03"
    assert all(len(row) == len(sheet.columns) for row in sheet.rows)


def test_ranges_are_of_numbers_only() -> None:
    """Intervals and choices of numbers are ranges; names, booleans and single values are not."""
    found = number_ranges(
        {
            "a": Interval(1e-4, 1e-2, log=True),
            "b": Choice((16, 4)),
            "c": Choice(("mlp", "attention")),
            "d": Choice((True, False)),
            "e": Choice((3,)),
        }
    )
    assert {key: (one.values, one.continuous) for key, one in found.items()} == {
        "a": ((1e-4, 1e-2), True),
        "b": ((4.0, 16.0), False),
    }


def test_results_survive_their_document() -> None:
    """results.json holds everything the tables and the verdict need."""
    arms = two_arms(4.05, 4.0).arms
    results = make_results(*arms, contrasts=(CONTRAST,))
    again = from_document(json.loads(json.dumps(to_document(results))))
    assert again == results
    assert markdown_report(again, judge(again)) == markdown_report(results, judge(results))


def test_markdown_has_aligned_tables() -> None:
    """Every table row of the report has as many cells as its header."""
    found = two_arms(4.05, 4.0)
    lines = leaderboard(found.arms[0]).markdown().splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "dropped 3 (3 over_max_length)" in markdown_report(found, judge(found))


def test_report_names_the_studies_that_exist(tmp_path: Path) -> None:
    """An unknown study is answered with the known ones."""
    write_json(StudyFolder(tmp_path / "mine").results, to_document(two_arms(4.0, None)))
    assert load_results("mine", tmp_path).study_name == "mine"
    with pytest.raises(StudyError, match=r"no results of a study 'other'.*mine"):
        load_results("other", tmp_path)
