"""The qualitative prompts of a trial: answered before and after, never trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from sweeper.config.settings import TrialSettings
from sweeper.core.errors import DataError
from sweeper.training.prepared_data import prepare_rows
from sweeper.training.trial_runner import TransformersRunner
from tests.conftest import make_settings
from tests.data.chat import CHATML, byte_level
from tests.data.samples import write_rows
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


ROWS: dict[str, tuple[Callable[[int], dict[str, Any]], str]] = {
    "alpaca": (
        lambda n: {"instruction": f"Say {n}.", "output": str(n)},
        "### Instruction:\nGo on.\n\n### Response:\n",
    ),
    "messages": (
        lambda n: talk_row(f"Say {n}.", str(n)),
        "<|im_start|>user\nGo on.<|im_end|>\n<|im_start|>assistant\n",
    ),
    "prompt_completion": (lambda n: {"prompt": f"Say {n}.", "completion": str(n)}, "Go on."),
    "text": (lambda n: {"text": f"Once {n}."}, "Go on."),
}
"""A row of each kind of format, and the prompt `Go on.` as such rows are trained."""


def talk_row(asked: str, told: str) -> dict[str, Any]:
    """Return a row of two turns."""
    turns = (("user", asked), ("assistant", told))
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


@pytest.mark.parametrize("name", ROWS)
def test_prompts_are_asked_as_the_rows_are_trained(name: str, tmp_path: Path) -> None:
    """A base with a chat template that is tuned on another form is asked in that form."""
    row, expected = ROWS[name]
    path = write_rows(tmp_path / "rows.jsonl", map(row, range(20)))
    settings = make_settings(
        f"data.train={path}", "evaluation.prompts=[{category: any, prompt: 'Go on.'}]"
    ).trial
    tokenizer = byte_level(chat_template=CHATML)
    prepared = prepare_rows(settings.data, tokenizer, None, "refuse")
    assert [prompt.text for prompt in prepared.prompts(settings)] == [expected]


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
