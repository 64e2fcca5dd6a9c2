"""The bank of curves: its points, the studies that make it, the export, and trainings made again."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from benchmarks.curves import make_curves
from benchmarks.curves.bank_points import (
    RANK,
    RATE,
    RATES,
    RATIO,
    TARGETS,
    WARMUP,
    Point,
    embedded_points,
    held_out_points,
    is_factorial,
)
from benchmarks.curves.curve_bank import config_of, has_bank, read_bank, write_bank
from benchmarks.curves.export_curves import FILES, BankFile, export
from benchmarks.curves.make_curves import CurveStudy, embedded_study, in_words, train, waves
from sweeper.__main__ import MAX_OVERRIDE
from sweeper.builtin.embedded import BASE_DIR
from sweeper.config.compose import complete_overrides
from sweeper.config.space import Choice, locate
from sweeper.core.outcome import stored_outcome
from sweeper.core.paths import TrialFolder
from sweeper.data.examples import ChatMessage, Example, RawRow
from sweeper.data.templates import choose_template, render
from sweeper.search.study_plan import StudyPlan, studies
from sweeper.training.look_losses import read_looks
from tests.conftest import Program

COMBINATIONS = 60
EMBEDDED, FULL, BASE, CHAT, *SEEDS = FILES


def test_the_first_bank_is_a_full_factorial_with_points_between() -> None:
    """Every combination of 8 rates, 5 ranks, 4 ratios and 3 target sets once, and 60 others."""
    points = embedded_points()
    grid = [point for point in points if is_factorial(point)]
    assert (len(points), len(grid)) == (540, 480)
    assert len({tuple(point.items()) for point in points}) == 540
    levels = [len({point[key] for point in grid}) for key in (RATE, RANK, RATIO, TARGETS, WARMUP)]
    assert levels == [8, 5, 4, 3, 1]
    others = [point for point in points if not is_factorial(point)]
    assert Counter(point[TARGETS] for point in others).keys() == {"attention", "mlp", "all-linear"}
    assert all(3e-4 <= float(point[RATE]) <= 3e-2 for point in others[:60])


def test_every_pass_of_the_factorial_covers_the_space() -> None:
    """A bank that was stopped after a pass has each combination, and all rates about equally often."""
    grid = [point for point in embedded_points() if is_factorial(point)]
    for number in range(8):
        part = grid[number * COMBINATIONS : (number + 1) * COMBINATIONS]
        assert len({(point[RANK], point[RATIO], point[TARGETS]) for point in part}) == COMBINATIONS
        counts = Counter(point[RATE] for point in part)
        assert set(counts) == set(RATES)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_the_held_out_points_are_a_factorial_of_96() -> None:
    """All rates with each of 12 combinations that the first bank has too."""
    points = held_out_points()
    assert len({tuple(point.items()) for point in points}) == len(points) == 96
    assert all(map(is_factorial, points[:96]))
    assert set(Counter(point[RATE] for point in points).values()) == {12}


def _plan(words: tuple[str, ...]) -> StudyPlan:
    (plan,) = studies(complete_overrides(list(words), make_curves.HERE))
    return plan


@pytest.mark.parametrize("study", [embedded_study(), CurveStudy("chat", held_out_points())])
def test_the_words_of_each_wave_are_its_points(study: CurveStudy) -> None:
    """The program takes the text of a wave, and reads the very points, each inside its space."""
    found = list(waves(study))
    assert [total for total, _ in found[:-1]] == list(range(54, len(study.points), 54))
    for start, (total, words) in ((0, found[0]), (found[-2][0], found[-1])):
        assert max(map(len, words)) < MAX_OVERRIDE
        plan = _plan(words)
        arm = plan.arms[0]
        assert list(arm.priors) == study.points[start:total]
        assert all(locate(arm.space, point) is not None for point in arm.priors)
        assert (plan.study.study_name, arm.n_trials) == (study.name, total)
    assert found[-1][0] == len(study.points)


def test_nothing_is_stopped_and_every_row_is_looked_at() -> None:
    """The studies of the bank keep whole curves, also of trainings with a high loss."""
    plan = _plan(("+experiment=curves_full",))
    for arm in plan.arms:
        training, evaluation = arm.settings.training, arm.settings.evaluation
        assert (training.early_stopping_patience, training.divergence_threshold) == (None, None)
        assert training.logging_steps == 1
        assert evaluation.look_rows is not None
        assert evaluation.look_rows >= 10_000
    assert (plan.study.pruner.name, plan.study.sampler.name) == ("none", "random")
    assert (plan.study.finalists.top, plan.study.retention.adapters) == (0, 0)
    assert [arm.name for arm in plan.arms] == ["lora", "full"]
    assert [arm.name for arm in _plan(("+experiment=curves",)).arms] == ["lora"]


def test_full_fine_tuning_has_as_many_rates_as_are_waited_for() -> None:
    """24 rates at equal distances on a log scale."""
    arm = _plan(("+experiment=curves_full",)).arms[1]
    rates = arm.space[RATE]
    assert isinstance(rates, Choice)
    logs = [math.log10(float(str(rate))) for rate in rates.values]
    steps = [after - before for before, after in itertools.pairwise(logs)]
    assert len(logs) == arm.n_trials == make_curves.FULL_TRIALS
    assert steps == pytest.approx([steps[0]] * 23, abs=1e-4)


def _end(folder: Path, point: Point, cause: str, value: float | None, seed: int = 0) -> None:
    """Write what a worker writes about a training of four steps and three validation rows."""
    folder.mkdir(parents=True)
    config: dict[str, Any] = {
        "adapter": {"method": "lora"},
        "training": {"max_steps": 4},
        "data": {"split_seed": 0},
        "seed": seed,
    }
    for key, setting in point.items():
        section, _, name = key.partition(".")
        config[section][name] = setting
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    common = {"rows": "r1", "tokens": [2, 3, 1], "cpu_seconds": 0.5}
    looks = [{"step": step, **common, "nll": [4.0, 9.0 - step, 2.5]} for step in (1, 2, 3, 4)]
    if cause == "diverged":
        looks = [{**looks[0], "nll": [4.0, math.nan, 2.5]}]
    (folder / "look_losses.jsonl").write_text("".join(json.dumps(look) + "\n" for look in looks))
    logged = {"time": 0.0, "train/loss": 4.0, "train/grad_norm": 0.25}
    rows = [{"step": step, **logged} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "provenance.json").write_text(json.dumps({"git.commit": "abc", "package.torch": "2"}))
    metrics = {
        "parameters/trainable": 64.0,
        "training/warmup_steps": 1.0,
        "training/total_steps": 4.0,
        "cost/train_cpu_seconds": 7.5,
        "cost/cpu_seconds": 10.0,
    }
    outcome = {
        "cause": cause,
        "best_value": value,
        "best_step": 4,
        "steps": 4,
        "metrics": metrics,
        "inputs": {"data": "d1", "base": "b1"},
    }
    (folder / "outcome.json").write_text(json.dumps(outcome))


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """The studies' folder with one finished, one diverged, one cancelled and one repeated training."""
    first, second, third = embedded_points()[:3]
    arm = tmp_path / "outputs" / "curves_embedded" / "lora"
    _end(arm / "trial_0000", first, "finished", 3.25)
    _end(arm / "trial_0001", second, "diverged", None)
    _end(arm / "trial_0002", third, "cancelled", 3.0)
    _end(arm / "trial_0003", first, "finished", 3.0)
    return tmp_path / "outputs"


def test_what_has_ended_is_exported(outputs: Path, tmp_path: Path) -> None:
    """Losses of every row at 25 and 50 % and the end, costs apart, NaN as null, nothing twice."""
    assert export(EMBEDDED, outputs, tmp_path) is not None
    header, (finished, diverged) = read_bank("embedded", tmp_path)
    point = embedded_points()[0]
    assert finished["point"] == point
    assert finished["alpha"] == point[RANK] * point[RATIO]
    assert (finished["value"], finished["cpu_train"], finished["seed"]) == (3.25, 7.5, 0)
    assert (finished["trainable"], finished["warmup_steps"]) == (64, 1)
    assert finished["grad_norm"] == [0.25, 0.25]
    assert [look["step"] for look in finished["looks"] if "nll" in look] == [1, 2, 4]
    losses = [look["loss"] for look in finished["looks"]]
    assert losses == pytest.approx([14.5 / 6, 13.5 / 6, 12.5 / 6, 11.5 / 6])
    assert [look["cpu"] for look in finished["looks"]] == [0.5] * 4
    (look,) = diverged["looks"]
    assert (diverged["cause"], diverged["value"], look["loss"]) == ("diverged", None, None)
    assert look["nll"] == [4.0, None, 2.5]
    assert header["tokens"] == [2, 3, 1]
    assert header["look_rows"] == [0, 1, 2]
    assert header["inputs"]["data"] == "d1"
    assert header["provenance"]["package.torch"] == ["2"]


def test_a_training_of_the_bank_can_be_configured_again(outputs: Path, tmp_path: Path) -> None:
    """Header and line together are the configuration that was trained."""
    export(EMBEDDED, outputs, tmp_path)
    header, (finished, _) = read_bank("embedded", tmp_path)
    stored = outputs / "curves_embedded" / "lora" / "trial_0000" / "config.yaml"
    assert config_of(header, finished) == yaml.safe_load(stored.read_text())


def test_trainings_of_another_question_are_refused(outputs: Path, tmp_path: Path) -> None:
    """One file is of one data set: a training on other data is named, and nothing is written."""
    folder = outputs / "curves_embedded" / "lora" / "trial_0004"
    _end(folder, embedded_points()[4], "finished", 3.5)
    outcome = json.loads((folder / "outcome.json").read_text())
    (folder / "outcome.json").write_text(json.dumps({**outcome, "inputs": {"data": "d2"}}))
    with pytest.raises(SystemExit, match="inputs is not the same"):
        export(EMBEDDED, outputs, tmp_path)
    assert not has_bank("embedded", tmp_path)


def test_repeats_are_marked_as_chosen_afterwards(tmp_path: Path) -> None:
    """Three seeds of a point are three lines of a file that says when its points were chosen."""
    for seed in make_curves.SEEDS:
        folder = tmp_path / f"curves_base_seed_{seed}" / "lora" / "trial_0000"
        _end(folder, embedded_points()[0], "finished", 3.25, seed)
    export(SEEDS[1], tmp_path, tmp_path)
    header, trials = read_bank("base_seeds", tmp_path)
    assert header["chosen_after"] is True
    assert [trial["seed"] for trial in trials] == [1, 2, 3]


def test_a_part_without_trainings_is_no_file(tmp_path: Path) -> None:
    """Nothing is written before anything was trained."""
    assert export(CHAT, tmp_path, tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_the_same_trainings_give_the_same_bytes(tmp_path: Path) -> None:
    """A file that is exported again without new trainings does not change in git."""
    first = write_bank("a", {"bank": "a"}, [{"value": 1.5}], tmp_path).read_bytes()
    assert write_bank("a", {"bank": "a"}, [{"value": 1.5}], tmp_path).read_bytes() == first
    assert read_bank("a", tmp_path) == ({"bank": "a"}, [{"value": 1.5}])


def test_the_same_command_trains_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A part that was stopped within its second wave runs that wave again, and says what is left."""
    monkeypatch.setattr(make_curves, "OUTPUTS", tmp_path)
    points = held_out_points()
    study = CurveStudy("curves_base", points)
    runs: list[int] = []

    def run(words: Sequence[str]) -> int:
        total = int(next(word for word in words if word.startswith("n_trials=")).split("=")[1])
        ends = 70 if not runs else total  # the first run is stopped by its budget
        runs.append(total)
        there = make_curves.ended(study.folder, "lora")
        for number in range(there, min(ends, total)):
            _end(study.folder.trial("lora", number).path, points[number], "finished", 3.0 + number)
        return 0

    monkeypatch.setattr(make_curves, "run_program", run)
    for number in range(54):
        _end(study.folder.trial("lora", number).path, points[number], "finished", 3.0 + number)
    assert train(study, []) is False
    before, after = capsys.readouterr().out.splitlines()
    assert before == "curves_base: 54 of 96 trainings have ended, 420 CPU s are left"
    assert after.startswith("curves_base: 70 of 96 trainings have ended, 260 CPU s are left.")
    assert train(study, []) is True
    assert runs == [96, 96]
    assert make_curves.best_points(study.folder, 2) == points[:2]


def test_what_is_left_is_estimated_before_any_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part that has not begun has the seconds of its README's estimate."""
    monkeypatch.setattr(make_curves, "OUTPUTS", tmp_path)
    words = "curves_embedded: 0 of 564 trainings have ended, 7,332 CPU s are left"
    assert embedded_study().progress() == words


def test_repeats_wait_for_the_whole_first_bank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best points of a part of the bank may not be its best, so none is repeated yet."""
    monkeypatch.setattr(make_curves, "OUTPUTS", tmp_path)
    _end(embedded_study().folder.trial("lora", 0).path, embedded_points()[0], "finished", 3.0)
    with pytest.raises(SystemExit, match="1 of 540"):
        make_curves.seed_studies("embedded")


def test_the_best_points_are_words_that_the_program_reads() -> None:
    """Points come back from their text with their types: a rank is a whole number."""
    points = embedded_points()[:40]
    plan = _plan(("+experiment=curves", "seed=1", in_words(points)))
    assert list(plan.arms[0].priors) == points
    assert plan.arms[0].settings.trial.seed == 1


@pytest.mark.slow
def test_five_points_of_the_bank_train_to_the_same_losses(program: Program, tmp_path: Path) -> None:
    """Points at random, trained again by `sweeper trial`: the same rows, and the recorded losses."""
    if not has_bank("embedded"):
        pytest.skip("the bank has not been exported yet (benchmarks/curves/README.md)")
    header, trials = read_bank("embedded")
    complete = [trial for trial in trials if trial["cause"] == "finished"]
    assert len(complete) >= 5
    for number, trial in enumerate(random.Random(21).sample(complete, 5)):
        source, again = tmp_path / f"source_{number}", TrialFolder(tmp_path / f"again_{number}")
        source.mkdir()
        (source / "config.yaml").write_text(yaml.safe_dump(config_of(header, trial)))
        result = program("trial", str(source), "--into", str(again.path))
        assert result.returncode == 0, result.stdout + result.stderr
        outcome = stored_outcome(again)
        assert outcome is not None
        assert outcome.inputs is not None
        if outcome.inputs.data != header["inputs"]["data"]:
            pytest.skip("the embedded data of this Python differ from those of the bank")
        looks = read_looks(again.look_losses)
        assert [look.step for look in looks] == [look["step"] for look in trial["looks"]]
        found = [math.fsum(look.nll) / sum(look.tokens) for look in looks]
        recorded = [look["loss"] for look in trial["looks"]]
        # another processor rounds differently, and 64 steps enlarge that
        assert found == pytest.approx(recorded, abs=2e-3), trial["id"]


def test_a_run_that_fails_ends_the_command_with_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next wave is not begun after a run that has failed."""
    monkeypatch.setattr(make_curves, "OUTPUTS", tmp_path)
    runs: list[object] = []

    def run(words: Sequence[str]) -> int:
        runs.append(words)
        return 2

    monkeypatch.setattr(make_curves, "run_program", run)
    with pytest.raises(SystemExit) as stop:
        train(CurveStudy("curves_base", held_out_points()), [])
    assert (stop.value.code, len(runs)) == (2, 1)


def test_conversations_are_rendered_as_turns_and_answers_carry_the_loss() -> None:
    """Each answer and its end of text are targets, and nothing of the other turns is."""
    tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
    template = choose_template(str(make_curves.HERE / "chat_turns.jinja"), "sharegpt", tokenizer)
    turns = ("system", "user", "assistant", "user", "assistant")
    texts = ("S", "Q1", "A1", "Q2", "A2")
    messages = tuple(ChatMessage(*turn) for turn in zip(turns, texts, strict=True))
    example = Example(messages, RawRow({}, "here"), "sharegpt")
    (rendered,) = render(example, template, "completions")
    end = tokenizer.eos_token
    assert rendered.text == (
        f"System:\nS\n\nUser:\nQ1\n\nAssistant:\nA1{end}\n\nUser:\nQ2\n\nAssistant:\nA2{end}"
    )
    assert [rendered.text[start:stop] for start, stop in rendered.spans] == [f"A1{end}", f"A2{end}"]


@pytest.mark.slow
def test_two_points_are_trained_and_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the command to the file: whole looks with their cost, each step's norm, the kept value.

    Each point has a wave of its own, so the second run continues the study of the first.
    """
    monkeypatch.setattr(make_curves, "OUTPUTS", tmp_path)
    monkeypatch.setattr(make_curves, "WAVE", 1)
    points = embedded_points()[:2]
    short = ("training.max_steps=4", "training.per_device_train_batch_size=2")
    study = CurveStudy("curves_test", points, (*short, f"output_dir={tmp_path}"))
    assert train(study, []) is True
    export(BankFile("test", (("curves_test", "lora"),), EMBEDDED.keys), tmp_path, tmp_path)
    header, trials = read_bank("test", tmp_path)
    tokens = header["tokens"]
    assert [trial["point"] for trial in trials] == points
    assert (header["total_steps"], len(header["look_rows"]), len(tokens) > 96) == (4, 96, True)
    assert header["inputs"]["data"]
    first = trials[0]
    assert (first["cause"], first["role"], len(first["grad_norm"])) == ("finished", "factorial", 4)
    assert first["cpu_total"] > first["cpu_train"] > 0
    assert [look["step"] for look in first["looks"]] == [1, 2, 3, 4]
    assert min(look["cpu"] for look in first["looks"]) > 0
    last = first["looks"][-1]
    assert math.fsum(last["nll"]) / sum(tokens) == pytest.approx(last["loss"], abs=1e-5)
    assert first["value"] == pytest.approx(min(look["loss"] for look in first["looks"]), abs=1e-8)
