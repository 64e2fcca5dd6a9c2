"""The qualitative prompts of a trial: answered before and after, never trained on."""

from __future__ import annotations

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from sweeper.config.settings import TrialSettings
from sweeper.core.errors import DataError
from sweeper.training.trial_runner import TransformersRunner
from tests.training.conftest import RunTiny

TUNED = ("adapter=none", "training.learning_rate=0.02", "evaluation.generation.max_new_tokens=6")
ASKED = "evaluation.prompts=[{category: creative, prompt: 'Write a haiku | about the ocean.'}]"
TRAINED_ON = "evaluation.prompts=[{category: code, prompt: 'write  a ONE-line docstring.'}]"


def test_answers_before_and_after_lie_side_by_side(run_tiny: RunTiny) -> None:
    """samples.md and samples.json hold what transformers alone writes with base and stored weights."""
    outcome, _, folder = run_tiny("t", *TUNED, ASKED)
    assert outcome.cause == "finished", outcome.message
    (sample,) = json.loads(folder.samples.with_suffix(".json").read_text(encoding="utf-8"))
    document = json.loads(folder.log_json.read_text(encoding="utf-8"))
    base = TrialSettings.model_validate(document["settings"]).model.base_model
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompt = "### Instruction:\nWrite a haiku | about the ocean.\n\n### Response:\n"
    ids = tokenizer(prompt, return_tensors="pt")
    for key, weights in (("base", base), ("tuned", folder.model)):
        model = AutoModelForCausalLM.from_pretrained(weights)
        written = model.generate(**ids, do_sample=False, max_new_tokens=6)[
            0, ids.input_ids.shape[1] :
        ]
        assert sample[key] == tokenizer.decode(written, skip_special_tokens=True), key
    assert sample["base"] != sample["tuned"]
    assert (sample["category"], sample["prompt"]) == (
        "creative",
        "Write a haiku | about the ocean.",
    )
    table = folder.samples.read_text(encoding="utf-8").splitlines()
    assert table[0] == "| category | prompt | base | tuned |"
    assert table[2].startswith("| creative | Write a haiku \\| about the ocean. | ")


def test_without_prompts_there_is_no_file(run_tiny: RunTiny) -> None:
    """Nothing asked, nothing written; and an attempt anew takes the old answers away."""
    _, _, folder = run_tiny("t", "training.max_steps=1")
    assert not folder.samples.exists()
    folder.samples.write_text("of an earlier attempt", encoding="utf-8")
    folder.clear_results()
    assert not folder.samples.exists()


def test_a_prompt_that_was_trained_on_refuses_the_trial(run_tiny: RunTiny) -> None:
    """Whatever its case and white space; the probe says so before any trial."""
    outcome, _, folder = run_tiny("t", TRAINED_ON)
    assert outcome.cause == "refused"
    assert "1 of 1 prompts occur in the training split" in (outcome.message or "")
    assert not folder.adapter.exists()
    assert not folder.samples.exists()
    document = json.loads(folder.log_json.read_text(encoding="utf-8"))
    settings = TrialSettings.model_validate(document["settings"])
    with pytest.raises(DataError, match="occur in the training split"):
        TransformersRunner(threads=1).probe(settings)
