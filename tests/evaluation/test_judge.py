"""The one evaluator: the same figures for every kind of model, and nothing in place of a metric."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from sweeper.config.settings import DIRECTIONS, EvaluationSettings, validate
from sweeper.core.errors import ConfigError
from sweeper.core.outcome import ANSWER_RATE, ANSWERING_SECONDS
from sweeper.data.encode import encode_evaluation, encode_prompts
from sweeper.data.tokens import PaddingCollator
from sweeper.evaluation.judge import (
    HeldOutPrompts,
    ModelJudge,
    draw_rows,
    make_judge,
    plausibility_warning,
)
from sweeper.evaluation.judgement_readers import JudgementReader
from sweeper.evaluation.rouge import rouge
from sweeper.evaluation.token_loss import evaluate_examples, total
from sweeper.modeling.base_model import LoadedBase, load_base
from tests.conftest import make_settings
from tests.data.samples import example, make_data


@pytest.fixture(scope="module")
def base() -> LoadedBase:
    """The embedded base in fp32."""
    settings = make_settings("quantization=none")
    return load_base(settings.model, settings.quantization, trained=False)


PLAIN = make_data(template="plain")
EXAMPLES = [
    example(
        f"def {verb}_{noun}(a, b):\n",
        f"{verb.title()} the {noun} of a and b – {'very ' * count}soon.",
    )
    for count, (verb, noun) in enumerate(
        itertools.product(
            ("return", "write", "close", "parse", "send"), ("sum", "file", "name", "list")
        )
    )
]


def judge_of(base: LoadedBase, **options: Any) -> ModelJudge:
    """A judge on 20 rows and 10 held-out prompts, 4 of which are answered."""
    held_out = HeldOutPrompts.of(encode_prompts(EXAMPLES[:10], base.tokenizer, PLAIN))
    document: dict[str, Any] = make_settings().evaluation.model_dump() | options
    document["generation"] |= {"num_examples": 4, "max_new_tokens": 8}
    evaluation = validate(EvaluationSettings, document, "evaluation")
    rows = encode_evaluation(EXAMPLES, base.tokenizer, PLAIN, None, 512).rows
    return make_judge(base.tokenizer, rows, held_out, evaluation, seed=7)


def test_every_named_metric_is_measured(base: LoadedBase) -> None:
    """The judgement holds all that an objective can name, lengths and speed, all finite."""
    judge = judge_of(base)
    judgement = judge(base.model, JudgementReader.RESULT)
    assert set(DIRECTIONS) <= set(judgement.metrics)
    assert all(math.isfinite(value) for value in judgement.metrics.values())
    loss = total(
        evaluate_examples(base.model, judge.rows, PaddingCollator(base.tokenizer.pad_token_id), 8)
    )
    assert judgement.value("eval/loss") == pytest.approx(loss.mean, abs=1e-6)
    assert judgement.value("eval/perplexity") == pytest.approx(math.exp(loss.mean), rel=1e-5)
    bits = loss.nll / math.log(2) / sum(judge.row_bytes)
    assert judgement.value("eval/bits_per_byte") == pytest.approx(bits, rel=1e-5)
    assert len(judgement.examples) == 20
    assert judge.held_out is not None
    scores = rouge([answer.text for answer in judgement.answers], judge.held_out.references)
    assert judgement.value("eval/rougeL") == scores.means["rougeL"]
    assert judgement.metrics["eval/response_words_mean"] > 0


def test_base_lora_and_merged_are_judged_alike(base: LoadedBase) -> None:
    """A LoRA model, the same merged into its base, and the base within disable_adapter agree."""
    judge = judge_of(base)
    untuned = judge(base.model, JudgementReader.RESULT)
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(base.model, config)
    try:
        tuned = judge(model, JudgementReader.RESULT)
        with model.disable_adapter():
            again = judge(model, JudgementReader.RESULT)
        model.merge_adapter()
        merged = judge(model.get_base_model(), JudgementReader.RESULT)
        model.unmerge_adapter()
    finally:
        model.unload()
    for name in set(untuned.metrics) - {ANSWER_RATE, ANSWERING_SECONDS}:
        assert again.metrics[name] == pytest.approx(untuned.metrics[name], abs=1e-5)
        assert merged.metrics[name] == pytest.approx(tuned.metrics[name], rel=1e-4)
    assert abs(tuned.value("eval/loss") - untuned.value("eval/loss")) > 0.01


def test_a_metric_that_was_not_measured_is_an_error(base: LoadedBase) -> None:
    """Asked for ROUGE where nothing was generated, no other metric answers."""
    judgement = judge_of(base).within_trial(["eval/loss"])(base.model, JudgementReader.LOOK)
    message = r"eval/rougeL: not measured\. The measured metrics are .*eval/loss"
    with pytest.raises(ConfigError, match=message):
        judgement.value("eval/rougeL")


def test_looks_inside_a_trial_are_capped_and_cheap(base: LoadedBase) -> None:
    """look_rows rows, the same ones for every judge of the seed; answers only if asked for."""
    judge = judge_of(base, look_rows=5)
    look = judge.within_trial(["eval/loss", "eval/perplexity"])
    assert len(look.rows) == len(look.row_bytes) == 5
    assert look.rows == judge_of(base, look_rows=5).within_trial(["eval/loss"]).rows
    assert look.held_out is None
    assert judge.within_trial(["eval/loss", "eval/rouge1"]).held_out == judge.held_out
    assert len(judge.rows) == 20
    indices = [judge.rows.index(row) for row in look.rows]
    assert [judge.row_bytes[index] for index in indices] == look.row_bytes


@pytest.mark.parametrize("seed", range(5))
def test_a_sample_of_grouped_rows_has_every_groups_share(seed: int) -> None:
    """Groups of 60, 30 and 10 rows that lie mixed have 12, 6 and 2 of 20, to the rounding of a place."""
    groups = [0 if index % 10 < 6 else 1 if index % 10 < 9 else 2 for index in range(100)]
    drawn = draw_rows(100, groups, 20, seed)
    assert drawn == sorted(set(drawn)) == draw_rows(100, groups, 20, seed)
    assert len(drawn) == 20
    shares = [sum(groups[index] == group for index in drawn) for group in range(3)]
    assert shares == pytest.approx([12, 6, 2], abs=1)
    assert draw_rows(100, groups, 100, seed) == draw_rows(100, [], None, seed) == list(range(100))


def test_smaller_batches_change_no_figure(base: LoadedBase) -> None:
    """Halved from 32 down to one example at a time, every figure stays; below that is nothing."""
    judge: ModelJudge | None = judge_of(base)
    assert judge is not None
    whole, sizes = judge(base.model, JudgementReader.RESULT), []
    while judge is not None:
        smallest = judge
        sizes.append(judge.settings.per_device_eval_batch_size)
        judge = judge.halved()
    assert sizes == [32, 16, 8, 4, 2, 1]
    assert smallest.settings.generation.batch_size == 1
    alone = smallest(base.model, JudgementReader.RESULT)
    for name in set(whole.metrics) - {ANSWER_RATE, ANSWERING_SECONDS}:
        assert alone.metrics[name] == pytest.approx(whole.metrics[name], abs=1e-5)
    assert [answer.text for answer in alone.answers] == [answer.text for answer in whole.answers]


def test_answered_prompts_are_drawn_by_the_seed(base: LoadedBase) -> None:
    """num_examples of the held-out prompts, each with its own reference, the same every time."""
    first, second = judge_of(base).held_out, judge_of(base).held_out
    assert first is not None
    assert first == second
    assert len(first.prompts) == len(first.prompt_ids) == len(first.references) == 4
    answers = {given.messages[0].content: given.completion for given in EXAMPLES}
    for prompt, ids, expected in zip(
        first.prompts, first.prompt_ids, first.references, strict=True
    ):
        assert base.tokenizer(prompt)["input_ids"] == ids
        assert answers[prompt] == expected
    assert first.end_token_ids == {base.tokenizer.eos_token_id}


def test_the_users_metric_is_measured_beside_the_others(
    base: LoadedBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """eval/<name> is what the function gives for the very answers that ROUGE judged."""
    import tests.evaluation.test_judge as here

    seen: list[Any] = []

    def count(prompts: list[str], predictions: list[str], references: list[str]) -> float:
        seen.append((prompts, predictions, references))
        return float(len(predictions))

    monkeypatch.setattr(here, "count", count, raising=False)
    name = "tests.evaluation.test_judge"
    options = {"metrics": {"count": f"{name}:count"}, "metric_modules": [name]}
    judge = judge_of(base, **options)
    judgement = judge(base.model, JudgementReader.RESULT)
    assert judgement.value("eval/count") == 4.0
    assert judge.held_out is not None
    assert seen == [
        (
            list(judge.held_out.prompts),
            [answer.text for answer in judgement.answers],
            list(judge.held_out.references),
        )
    ]


def test_perplexities_too_good_to_be_true_are_said_to_be() -> None:
    """The book of report 004 (1.2537 and 1.1211) earns words about overlap; ordinary text does not."""
    for perplexity in (1.2537, 1.1211):
        assert "overlaps the training split" in (plausibility_warning(perplexity) or "")
    assert plausibility_warning(math.exp(0.2261)) is not None
    assert plausibility_warning(3.32) is None
    assert plausibility_warning(math.inf) is None
