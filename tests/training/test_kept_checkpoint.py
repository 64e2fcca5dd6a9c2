"""Which checkpoint a trial keeps, and what it says that checkpoint is worth."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from sweeper.builtin.embedded import BASE_DIR
from sweeper.config.settings import TrialSettings
from sweeper.core.paths import TrialFolder
from sweeper.data.tokens import PaddingCollator
from sweeper.evaluation.judge import Judgement, ModelJudge
from sweeper.evaluation.judgement_readers import JudgementReader
from sweeper.evaluation.token_loss import evaluate_examples, total
from sweeper.modeling.base_model import LoadedBase, load_base
from sweeper.training.prepared_data import PreparedData, prepare
from tests.training.conftest import RunTiny
from tests.training.recorder import Recorder

LEARNS = ("adapter.lora_dropout=0.0", "training.learning_rate=0.02")
ROUGE = (
    *("objective.metric=eval/rougeL", "objective.direction=maximize"),
    *("evaluation.generation.num_examples=2", "evaluation.generation.max_new_tokens=2"),
)


def _reloaded(folder: TrialFolder) -> tuple[PeftModel, LoadedBase, PreparedData, TrialSettings]:
    """A finished trial's adapter on a base loaded anew, its data prepared anew."""
    document = json.loads(folder.log_json.read_text(encoding="utf-8"))
    settings = TrialSettings.model_validate(document["settings"])
    base = load_base(settings.model, settings.quantization, trained=False)
    plain = AutoModelForCausalLM.from_pretrained(settings.model.base_model)
    model = PeftModel.from_pretrained(plain, folder.adapter)
    return model, base, prepare(settings.data, base), settings


def _script_rouge(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """ROUGE-L is 0.1, 0.5, 0.2 from now on; returns where the true losses are noted."""
    losses: list[float] = []
    judged = ModelJudge.__call__

    def scripted(judge: ModelJudge, model: Any, reader: JudgementReader) -> Judgement:
        judgement = judged(judge, model, reader)
        losses.append(judgement.value("eval/loss"))
        scores = {"eval/rougeL": [0.1, 0.5, 0.2][len(losses) - 1]}
        return replace(judgement, metrics={**judgement.metrics, **scores})

    monkeypatch.setattr(ModelJudge, "__call__", scripted)
    return losses


def test_highest_rouge_is_kept_where_the_objective_maximizes(
    run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ROUGE-L 0.1, 0.5, 0.2: the checkpoint of step 4 is stored, though step 6 has the lowest loss."""
    losses = _script_rouge(monkeypatch)
    outcome, reported, folder = run_tiny("t", *ROUGE, *LEARNS)
    assert (outcome.best_value, outcome.best_step) == (0.5, 4)
    assert outcome.metrics["best/eval_rougeL"] == 0.5
    assert outcome.metrics["best/eval_loss"] == losses[1] > losses[2]
    assert reported == list(zip((2, 4, 6), losses, strict=True)), "pruning goes by the loss"
    assert "Best eval/rougeL 0.5000" in folder.log_text.read_text(encoding="utf-8")
    monkeypatch.undo()
    model, base, data, _ = _reloaded(folder)
    collator = PaddingCollator(base.tokenizer.pad_token_id)
    stored = total(evaluate_examples(model, data.validation.rows, collator, 4)).mean
    assert stored == pytest.approx(losses[1], abs=1e-5)


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 2048}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
CONFIGS: dict[str, PretrainedConfig] = {
    "tied": Qwen3Config(**SMALL, **HEADS, tie_word_embeddings=True),
    "experts": Qwen3MoeConfig(**SMALL, **HEADS, **EXPERTS),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_best_weights_of_a_full_fine_tune_are_stored(
    run_tiny: RunTiny, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where transformers stores weights under other names than the model's, or once for two."""
    base = tmp_path / name
    AutoModelForCausalLM.from_config(CONFIGS[name]).save_pretrained(base)
    AutoTokenizer.from_pretrained(BASE_DIR).save_pretrained(base)
    losses = _script_rouge(monkeypatch)
    full = ("adapter=none", "training.learning_rate=0.02", f"model.base_model={base}")
    outcome, _, folder = run_tiny("t", *ROUGE, *full)
    assert outcome.best_step == 4, outcome.message
    assert abs(losses[1] - losses[2]) > 1e-3
    document = json.loads(folder.log_json.read_text(encoding="utf-8"))
    settings = TrialSettings.model_validate(document["settings"])
    loaded = load_base(settings.model, settings.quantization, trained=True)
    model = AutoModelForCausalLM.from_pretrained(folder.model, dtype=torch.float32)
    rows = prepare(settings.data, loaded).validation.rows
    collator = PaddingCollator(loaded.tokenizer.pad_token_id)
    assert total(evaluate_examples(model, rows, collator, 4)).mean == pytest.approx(
        losses[1], abs=1e-5
    )


@pytest.mark.parametrize("where", ["moved", "copied"])
def test_best_checkpoint_is_found_where_the_folder_has_moved(
    run_tiny: RunTiny, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Continued elsewhere and stopped before it saved anew: its best weights count, not its last."""

    class Killed(BaseException):
        pass

    class Killer(Recorder):
        def progress(self, step: int, total_steps: int, tokens_per_second: float) -> None:
            if step >= 5:
                raise Killed

    monkeypatch.setattr("sweeper.training.trial_callback.PROGRESS_SECONDS", 0.0)
    killer = Killer()
    with pytest.raises(Killed):
        run_tiny("here", *LEARNS, observer=killer)
    if where == "moved":
        (tmp_path / "here").rename(tmp_path / "there")
    else:
        shutil.copytree(tmp_path / "here", tmp_path / "there")
        for weights in (tmp_path / "here").rglob("*.safetensors"):
            weights.write_bytes(b"of another trial by now")
    outcome, _, folder = run_tiny("there", *LEARNS, observer=Recorder(stop_after=0))
    assert (outcome.cause, outcome.steps, outcome.best_step) == ("pruned", 5, 4)
    assert outcome.best_value == pytest.approx(killer.losses[1][1], abs=1e-5)
    model, base, data, _ = _reloaded(folder)
    collator = PaddingCollator(base.tokenizer.pad_token_id)
    stored = total(evaluate_examples(model, data.validation.rows, collator, 4)).mean
    assert stored == pytest.approx(killer.losses[1][1], abs=1e-5)


def test_value_is_of_the_whole_split_where_the_looks_are_capped(run_tiny: RunTiny) -> None:
    """evaluation.look_rows=1: the looks see one row, best_value all of them."""
    outcome, looks, folder = run_tiny("t", "evaluation.look_rows=1", *LEARNS)
    step, capped = min(looks, key=lambda item: item[1])
    assert outcome.best_step == step
    model, base, data, _ = _reloaded(folder)
    assert len(data.validation.rows) > 1
    collator = PaddingCollator(base.tokenizer.pad_token_id)
    whole = total(evaluate_examples(model, data.validation.rows, collator, 4)).mean
    assert outcome.best_value == pytest.approx(whole, abs=1e-5)
    assert outcome.metrics["best/eval_loss"] == outcome.best_value
    assert abs(whole - capped) > 1e-3


@pytest.mark.parametrize("objective", [(), ROUGE], ids=["loss", "rouge"])
def test_stored_adapter_judged_anew_gives_the_reported_value(
    objective: tuple[str, ...], run_tiny: RunTiny
) -> None:
    """prepare() and its judge, on a fresh base, find best_value and all it was reported with."""
    outcome, _, folder = run_tiny("t", *objective, *LEARNS)
    model, base, data, settings = _reloaded(folder)
    again = data.judge(settings, base)(model, JudgementReader.RESULT)
    assert again.value(settings.objective.metric) == pytest.approx(outcome.best_value, abs=1e-5)
    for name, value in again.metrics.items():
        if name.startswith("eval/"):
            reported = outcome.metrics[name.replace("eval/", "best/eval_")]
            assert value == pytest.approx(reported, rel=1e-4, abs=1e-5)
