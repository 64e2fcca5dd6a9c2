"""Settings into optimiser steps."""

from __future__ import annotations

import itertools
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments, get_scheduler

from sweeper.config.compose import conf_dir, read_yaml
from sweeper.config.settings import TrainingSettings
from sweeper.core.errors import ConfigError
from sweeper.search.pruning import may_prune
from sweeper.training.arguments import use_liger_kernel
from sweeper.training.schedule import FEW_STEPS, advice, look_steps, plan_schedule
from sweeper.training.trainer import JudgedTrainer
from tests.conftest import make_settings
from tests.training.conftest import RunTiny

REAL = "training=real"


@pytest.mark.parametrize(
    ("rows", "micro", "accumulation", "epochs"),
    [(100, 4, 4, 1), (100, 7, 3, 2), (16, 4, 4, 1), (5, 4, 4, 3), (4300, 2, 2, 3)],
)
def test_length_is_that_of_transformers(
    rows: int, micro: int, accumulation: int, epochs: int
) -> None:
    """total_steps equals what transformers.Trainer computes from the same numbers."""
    training = make_settings(
        *("training.max_steps=null", f"training.num_train_epochs={epochs}"),
        f"training.per_device_train_batch_size={micro}",
        f"training.gradient_accumulation_steps={accumulation}",
    ).training
    arguments = TrainingArguments(
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=epochs,
        use_cpu=True,
        report_to="none",
    )
    data = [{"x": torch.zeros(1)}] * rows
    trainer = Trainer(torch.nn.Linear(1, 1), arguments, train_dataset=data)
    expected = trainer.set_initial_training_values(arguments, trainer.get_train_dataloader())[-1]
    assert plan_schedule(training, rows).total_steps == expected


PRESETS = {"training=tiny": [0.25, 0.5, 0.75], REAL: [0.25, 0.375, 0.5, 0.625, 0.75, 0.875]}
PRUNERS = ("median", "percentile", "gap")


@pytest.mark.parametrize("total", [64, 100, 937])
@pytest.mark.parametrize(("preset", "places"), PRESETS.items())
def test_no_look_of_a_preset_is_earlier_than_a_quarter(
    preset: str, places: list[float], total: int
) -> None:
    """Each look is where the preset says, to the rounding of its interval, and the last at the end."""
    schedule = plan_schedule(make_settings(preset, f"training.max_steps={total}").training, 10_000)
    *looks, end = (step / total for step in look_steps(schedule))
    assert end == 1
    # An interval that is rounded down may leave one more look just before the end
    assert looks[: len(places)] == pytest.approx(places, rel=0.05)
    assert all(look > 0.95 for look in looks[len(places) :])


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_look_of_a_preset_can_prune_or_stop(preset: str, pruner: str) -> None:
    """A look passes a rung after the warm-up, or is late enough for the patience; the last is kept."""
    training = make_settings(preset, "training.max_steps=1000").training
    *looks, _ = look_steps(plan_schedule(training, 10_000))
    rungs = read_yaml(conf_dir() / "pruner" / f"{pruner}.yaml")["rungs"]
    patience = training.early_stopping_patience
    assert patience is not None
    passed = [0, *looks]
    for place, look in enumerate(looks):
        prunes = any(
            passed[place] < rung <= look and may_prune(training, rung, look, 1000) for rung in rungs
        )
        stops = look >= 1000 * training.early_stopping_min_fraction and place >= patience
        assert prunes or stops, f"nothing reads the look at {look} per-mille"


def test_first_report_has_seven_steps_an_epoch_the_last_of_four() -> None:
    """100 examples in steps of 4 x 4: six full steps and one of 4 examples."""
    schedule = plan_schedule(make_settings(REAL).training, 100)
    assert (schedule.total_steps, schedule.steps_per_epoch, schedule.last_batch) == (7, 7, 4)
    assert schedule.warmup_steps == 1


@pytest.mark.parametrize(
    ("overrides", "eval_every", "save_every"),
    [
        (["training.max_steps=700", "training.eval_steps=100"], 100, 100),
        (["training.max_steps=700", "training.eval_steps=0.1"], 70, 70),
        (["training.eval_steps=epoch", "training.save_steps=epoch"], 63, 63),
        (["training.eval_steps=epoch", "training.save_steps=126"], 63, 126),
        (["training.eval_steps=21", "training.save_steps=epoch"], 21, 63),
        (["training.max_steps=64", "training.eval_steps=0.1", "training.save_steps=0.3"], 6, 18),
    ],
)
def test_evaluations_and_checkpoints_by_step_fraction_and_epoch(
    overrides: list[str], eval_every: int, save_every: int
) -> None:
    """Every form of eval_steps and save_steps becomes a number of steps; 1,000 rows of 16."""
    schedule = plan_schedule(make_settings(REAL, *overrides).training, 1000)
    assert (schedule.eval_every, schedule.save_every) == (eval_every, save_every)


def test_checkpoint_between_evaluations_is_refused() -> None:
    """save_steps=150 with eval_steps=100 is an error that names both."""
    settings = make_settings(REAL, "training.eval_steps=100", "training.save_steps=150")
    with pytest.raises(ConfigError, match=r"save_steps=150.*eval_steps=100"):
        plan_schedule(settings.training, 10_000)


@pytest.mark.parametrize(("warmup", "allowed"), [(52, True), (53, False), (104, False)])
def test_warmup_of_more_than_half_the_run_is_refused(warmup: int, allowed: bool) -> None:
    """Report 003's 100 warm-up steps would be nearly the whole of a run of 104."""
    settings = make_settings(f"training.warmup_steps={warmup}", "training.max_steps=104")
    if allowed:
        assert plan_schedule(settings.training, 2000).warmup_steps == warmup
    else:
        with pytest.raises(ConfigError, match="at most 52"):
            plan_schedule(settings.training, 2000)


def test_warmup_ratio_above_a_half_is_refused() -> None:
    """The settings themselves refuse it."""
    with pytest.raises(ConfigError, match="warmup_ratio"):
        make_settings("training.warmup_ratio=0.6")


@pytest.mark.parametrize("wrong", ["training.eval_steps=2.5", "training.save_steps=never"])
def test_wrong_steps_are_one_sentence(wrong: str) -> None:
    """A wrong word or a broken number names the three forms there are, once."""
    with pytest.raises(ConfigError) as error:
        make_settings(wrong)
    assert len(error.value.problems) == 1
    assert "nor the word epoch" in error.value.problems[0]


def test_constant_rate_ignores_warmup() -> None:
    """constant has no warm-up, so the default ratio is no obstacle to it."""
    training = make_settings("training.lr_scheduler_type=constant").training
    assert plan_schedule(training, 1000).warmup_steps == 0


def test_advice_on_large_batches() -> None:
    """Above 32 a LoRA trial is told so; full fine-tuning and a batch of 32 are not."""
    batch = "training.per_device_train_batch_size"
    assert "32" in advice(make_settings(f"{batch}=64"), 1000)[0]
    assert not advice(make_settings(f"{batch}=32"), 1000)
    full = make_settings(f"{batch}=64", "adapter=none", "quantization=none")
    assert not advice(full, 1000)
    assert "larger than the 10 training rows" in advice(make_settings(f"{batch}=16"), 10)[0]


def test_liger_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for by name without a GPU it is an error; auto goes without it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="use_liger_kernel=true needs a CUDA GPU"):
        use_liger_kernel(make_settings("training.use_liger_kernel=true").trial)
    assert not use_liger_kernel(make_settings("training.use_liger_kernel=auto").trial)


KINDS = ("cosine", "cosine_with_restarts", "linear", "constant", "constant_with_warmup")
WARMUPS = (0.0, 0.03, 0.1, 0.5)


@cache
def _defaults() -> TrainingSettings:
    return make_settings().training


def _training(kind: str, warmup_ratio: float, steps: int) -> TrainingSettings:
    changed = {"lr_scheduler_type": kind, "warmup_ratio": warmup_ratio, "max_steps": steps}
    return _defaults().model_copy(update=changed)


def _rates(kind: str, warmup_ratio: float, steps: int) -> list[float]:
    """The rate of every step, from the trainer's own schedule, with a peak of 1."""
    training = _training(kind, warmup_ratio, steps)
    trainer = object.__new__(JudgedTrainer)
    trainer._schedule = plan_schedule(training, 1000)
    trainer.lr_scheduler = None
    options = {"num_cycles": 2} if kind == "cosine_with_restarts" else {}
    trainer.args = SimpleNamespace(
        lr_scheduler_type=kind,
        lr_scheduler_kwargs=options,
        get_warmup_steps=lambda _: trainer._schedule.warmup_steps,
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = trainer.create_scheduler(steps, optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_of_a_short_run_trains(kind: str) -> None:
    """In 1 to 40 steps no rate is zero, none exceeds the peak, and some step has the whole of it."""
    assert FEW_STEPS == 40
    for warmup, steps in itertools.product(WARMUPS, range(1, 41)):
        rates = _rates(kind, warmup, steps)
        assert min(rates) > 0, (warmup, steps)
        assert max(rates) == 1.0, (warmup, steps)
        assert rates.index(1.0) < steps


@pytest.mark.parametrize("kind", KINDS)
def test_rates_that_were_right_are_those_of_transformers(kind: str) -> None:
    """Bit for bit: every rate without a warm-up or after it, and all rates of longer runs."""
    options = {"scheduler_specific_kwargs": {"num_cycles": 2}} if "restarts" in kind else {}
    compared = 0
    for warmup, steps in itertools.product(WARMUPS, (2, 7, 40, 41, 64, 104)):
        length = _training(kind, warmup, steps).warmup_length(steps)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        theirs = get_scheduler(kind, optimizer, length, steps, **options)
        (rate,) = theirs.lr_lambdas
        first = length if steps <= FEW_STEPS else 0
        ours = _rates(kind, warmup, steps)
        compared += steps - first
        assert ours[first:] == [rate(step) for step in range(first, steps)], (warmup, steps)
    assert compared > 900


def test_one_step_changes_the_adapter(run_tiny: RunTiny) -> None:
    """Twelve rows in a batch of 16 are one step, whose rate was zero under the default warm-up."""
    outcome, _, folder = run_tiny("t", "training.max_steps=1", "training.warmup_ratio=0.03")
    weights = load_file(folder.adapter / "adapter_model.safetensors")
    assert outcome.cause == "finished"
    assert sum(float(w.abs().sum()) for name, w in weights.items() if "lora_B" in name) > 0
