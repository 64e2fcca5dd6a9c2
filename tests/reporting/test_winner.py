"""Using the winner: the file that trains it again, and the lines that load, serve and publish it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sweeper.config.compose import compose
from sweeper.config.settings import TrialSettings, validate
from sweeper.core.errors import StudyError
from sweeper.core.manifest import write_manifest
from sweeper.core.paths import StudyFolder, write_atomic
from sweeper.core.trained_form import TRAINED_FORM, TrainedForm
from sweeper.reporting.results import StudyResults
from sweeper.reporting.winner import WinningTrial, experiment_yaml, find_winner, usage
from sweeper.search.study_plan import studies
from tests.conftest import make_settings
from tests.reporting.studies import make_arm, make_results, make_trial


def _results() -> StudyResults:
    trials = [make_trial("lora", 0, "finished", 4.1), make_trial("lora", 7, "finished", 4.0)]
    full = [make_trial("full", 2, "oom", None)]
    return make_results(make_arm("lora", trials), make_arm("full", full, "full fine-tuning"))


FORM = TrainedForm(
    base="org/model",
    revision="abc",
    base_digest="0" * 64,
    architecture="LlamaForCausalLM",
    quantization="nf4",
    dtype="bfloat16",
    max_length=96,
    template="chat",
    end_tokens=("<|im_end|>",),
    data_digest="1" * 64,
)


def _winner(folder: Path, *overrides: str, template: str = "", **form: object) -> WinningTrial:
    """The best trial, stored with these settings in this form."""
    winner = find_winner(_results(), StudyFolder(folder))
    settings = make_settings(*overrides).trial
    write_atomic(winner.folder.config, json.dumps(settings.model_dump(mode="json")))
    kept = winner.folder.adapter if settings.adapter.method == "lora" else winner.folder.model
    kept.mkdir(parents=True)
    write_atomic(kept / TRAINED_FORM, FORM.model_copy(update=form).model_dump_json())
    write_atomic(kept / "chat_template.jinja", template or "{{ messages }}")
    write_manifest(kept)
    return winner


def test_the_best_trial_wins_unless_another_is_named(tmp_path: Path) -> None:
    """The first arm's best; any arm and number may be named, and what exists is listed."""
    folder = StudyFolder(tmp_path)
    assert find_winner(_results(), folder).folder == folder.trial("lora", 7)
    assert find_winner(_results(), folder, "full", 2).trial.number == 2
    for wrong, message in (
        ({"arm": "qlora"}, "arms: lora, full"),
        ({"number": 3}, "trials: 0, 7"),
        ({"arm": "full"}, "no finished trial"),
    ):
        with pytest.raises(StudyError, match=message):
            find_winner(_results(), folder, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "overrides",
    [
        ("adapter.r=4", "training.learning_rate=0.00123", "adapter.target_modules=[q_proj,v_proj]"),
        ("adapter=none", "quantization=none", "training.num_train_epochs=3"),
        (
            "model.base_model=org/model",
            "training=real",
            "evaluation=real",
            "++data.columns.prompt=q",
        ),
    ],
    ids=["lora", "full", "another base"],
)
def test_best_yaml_is_an_experiment(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    """In the user's conf/experiment it composes to the trial's very settings, alone and in a study."""
    winner = _winner(tmp_path / "outputs" / "mine", *overrides)
    conf = tmp_path / "conf"
    write_atomic(conf / "experiment" / "best.yaml", experiment_yaml(winner))
    given = ["+experiment=best", f"hydra.searchpath=[file://{conf}]"]
    config = compose(given).config
    parts = {key: config[key] for key in TrialSettings.model_fields}
    assert validate(TrialSettings, parts) == winner.settings
    arm = studies([*given, "hydra.sweeper.study_name=again"])[0].arms[0]
    assert arm.settings.trial == winner.settings


def test_usage_of_an_adapter(tmp_path: Path) -> None:
    """PEFT's lines, vLLM's with the next rank it takes, and the upload, all with the adapter's path."""
    winner = _winner(tmp_path, "model.base_model=org/model", "adapter.r=12", "model.revision=abc")
    text, path = usage(winner), winner.artifact.as_posix()
    assert "AutoModelForCausalLM.from_pretrained('org/model', revision='abc', dtype=" in text
    assert f"PeftModel.from_pretrained(base, '{path}')" in text
    assert f"model.generation_config = GenerationConfig.from_pretrained('{path}')" in text
    served = (
        "vllm serve org/model --revision abc --enable-lora --max-lora-rank 16 "
        f"--lora-modules mine={path} --generation-config {path} "
        f"--chat-template {path}/chat_template.jinja"
    )
    assert served in text
    assert f"hf upload YOUR_NAME/mine {path}" in text


@pytest.mark.parametrize(
    ("override", "reason"),
    [("adapter.use_dora=true", "DoRA"), ("adapter.r=1024", "ranks above 512")],
)
def test_what_vllm_cannot_serve_is_merged(tmp_path: Path, override: str, reason: str) -> None:
    """The line says why, and serves the merged model instead."""
    text = usage(_winner(tmp_path, "model.base_model=org/model", override))
    assert f"vLLM serves no {reason}" in text
    assert "--enable-lora" not in text


@pytest.mark.parametrize(
    ("template", "parser"),
    [
        ("<tool_call>", "hermes"),
        ("[TOOL_CALLS]", "mistral"),
        ("<|python_tag|>", "llama3_json"),
        ("unknown", "PARSER_OF_THIS_TEMPLATE"),
    ],
)
@pytest.mark.parametrize("kind", [(), ("adapter=none", "quantization=none")], ids=["lora", "full"])
def test_a_server_gets_what_was_trained(
    tmp_path: Path, template: str, parser: str, kind: tuple[str, ...]
) -> None:
    """Variables of the template and the parser of tool calls are in the command of both kinds."""
    form = {"tools": True, "chat_template_kwargs": {"enable_thinking": False}}
    text = usage(_winner(tmp_path, *kind, template=template, **form))
    assert f"--enable-auto-tool-choice --tool-call-parser {parser}" in text
    assert """--default-chat-template-kwargs '{"enable_thinking": false}'""" in text
    assert "enable_thinking=False" in text


def test_a_template_that_differs_is_a_warning(tmp_path: Path) -> None:
    """The second line says what the stored template gives instead of the training's tokens."""
    text = usage(_winner(tmp_path, template_problem="it gives 3 tokens"))
    assert "WARNING: the stored chat template" in text
    assert "it gives 3 tokens" in text


def test_a_model_of_an_earlier_version_is_said(tmp_path: Path) -> None:
    """Without the form there are no lines for prompts, and the command that makes one is named."""
    winner = _winner(tmp_path, "model.base_model=org/model")
    (winner.folder.adapter / TRAINED_FORM).unlink()
    write_manifest(winner.folder.adapter)
    text = usage(find_winner(_results(), StudyFolder(tmp_path)))
    assert "An earlier version stored this model without" in text
    assert "apply_chat_template" not in text
    assert "--generation-config" not in text


def test_a_local_base_is_published_first(tmp_path: Path) -> None:
    """An adapter that names a folder of this machine is of no use to others."""
    assert "Before: publish the base" in usage(_winner(tmp_path, base=None, revision=None))
    assert "Before: publish the base" not in usage(_winner(tmp_path / "hub"))


def test_usage_of_a_full_fine_tune(tmp_path: Path) -> None:
    """Its weights are loaded and served as they are; there is nothing to merge."""
    winner = _winner(tmp_path, "adapter=none", "quantization=none")
    text = usage(winner)
    assert f"vllm serve {winner.artifact.as_posix()}" in text
    assert "peft" not in text
    assert "Merge" not in text


def test_a_removed_folder_is_said(tmp_path: Path) -> None:
    """Without its folder a trial cannot be used, and the message names it."""
    winner = find_winner(_results(), StudyFolder(tmp_path))
    for use in (experiment_yaml, usage):
        with pytest.raises(StudyError, match="trial_0007"):
            use(replace(winner))
