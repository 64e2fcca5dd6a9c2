"""No judgement without a reader: what is judged in a trial, for whom, and nothing twice."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import sweeper
from sweeper.core.outcome import SELF_ENDED, StopCause
from sweeper.evaluation import judge as judge_module
from sweeper.evaluation.judge import Judgement, ModelJudge
from sweeper.evaluation.judgement_readers import JudgementReader
from sweeper.search.states import STATES
from sweeper.training import prompt_answers
from sweeper.training.trial_runner import TransformersRunner
from tests.training.conftest import RunTiny
from tests.training.recorder import Recorder

ANSWERS = ("evaluation.generation.num_examples=2", "evaluation.generation.max_new_tokens=2")
ASKED = "evaluation.prompts=[{category: creative, prompt: Write a haiku about the ocean.}]"
SAMPLE = "evaluation.look_rows=1"
ROUGE = ("objective.metric=eval/rougeL", "objective.direction=maximize")


class Stopper(Recorder):
    """An observer that asks for a stop after one look."""

    def __init__(self, cause: StopCause) -> None:
        super().__init__(stop_after=1)
        self._cause = cause

    def stop_cause(self) -> StopCause | None:
        return self._cause if super().stop_cause() else None


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts judgements by reader and rows, and generations of answers."""
    found: Counter[str] = Counter()
    judging, generate = ModelJudge.__call__, judge_module.generate

    def counted(judge: ModelJudge, model: Any, reader: JudgementReader) -> Judgement:
        found[f"{reader} {len(judge.rows)}"] += 1
        return judging(judge, model, reader)

    def answered(*arguments: Any) -> Any:
        found["answers"] += 1
        return generate(*arguments)

    monkeypatch.setattr(ModelJudge, "__call__", counted)
    monkeypatch.setattr(judge_module, "generate", answered)
    monkeypatch.setattr(prompt_answers, "generate", answered)
    return found


def test_every_reader_is_named_by_a_judgement() -> None:
    """A reader that no call names would be a judgement that was removed."""
    texts = [path.read_text("utf-8") for path in Path(sweeper.__file__).parent.rglob("*.py")]
    named = {
        reader
        for reader in JudgementReader
        if any(f"JudgementReader.{reader.name}" in text for text in texts)
    }
    assert named == set(JudgementReader)


def test_the_trials_that_are_judged_whole_are_those_that_compare() -> None:
    """The table of states calls the same trials complete."""
    assert {cause for cause, row in STATES.items() if row.complete} == SELF_ENDED


@pytest.mark.parametrize("cause", ["pruned", pytest.param("cancelled", marks=pytest.mark.slow)])
def test_a_stopped_trial_keeps_its_last_look(
    run_tiny: RunTiny, judged: Counter[str], cause: StopCause
) -> None:
    """One look at the sample is all: no whole split, no answers, no samples, no merged model."""
    outcome, looks, folder = run_tiny(
        *("t", *ANSWERS, SAMPLE, ASKED, "artifacts.merged=true", "adapter.lora_dropout=0.0"),
        observer=Stopper(cause),
        runner=TransformersRunner(threads=1),
    )
    assert outcome.cause == cause
    assert judged == {"look 1": 1, "answers": 1}, "the untuned base answers before the first trial"
    assert (outcome.best_step, outcome.best_value) == looks[0]
    assert outcome.metrics["best/eval_loss"] == outcome.best_value
    assert outcome.look_rows == 1
    assert not folder.samples.exists()
    assert not folder.merged.exists()
    assert "best/eval_rougeL" not in outcome.metrics


def test_the_whole_split_is_judged_once_for_the_kept_checkpoint(
    run_tiny: RunTiny, judged: Counter[str]
) -> None:
    """Three looks at a sample, and one judgement with answers of the trial that ran to its end."""
    outcome, _, _ = run_tiny("t", *ANSWERS, SAMPLE)
    assert outcome.cause == "finished"
    rows = int(outcome.metrics["data/validation_rows"])
    assert judged == {"look 1": 3, f"result {rows}": 1, "answers": 1}
    assert outcome.look_rows is None
    assert "best/eval_rougeL" in outcome.metrics


def test_a_loss_on_the_whole_split_is_not_measured_twice(
    run_tiny: RunTiny, judged: Counter[str]
) -> None:
    """Where a look is at the whole split, only the answers of the kept checkpoint are added."""
    outcome, looks, _ = run_tiny("t", *ANSWERS)
    rows = int(outcome.metrics["data/validation_rows"])
    assert judged == {f"look {rows}": 3, "answers": 1}
    assert outcome.best_value == min(value for _, value in looks)
    assert "best/eval_rougeL" in outcome.metrics


@pytest.mark.slow
def test_an_objective_of_answers_gets_them_at_every_look(
    run_tiny: RunTiny, judged: Counter[str]
) -> None:
    """ROUGE-L chooses the checkpoint, so each look generates; a pruned trial keeps its look's ROUGE."""
    outcome, _, _ = run_tiny("t", *ANSWERS, SAMPLE, *ROUGE, observer=Stopper("pruned"))
    assert judged == {"look 1": 1, "answers": 1}
    assert outcome.best_value == outcome.metrics["best/eval_rougeL"]


def test_the_untuned_base_answers_once_for_all_trials_of_a_worker(
    run_tiny: RunTiny, judged: Counter[str]
) -> None:
    """A second trial asks the tuned model only; other prompts are asked again."""
    runner = TransformersRunner(threads=1)
    short = ("training.max_steps=1", "evaluation.generation.max_new_tokens=2")
    counts, other = [], ASKED.replace("ocean", "sea")
    for name, prompt in (("a", ASKED), ("b", ASKED), ("c", other)):
        _, _, folder = run_tiny(name, *short, prompt, runner=runner)
        counts.append(judged.pop("answers"))
    assert counts == [2, 1, 2]
    assert folder.samples.exists()
