"""Finalists in whole sessions with a fake trainer: seeds, the test split, interruptions, misfits."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest

from sweeper.commands.run_study import run_study
from sweeper.core.errors import StudyError
from sweeper.core.outcome import ExampleLosses, Outcome
from sweeper.core.paths import StudyFolder
from sweeper.core.value import EquivalenceMargin
from sweeper.reporting.finalist_results import FinalistResult, SeedRepeat, choose
from sweeper.reporting.held_out_results import (
    LEFT_ALONE,
    NO_TEST_SPLIT,
    PROVISIONAL,
    SWITCHED_OFF,
)
from sweeper.reporting.results import StudyResults, load_results
from sweeper.reporting.verdict import judge
from sweeper.search.study_plan import studies

FAKE = (
    *("+experiment=lr_rank_sweep", "workers=fake", "workers.engine=inline", "pruner=none"),
    *("workers.fake.step_seconds=0.0", "tracking=none", "hydra.sweeper.n_trials=5"),
    # The fake LoRA's best point, well inside its range: 0.04 nats ahead of the best full fine-tune
    "hydra.sweeper.priors=[{training.learning_rate: 5e-3, adapter.r: 32}]",
)
TWO_BY_THREE = (
    *("hydra.sweeper.finalists.top=2", "hydra.sweeper.finalists.seeds=3"),
    "hydra.sweeper.finalists.fresh_seeds=2",
)
ONLY_LORA = "~hydra.sweeper.arms.full"
MIN_ONE = "hydra.sweeper.fairness.min_finished=1"


def _run(tmp_path: Path, *overrides: str) -> StudyResults:
    (plan,) = studies([*FAKE, f"output_dir={tmp_path}", *overrides])
    return run_study(plan)


def _finalists(tmp_path: Path, arm: str = "lora") -> Path:
    return tmp_path / "lr_rank_sweep" / arm / "finalists"


def _trained(tmp_path: Path, arm: str = "lora") -> list[str]:
    return sorted(path.parent.name for path in _finalists(tmp_path, arm).glob("*/outcome.json"))


def _repeat(seed: int, value: float | None, cause: str = "finished") -> SeedRepeat:
    return SeedRepeat(seed=seed, outcome=Outcome(cause=cause, best_value=value))  # type: ignore[arg-type]


def test_the_winner_is_the_best_mean_and_not_the_best_seed() -> None:
    """Means 2.0 and 1.9: the second wins when less is better, the first when more is."""
    one = FinalistResult(number=3, repeats=(_repeat(0, 1.0), _repeat(1, 3.0)))
    other = FinalistResult(number=5, repeats=(_repeat(0, 1.8), _repeat(1, 2.0)))
    assert choose([one, other], "minimize") == 5
    assert choose([one, other], "maximize") == 3


def test_a_failed_seed_loses_against_none_failed() -> None:
    """What diverges with another seed is no winner, however good its first seed was."""
    fragile = FinalistResult(number=3, repeats=(_repeat(0, 1.0), _repeat(1, None, "diverged")))
    sound = FinalistResult(number=5, repeats=(_repeat(0, 1.8), _repeat(1, 2.0)))
    assert choose([fragile, sound], "minimize") == 5
    assert (fragile.mean, fragile.spread) == (1.0, None)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StudyResults]:
    """The folder of a study of two arms that has come to its end, and its results."""
    folder = tmp_path_factory.mktemp("ended")
    return folder, _run(folder, *TWO_BY_THREE)


def test_the_best_two_get_three_seeds_and_count_to_no_total(
    ended: tuple[Path, StudyResults],
) -> None:
    """Each arm: two seeds more for its two best trials, and two fresh ones for the winner."""
    tmp_path, results = ended
    for arm, total in zip(results.arms, (5, 8), strict=True):
        assert arm.final is not None
        numbers = [finalist.number for finalist in arm.final.finalists]
        ranked = sorted(arm.trials, key=lambda trial: trial.outcome.best_value or 0.0)
        assert numbers == [trial.number for trial in ranked[:2]]
        expected = [f"trial_{number:04d}_seed_{seed}" for number in numbers for seed in (1, 2)]
        fresh = [f"trial_{arm.final.winner:04d}_seed_{seed}" for seed in (3, 4)]
        assert _trained(tmp_path, arm.name) == sorted(expected + fresh)
        assert [repeat.seed for repeat in arm.final.judged] == [3, 4]
        storage = f"sqlite:///{tmp_path / 'lr_rank_sweep' / 'study.db'}"
        study = optuna.load_study(study_name=f"lr_rank_sweep/{arm.name}", storage=storage)
        assert len(study.trials) == len(arm.trials) == total
        means = {finalist.number: sum(finalist.values) / 3 for finalist in arm.final.finalists}
        assert arm.final.winner == min(means, key=means.__getitem__)
        config = _finalists(tmp_path, arm.name) / expected[0] / "config.yaml"
        assert json.loads(config.read_text())["seed"] == 1


def test_the_verdict_rests_on_the_test_split(ended: tuple[Path, StudyResults]) -> None:
    """Losses, seeds and split of the contrast are those of the judged models, added up by hand."""
    tmp_path, results = ended
    (contrast,) = results.contrasts
    means = []
    for arm in results.arms:
        assert arm.final is not None
        pattern = f"test/*/trial_{arm.final.winner:04d}_seed_*.json"
        found = [
            json.loads(path.read_text()) for path in _finalists(tmp_path, arm.name).glob(pattern)
        ]
        assert len(found) == 2
        means.append(sum(sum(each["nll"]) / sum(each["tokens"]) for each in found) / 2)
    assert contrast.losses == pytest.approx(means)
    assert (contrast.split, contrast.seeds, contrast.examples) == ("test", (2, 2), 10)
    verdict = judge(results)
    assert f"(test loss {means[0]:.4f} against {means[1]:.4f})" in verdict.words
    assert "Judged on 2 against 2 fresh seeds. Noise floor" in verdict.words
    report = (tmp_path / "lr_rank_sweep" / "report.md").read_text()
    assert "| test loss |" in report
    assert "## Finalists over seeds" in report


def test_forgetting_is_measured_for_both_arms(ended: tuple[Path, StudyResults]) -> None:
    """Each winner's seeds and each base on general text: the fake LoRA forgets 0.02 nats, full 0.2."""
    tmp_path, results = ended
    assert [(found.arm, found.seeds) for found in results.forgetting] == [
        ("lora", (2, 1)),
        ("full", (2, 1)),
    ]
    forgotten = [found.difference.value for found in results.forgetting]
    assert forgotten == pytest.approx([0.02, 0.2])
    assert len(list(_finalists(tmp_path).glob("general/*/trial_*.json"))) == 3
    assert "Forgetting (loss on general text" in judge(results).words


def test_the_same_command_reads_everything_back(ended: tuple[Path, StudyResults]) -> None:
    """Run twice: no training, no judgement again, the same contrasts; `report` reads them too."""
    tmp_path, first = ended
    files = list((tmp_path / "lr_rank_sweep").rglob("finalists/**/*.json"))
    assert files
    before = {path: path.stat().st_mtime_ns for path in files}
    second = _run(tmp_path, *TWO_BY_THREE)
    assert {path: path.stat().st_mtime_ns for path in files} == before
    stored = load_results("lr_rank_sweep", tmp_path)
    assert first.contrasts == second.contrasts == stored.contrasts
    assert first.forgetting == second.forgetting == stored.forgetting
    assert [arm.final for arm in first.arms] == [arm.final for arm in stored.arms]


def test_more_fresh_seeds_extend_the_judgement(tmp_path: Path) -> None:
    """From one fresh seed to two: only the second is trained and judged, and the first seed never is."""
    _run(tmp_path, ONLY_LORA, "hydra.sweeper.finalists.fresh_seeds=1")
    (one,) = _trained(tmp_path)
    results = _run(tmp_path, ONLY_LORA, "hydra.sweeper.finalists.fresh_seeds=2")
    assert _trained(tmp_path) == [one, one.replace("seed_1", "seed_2")]
    final = results.arms[0].final
    assert final is not None
    assert sorted(final.test_losses) == [1, 2]
    assert f"test loss of {final.test_loss:.4f}" in judge(results).words


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StudyResults]:
    """The folder of a study with the default's finalists, and its results."""
    folder = tmp_path_factory.mktemp("default")
    return folder, _run(folder, "hydra.sweeper.verdict.equivalence_margin=0.01")


def test_the_seed_that_chose_the_winner_does_not_judge_it(
    default: tuple[Path, StudyResults],
) -> None:
    """Fresh seeds alone are read on the test split, in both arms, and the contrast says so."""
    _, results = default
    for arm in results.arms:
        assert arm.final is not None
        assert sorted(arm.final.test_losses) == [1, 2, 3]
    assert [(found.seeds, found.fresh) for found in results.contrasts] == [((3, 3), True)]


def test_winners_are_trained_in_turns(default: tuple[Path, StudyResults]) -> None:
    """Fresh seeds alternate between the arms, so that a change of the machine's load meets both."""
    folder, _ = default
    ended = (folder / "lr_rank_sweep").glob("*/finalists/trial_*/outcome.json")
    order = sorted(ended, key=lambda path: path.stat().st_mtime_ns)
    assert [path.parents[2].name for path in order] == ["lora", "full"] * 3


def test_looks_are_counted_over_extensions_and_not_over_repeats(
    default: tuple[Path, StudyResults],
) -> None:
    """The same command again is the same look, and more seeds are a second one at a lower level.

    A later margin changes nothing: it would be chosen when the values are known.
    """
    folder, first = default
    same = _run(folder, "hydra.sweeper.verdict.equivalence_margin=50%")
    assert first.look == same.look == 1
    margins = first.equivalence_margin, same.equivalence_margin
    assert margins == (EquivalenceMargin(absolute=0.01),) * 2
    again = _run(folder, "hydra.sweeper.finalists.fresh_seeds=4")
    assert again.look == 2
    assert "This was look number 2 of this question" in judge(again).words
    assert judge(again).duels[0].evidence.level == pytest.approx(0.0075)


def test_the_test_split_stays_unread_while_provisional(tmp_path: Path) -> None:
    """Four trials against five: no look. The fifth trial makes it the first one."""
    results = _run(tmp_path, "hydra.sweeper.n_trials=4")
    assert judge(results).provisional
    assert results.contrasts == ()
    assert not list((tmp_path / "lr_rank_sweep").rglob("finalists/test"))
    assert not StudyFolder(tmp_path / "lr_rank_sweep").looks.exists()
    assert f"Not evaluated on the test split: {PROVISIONAL}." in judge(results).words
    settled = _run(tmp_path)
    assert settled.look == 1
    assert len(settled.contrasts) == 1


def test_fresh_seeds_that_diverge_are_said_and_decide_nothing(
    tmp_path: Path, default: tuple[Path, StudyResults]
) -> None:
    """Two of the winner's three fresh seeds diverge: one seed is left, and nobody is ahead."""
    _, first = default
    assert judge(first).duels[0].outcome == "ahead"
    assert first.arms[0].best is not None
    number = first.arms[0].best.number
    plan = ", ".join(f"trial_{number:04d}_seed_{seed}: diverge" for seed in (1, 2))
    results = _run(tmp_path, f"++workers.fake.finalists={{{plan}}}")
    verdict = judge(results)
    assert "QLoRA is unstable: 2 of 4 seeds diverged." in verdict.words
    assert results.contrasts[0].seeds == (1, 3)
    assert verdict.duels[0].outcome == "undecided"
    assert "ahead" not in verdict.words


ROUGE = ("objective=rougeL", "evaluation.generation.num_examples=10")


def test_an_objective_of_scores_is_judged_on_the_test_split(tmp_path: Path) -> None:
    """ROUGE-L over three fresh seeds each, with an interval, and larger values lead."""
    results = _run(tmp_path, *ROUGE)
    (found,) = results.decisive
    assert (found.metric, found.seeds, found.split) == ("eval/rougeL", (3, 3), "test")
    (duel,) = judge(results).duels
    assert duel.split == "test"
    assert duel.difference.low is not None
    assert (duel.values[0] > duel.values[1]) == (duel.better is duel.side)
    words = judge(results).words
    assert "test rougeL" in words
    assert "One seed" not in words


def test_a_metric_of_all_answers_says_what_it_cannot_say(tmp_path: Path) -> None:
    """No interval for a user's own metric: the mean over the fresh seeds, and the reason."""
    own = ("+evaluation.metrics.mine=math:fsum", "evaluation.metric_modules=[math]")
    objective = ("objective.metric=eval/mine", "objective.direction=maximize")
    results = _run(tmp_path, *ROUGE, *own, *objective)
    assert results.contrasts == ()
    verdict = judge(results)
    arm = results.arms[0]
    assert arm.final is not None
    values = [repeat.value for repeat in arm.final.judged]
    assert verdict.duels[0].values[0] == pytest.approx(sum(filter(None, values)) / 3)
    assert "eval/mine is computed over all answers together" in verdict.words
    assert "Seeds: 3 against 3" in verdict.words


def test_a_seed_that_fails_is_left_out_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The best trial diverges with another seed: the runner-up wins, and is the arm's best."""
    best, runner_up = _run(tmp_path, ONLY_LORA, "finalists=none").arms[0].trials[:2]
    broken = f"++workers.fake.finalists={{trial_{best.number:04d}_seed_1: diverge}}"
    arm = _run(tmp_path, ONLY_LORA, *TWO_BY_THREE, broken).arms[0]
    assert arm.final is not None
    assert arm.final.winner == runner_up.number
    assert arm.best == runner_up
    assert [len(finalist.values) for finalist in arm.final.finalists] == [2, 3]
    output = capsys.readouterr().out
    assert f"lora/{best.number:04d}_seed_1 diverged" in output
    assert "left out of its configuration's mean" in output


def test_without_finalists_the_verdict_says_so(tmp_path: Path) -> None:
    """top=0: nothing is trained again or judged, and the words say what they rest on."""
    results = _run(tmp_path, "finalists=none")
    assert not _finalists(tmp_path).exists()
    assert (results.contrasts, results.untested) == ((), SWITCHED_OFF)
    words = judge(results).words
    assert "Seeds: 1 against 1" in words
    assert f"Not evaluated on the test split: {SWITCHED_OFF}." in words


def test_without_a_test_split_the_verdict_stays_on_validation(tmp_path: Path) -> None:
    """test_ratio=0: the seeds show forgetting, and nothing is compared on the test split."""
    results = _run(tmp_path, "data.test_ratio=0")
    assert len(_trained(tmp_path)) == 3
    assert not (_finalists(tmp_path) / "test").exists()
    assert [found.arm for found in results.forgetting] == ["lora", "full"]
    verdict = judge(results)
    assert verdict.duels[0].split == "validation"
    assert f"Not evaluated on the test split: {NO_TEST_SPLIT}." in verdict.words


def test_the_test_split_can_be_left_unread(tmp_path: Path) -> None:
    """finalists.test=false: seeds are trained, forgetting is measured, and the words say why no more."""
    results = _run(tmp_path, ONLY_LORA, "hydra.sweeper.finalists.test=false")
    assert len(_trained(tmp_path)) == 3
    assert not (_finalists(tmp_path) / "test").exists()
    assert [found.arm for found in results.forgetting] == ["lora"]
    assert f"Not evaluated on the test split: {LEFT_ALONE}." in judge(results).words


def test_a_used_up_budget_leaves_seeds_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Device-hours are spent by the search: no further seed is trained, and no fresh one is judged."""
    results = _run(tmp_path, ONLY_LORA, *TWO_BY_THREE, "hydra.sweeper.budget.device_hours=1e-9")
    assert not _trained(tmp_path)
    output = capsys.readouterr().out
    assert "lora finalists: 2 further seeds left out: the device-hours are used up" in output
    assert judge(results).provisional
    final = results.arms[0].final
    assert final is not None
    assert final.test_losses == {}


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL]
)
def test_a_stop_among_the_finalists_resumes(tmp_path: Path, number: signal.Signals) -> None:
    """Stopped in the second further seed: the first is kept, the rest is done by the same command."""
    few = ("hydra.sweeper.n_trials=1", "hydra.sweeper.finalists.seeds=4", ONLY_LORA, MIN_ONE)
    slow = ("workers.engine=local", "workers.fake.step_seconds=0.03")
    process = subprocess.Popen(
        [sys.executable, "-m", "sweeper", *FAKE, f"output_dir={tmp_path}", *few, *slow, "-m"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
    )
    spool = _finalists(tmp_path) / "trial_0000_seed_2" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (spool.exists() and spool.read_text()) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == (130 if number is signal.SIGINT else -number), output
    first = _finalists(tmp_path) / "trial_0000_seed_1" / "outcome.json"
    kept = first.stat().st_mtime_ns
    assert not (_finalists(tmp_path) / "trial_0000_seed_3" / "outcome.json").exists()
    (arm,) = _run(tmp_path, *few).arms
    assert first.stat().st_mtime_ns == kept
    assert len(arm.trials) == 1
    assert arm.final is not None
    assert len(arm.final.finalists[0].values) == 4
    assert len(arm.final.test_losses) == 3


def test_a_crashing_seed_gets_three_attempts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its worker dies three times; then it is left out and the study ends as any other."""
    crash = "++workers.fake.finalists={trial_0000_seed_1: crash}"
    few = ("hydra.sweeper.n_trials=1", ONLY_LORA, MIN_ONE)
    results = _run(tmp_path, "workers.engine=local", *few, crash)
    assert capsys.readouterr().out.count("lora/0000_seed_1: worker 0 ended with exit code 9") == 3
    final = results.arms[0].final
    assert final is not None
    assert sorted(final.test_losses) == [2, 3]


def test_full_fine_tuning_that_cannot_fit_is_not_run_and_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """16 bytes for each of a million parameters into 10 MiB: need, have and ways out; LoRA finishes."""
    results = _run(tmp_path, "workers.fake.free_mib=10")
    (arm,) = results.arms
    assert arm.finished == 5
    assert arm.final is not None
    output = capsys.readouterr().out
    assert "arm full is not run: weights, gradients and optimizer states need 15 MiB" in output
    assert "the device has 10 MiB" in output
    paged = "overrides=[adapter=none,quantization=none,training.optim=paged_adamw_8bit]"
    for way in (paged, "model.base_model=PATH_OR_HUB_ID", "~hydra.sweeper.arms.full"):
        assert way in output
    stored = load_results("lr_rank_sweep", tmp_path)
    assert stored.misfits == results.misfits
    assert "Arm full does not fit the device and was not run" in judge(stored).words
    document = json.loads((tmp_path / "lr_rank_sweep" / "results.json").read_text())
    assert document["verdict"]["misfits"]["full"]["have_mib"] == 10


def test_a_study_whose_only_arm_cannot_fit_is_an_error(tmp_path: Path) -> None:
    """There is nothing to go on with, so the ways out are the answer."""
    alone = (ONLY_LORA, "adapter=none", "quantization=none", "workers.fake.free_mib=10")
    space = "++hydra.sweeper.params={training.learning_rate: 'choice(1e-4, 1e-3)'}"
    (plan,) = studies([*FAKE[1:], f"output_dir={tmp_path}", *alone[1:], space])
    with pytest.raises(StudyError, match=r"is not run: .* need 15 MiB"):
        run_study(plan)


def test_examples_add_up_to_their_loss() -> None:
    """Two examples of 3 and 1 tokens with 6 and 2 nats: 2 nats a token."""
    assert ExampleLosses(nll=(6.0, 2.0), tokens=(3, 1)).loss == 2.0
