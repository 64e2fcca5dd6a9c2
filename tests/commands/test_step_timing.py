"""A timed trial does little, and its seconds are scaled to the trial that it stands for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from sweeper.commands.step_timing import time_trial
from sweeper.commands.timed_trial import STEPS, WRITTEN_TOKENS
from sweeper.config.settings import TrialSettings
from sweeper.evaluation import judge
from sweeper.evaluation.generation import GeneratedAnswers, batch_tokens
from sweeper.training.trainer import JudgedTrainer
from tests.conftest import make_settings

ANSWERS = 100


def _trial(*overrides: str) -> TrialSettings:
    return make_settings(
        *("evaluation.per_device_eval_batch_size=4", "evaluation.generation.batch_size=8"),
        *(f"evaluation.generation.num_examples={ANSWERS}", "training.max_steps=500"),
        *overrides,
    ).trial


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Record the steps, the judged rows and the answers of a trial while it runs."""
    found: dict[str, list[Any]] = {"steps": [], "rows": [], "answers": []}
    step, rows, answers = JudgedTrainer.training_step, judge.evaluate_examples, judge.generate

    def counted_step(self: JudgedTrainer, *arguments: Any) -> Any:
        found["steps"].append(1)
        return step(self, *arguments)

    def counted_rows(model: Any, judged: Sequence[Any], *arguments: Any) -> Any:
        found["rows"].append(len(judged))
        return rows(model, judged, *arguments)

    def counted_answers(
        model: Any, tokenizer: Any, prompts: Sequence[Any], most: int, *arguments: Any
    ) -> GeneratedAnswers:
        found["answers"].append((len(prompts), most))
        return answers(model, tokenizer, prompts, most, *arguments)

    monkeypatch.setattr(JudgedTrainer, "training_step", counted_step)
    monkeypatch.setattr(judge, "evaluate_examples", counted_rows)
    monkeypatch.setattr(judge, "generate", counted_answers)
    return found


@pytest.mark.parametrize("objective", ["loss", "rougeL"])
def test_a_timed_trial_does_little(work: dict[str, list[Any]], objective: str) -> None:
    """Six steps and three looks at most, each at two batches of rows with one batch of short answers."""
    found = time_trial(_trial(f"objective={objective}"))
    assert found.problem is None
    assert len(work["steps"]) <= STEPS
    assert len(work["rows"]) <= STEPS // 2
    assert set(work["rows"]) == {8}
    assert set(work["answers"]) == {(8, WRITTEN_TOKENS)}
    assert found.rows["validation"] > 100, "the split that is forecast is whole"


def test_answers_count_as_often_as_they_are_written() -> None:
    """Answers belong to the end of a trial, and to its looks only if they choose the trial."""
    plain = time_trial(_trial("evaluation.generation.num_examples=0", "evaluation.look_rows=16"))
    loss = time_trial(_trial("evaluation.look_rows=16"))
    rouge = time_trial(_trial("evaluation.look_rows=16", "objective=rougeL"))
    # 100 answers take many times as long as 16 rows
    assert loss.look_s < 3 * plain.look_s
    assert rouge.look_s > 5 * loss.look_s
    assert plain.answers_s == 0.0
    for answering in (loss, rouge):
        assert answering.answers_s > 3 * plain.look_s
        assert answering.judgement_s < 3 * plain.judgement_s
        assert answering.untuned_s > 3 * plain.untuned_s
    # no search reads the answers to the test split, but an objective that is made of answers does
    assert loss.test_s < 3 * plain.test_s
    assert rouge.test_s > 3 * loss.test_s


def test_a_batch_of_answers_takes_as_long_as_its_longest() -> None:
    """Prompts of similar length are answered together, so 2 and 9 tokens, then 4 and 3."""
    prompts = [[0] * length for length in (1, 7, 2, 8)]
    assert batch_tokens(prompts, [2, 4, 9, 3], 2) == 9 + 4
    assert batch_tokens([], [], 2) == 0
