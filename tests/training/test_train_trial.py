"""Real trials: on the embedded base against plain PEFT, on a tiny one against themselves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from sweeper.builtin.embedded import BASE_DIR
from sweeper.config.settings import RunSettings, TrialSettings
from sweeper.core.outcome import Outcome
from sweeper.core.paths import TrialFolder
from sweeper.core.spool import MetricsSpool
from sweeper.data.tokens import PaddingCollator
from sweeper.evaluation.judgement_readers import JudgementReader
from sweeper.evaluation.token_loss import evaluate_examples, total
from sweeper.modeling.base_model import load_base
from sweeper.modeling.hardware import DeviceReport
from sweeper.training.checkpoint import newest_checkpoint, seal
from sweeper.training.prepared_data import prepare
from sweeper.training.schedule import plan_schedule
from sweeper.training.trial_runner import TransformersRunner
from tests.conftest import make_settings
from tests.training.conftest import RunTiny
from tests.training.recorder import Recorder

SHORT = ("training.max_steps=8", "training.eval_steps=2", "training.logging_steps=1")


def _settings(rows_file: Path, overrides: Sequence[str]) -> RunSettings:
    return make_settings(f"data.train={rows_file}", *SHORT, *overrides)


def _run(rows_file: Path, folder: Path, *overrides: str) -> tuple[Outcome, Recorder]:
    recorder = Recorder()
    settings = _settings(rows_file, overrides).trial
    return TransformersRunner(threads=1).run(settings, TrialFolder(folder), {}, recorder), recorder


@pytest.mark.parametrize("quantization", ["nf4", pytest.param("none", marks=pytest.mark.slow)])
def test_stored_adapter_reloaded_by_plain_peft_gives_the_reported_loss(
    rows_file: Path, tmp_path: Path, quantization: str
) -> None:
    """What is stored is the best checkpoint: PEFT alone finds its eval loss, the same judge to 1e-5."""
    overrides = [f"quantization={quantization}", "training.learning_rate=0.02"]
    outcome, recorder = _run(rows_file, tmp_path / "t", *overrides)
    assert outcome.best_value == min(loss for _, loss in recorder.losses)
    settings = _settings(rows_file, overrides)
    fresh = load_base(settings.model, settings.quantization, trained=False)
    model = PeftModel.from_pretrained(fresh.model, tmp_path / "t" / "adapter")
    data = prepare(settings.data, fresh)
    collator = PaddingCollator(fresh.tokenizer.pad_token_id)
    again = total(evaluate_examples(model, data.validation.rows, collator, 8)).mean
    assert again == pytest.approx(outcome.best_value, abs=1e-3)
    judged = data.judge(settings.trial, fresh)(model, JudgementReader.RESULT).value("eval/loss")
    assert judged == pytest.approx(outcome.best_value, abs=1e-5)


def test_full_fine_tune_stores_a_model_with_the_reported_loss(
    rows_file: Path, tmp_path: Path
) -> None:
    """The stored weights, loaded by transformers alone, give the eval loss of the outcome."""
    overrides = ["adapter=none", "quantization=none", "training.learning_rate=1e-3"]
    outcome, _ = _run(rows_file, tmp_path / "t", *overrides)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "t" / "model", dtype=torch.float32)
    settings = _settings(rows_file, overrides)
    base = load_base(settings.model, settings.quantization, trained=True)
    data = prepare(settings.data, base)
    collator = PaddingCollator(base.tokenizer.pad_token_id)
    loss = total(evaluate_examples(model, data.validation.rows, collator, 8)).mean
    assert loss == pytest.approx(outcome.best_value, abs=1e-3)
    assert (
        outcome.metrics["parameters/trainable"] == outcome.metrics["parameters/total"] == 1_115_264
    )


@pytest.mark.slow
def test_bf16_is_computed_in_by_training_and_judging_alike(rows_file: Path, tmp_path: Path) -> None:
    """With model.dtype=bfloat16 the stored adapter, judged anew in bf16, gives the reported loss."""
    outcome, _ = _run(rows_file, tmp_path / "t", "model.dtype=bfloat16")
    settings = _settings(rows_file, ["model.dtype=bfloat16"])
    fresh = load_base(settings.model, settings.quantization, trained=False)
    assert fresh.compute_dtype is torch.bfloat16
    model = PeftModel.from_pretrained(fresh.model, tmp_path / "t" / "adapter")
    data = prepare(settings.data, fresh)
    collator = PaddingCollator(fresh.tokenizer.pad_token_id)
    again = total(evaluate_examples(model, data.validation.rows, collator, 32, torch.bfloat16)).mean
    assert again == pytest.approx(outcome.best_value, abs=1e-3)


def test_trial_folder_is_complete(run_tiny: RunTiny) -> None:
    """Config, spool, logs, data card, outcome and adapter are there; no checkpoints, no base weights."""
    outcome, _, folder = run_tiny("t", "quantization=nf4")
    assert Outcome.model_validate_json(folder.outcome.read_text()) == outcome
    assert TrialSettings.model_validate(yaml.safe_load(folder.config.read_text())).seed == 0
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert {"train/loss", "train/grad_norm", "train/learning_rate"} <= set(lines[0])
    assert [line["step"] for line in lines if "eval/loss" in line] == [2, 4, 6]
    assert "QLoRA (nf4) r=8 alpha=16" in folder.log_text.read_text()
    assert json.loads(folder.log_json.read_text())["outcome"]["cause"] == "finished"
    assert "Return the sum of a and b plus" in folder.data_card.read_text()
    assert not folder.checkpoints.exists()
    with safe_open(folder.adapter / "adapter_model.safetensors", "pt") as weights:
        assert all("lora_" in name for name in weights.keys())  # noqa: SIM118 - no mapping
    assert json.loads((folder.adapter / "adapter_config.json").read_text())["r"] == 8
    assert (folder.adapter / "tokenizer.json").exists()


def test_warm_base_gives_the_losses_of_a_fresh_one(run_tiny: RunTiny) -> None:
    """The second trial in a worker computes what it would have computed as the first."""
    runner = TransformersRunner(threads=1)
    other = ("adapter.r=32", "training.learning_rate=0.03")
    run_tiny("a", "quantization=nf4", *other, runner=runner)
    _, warm, _ = run_tiny("b", "quantization=nf4", runner=runner)
    cold = TransformersRunner(threads=1)
    _, fresh, _ = run_tiny("c", "quantization=nf4", runner=cold)
    assert len(warm) == 3
    assert warm == fresh


def test_seed_decides_the_adapter_and_the_order(run_tiny: RunTiny) -> None:
    """The same seed gives the same losses, another seed gives others."""
    _, first, _ = run_tiny("a")
    _, same, _ = run_tiny("b")
    _, other, _ = run_tiny("c", "seed=1")
    assert len(first) == 3
    assert first == same != other


def test_early_stopping_keeps_the_best_checkpoint(run_tiny: RunTiny) -> None:
    """A rate that only harms is stopped after two evaluations without improvement."""
    outcome, losses, _ = run_tiny(
        *("t", "adapter=none", "training.learning_rate=0.5", "training.max_steps=40"),
        *("training.warmup_ratio=0.5", "training.max_grad_norm=100"),
        "training.divergence_threshold=null",
    )
    assert outcome.cause == "early_stopped"
    assert outcome.steps < 40
    assert outcome.best_value == min(loss for _, loss in losses)
    assert outcome.best_step == min(losses, key=lambda item: item[1])[0]
    assert all(loss > outcome.best_value for _, loss in losses[-2:])


def test_a_stop_request_ends_the_trial_at_its_next_step(run_tiny: RunTiny) -> None:
    """The driver's stop takes effect after the evaluation that caused it."""
    steps = "training.max_steps=8"
    outcome, losses, _ = run_tiny("t", steps, observer=Recorder(stop_after=2))
    assert outcome.cause == "pruned"
    assert len(losses) == 2
    assert outcome.steps <= 5


def test_divergence_is_an_outcome_within_the_logging_steps(run_tiny: RunTiny) -> None:
    """A loss that is no longer finite ends the trial with its cause and nothing is stored."""
    outcome, _, folder = run_tiny(
        *("t", "adapter=none", "training.learning_rate=1.0", "training.max_grad_norm=1e38"),
        *("training.warmup_ratio=0.0", "training.max_steps=60", "training.eval_steps=60"),
        "training.weight_decay=1e30",
    )
    assert outcome.cause == "diverged"
    assert "step" in (outcome.message or "")
    assert not folder.checkpoints.exists()
    assert not folder.model.exists()


def test_accumulation_is_the_larger_batch(run_tiny: RunTiny) -> None:
    """4 x 4 accumulated computes what 16 x 1 computes: the mean over all target tokens of a step."""
    size, times = "training.per_device_train_batch_size", "training.gradient_accumulation_steps"
    fast = "training.learning_rate=0.02"
    _, whole, _ = run_tiny("whole", f"{size}=16", f"{times}=1", fast)
    _, parts, _ = run_tiny("parts", f"{size}=4", f"{times}=4", fast)
    assert parts == [pytest.approx(item, abs=2e-4) for item in whole]
    assert whole[0][1] - whole[-1][1] > 0.01


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_do_not_stay_on_the_base(
    run_tiny: RunTiny, tmp_path: Path, bias: str
) -> None:
    """bias=all trains biases of the base itself: the next trial gets a base that never saw it."""
    base = tmp_path / "gpt2"
    config = GPT2Config(vocab_size=2048, n_embd=64, n_layer=1, n_head=2, n_positions=512)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    AutoTokenizer.from_pretrained(BASE_DIR).save_pretrained(base)
    overrides = [f"model.base_model={base}", f"adapter.bias={bias}", "training.learning_rate=0.02"]
    runner = TransformersRunner(threads=1)
    _, first, _ = run_tiny("a", "quantization=nf4", *overrides, runner=runner)
    _, second, _ = run_tiny("b", "quantization=nf4", *overrides, runner=runner)
    assert len(first) == 3
    assert first == second


def test_out_of_memory_before_the_first_step_is_an_outcome(
    run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base that does not fit is `oom` with no step trained, not an error in the code."""

    def too_large(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40 GiB")

    monkeypatch.setattr("sweeper.training.trial_runner.load_base", too_large)
    outcome, _, _ = run_tiny("t", runner=TransformersRunner(threads=1))
    assert (outcome.cause, outcome.steps) == ("oom", 0)


def test_a_trial_larger_than_the_device_is_refused_before_a_weight_is_loaded(
    run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, adapter, gradients and states against a machine of a hundredth of a MiB."""
    report = DeviceReport("small", "", bf16=False, total_mib=0.01, free_mib=0.01)
    monkeypatch.setattr("sweeper.training.memory_budget.device_report", lambda _: report)
    monkeypatch.setattr(
        "sweeper.training.trial_runner.load_base", lambda *_, **__: pytest.fail("loaded")
    )
    sized = ("adapter.r=null", "adapter.trainable_parameters=8k")
    outcome, _, folder = run_tiny("t", *sized, runner=TransformersRunner(threads=1))
    assert (outcome.cause, outcome.steps) == ("refused", 0)
    assert "the training does not fit: weights, gradients and optimizer states need" in (
        outcome.message or ""
    )
    assert folder.outcome.exists()


def test_an_impossible_adapter_is_refused(run_tiny: RunTiny) -> None:
    """A target that the model has not is refused with the names that exist; the base stays clean."""
    runner = TransformersRunner(threads=1)
    outcome, _, _ = run_tiny("a", "adapter.target_modules=c_attn", runner=runner)
    assert outcome.cause == "refused"
    assert "q_proj" in (outcome.message or "")
    outcome, _, _ = run_tiny("b", runner=runner)
    assert outcome.cause == "finished"


def test_a_killed_attempt_is_continued_from_its_checkpoint(
    run_tiny: RunTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after step 4 of 8, resumed: the same losses as a run that was never interrupted."""
    steps = "training.max_steps=8"
    _, whole, _ = run_tiny("whole", steps)

    class Killed(BaseException):
        pass

    class Killer(Recorder):
        def progress(self, step: int, total_steps: int, tokens_per_second: float) -> None:
            if step >= 5:
                raise Killed

    monkeypatch.setattr("sweeper.training.trial_callback.PROGRESS_SECONDS", 0.0)
    with pytest.raises(Killed):
        run_tiny("killed", steps, observer=Killer())
    checkpoint = newest_checkpoint(TrialFolder(tmp_path / "killed").checkpoints)
    assert checkpoint is not None
    assert checkpoint.step == 4
    outcome, resumed, folder = run_tiny("killed", steps)
    assert [step for step, _ in resumed] == [6, 8]
    assert resumed == [pytest.approx(item, abs=1e-6) for item in whole[2:]]
    logged = [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()]
    assert logged == sorted(logged)
    assert outcome.best_value == pytest.approx(min(loss for _, loss in whole), abs=1e-6)


def test_an_incomplete_checkpoint_is_not_continued(tmp_path: Path) -> None:
    """Without its manifest, which is written last, a checkpoint does not count."""
    for step in (4, 8):
        (tmp_path / f"checkpoint-{step}").mkdir()
        state = tmp_path / f"checkpoint-{step}" / "trainer_state.json"
        state.write_text('{"best_global_step": null}')
    seal(tmp_path / "checkpoint-4")
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 4


def test_spool_forgets_what_a_new_attempt_will_measure_again(tmp_path: Path) -> None:
    """Lines beyond the resumed step, and a torn last line, are dropped; NaN is never written."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 2, "time": 1, "x": 1}\n{"step": 4, "time": 1, "x": 1}\n{"step": 5, "ti'
    )
    spool = MetricsSpool(path, resumed_at=2)
    spool.write(3, {"x": 2.0, "bad": float("nan")})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3]
    assert "bad" not in lines[1]


@pytest.mark.parametrize(
    ("overrides", "rows", "steps", "warmup"),
    [
        (["training.max_steps=null"], 1662, 104, 4),
        (["training.max_steps=null", "training.num_train_epochs=3"], 100, 21, 1),
        (["training.max_steps=700", "training.warmup_steps=100"], 40_000, 700, 100),
        (
            [
                "training=real",
                "training.warmup_ratio=0.1",
            ],  # 100 rows in batches of 4 x 4: report 000
            100,
            7,
            1,
        ),
    ],
)
def test_schedule_length_and_warmup(
    overrides: list[str], rows: int, steps: int, warmup: int
) -> None:
    """Steps follow rows, batch, accumulation and epochs, a last partial step included."""
    training = make_settings(*overrides).training
    assert plan_schedule(training, rows).total_steps == steps
    assert training.warmup_length(steps) == warmup


def test_embedded_base_is_what_is_loaded() -> None:
    """`embedded` means the folder in the package."""
    settings = make_settings()
    base = load_base(settings.model, settings.quantization, trained=False)
    assert base.model.config.hidden_size == 128
    assert (BASE_DIR / "model.safetensors").exists()
