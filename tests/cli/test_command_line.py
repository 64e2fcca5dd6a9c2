"""What the command line refuses, how soon, and what it imports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sweeper.cli.verbs import VERBS
from sweeper.config.compose import AUTO_GROUPS, parse_command_line
from sweeper.core.errors import ConfigError
from sweeper.search.study_plan import single, studies
from tests.conftest import Program

FOUR_WRONG = (
    "training.learning_rte=1e-3",  # a wrong key
    "quantization=nf5",  # a wrong choice
    "seed=abc",  # a wrong type
    "adapter.r=0",  # a wrong range
)


def _assert_names_all_four(message: str) -> None:
    assert "4 problems" in message
    assert "training.learning_rte" in message
    assert "did you mean training.learning_rate?" in message
    assert "quantization=nf5" in message
    assert "available: fp4, int8, nf4, none" in message
    assert "seed='abc'" in message
    assert "adapter.r=0: input should be greater than or equal to 1" in message


@pytest.mark.parametrize(
    "arguments",
    [
        (*FOUR_WRONG,),
        ("-m", "+experiment=lr_rank_sweep", *FOUR_WRONG),
        ("+experiment=lr_rank_sweep", "-m", *FOUR_WRONG),
        ("+experiment=lr_rank_sweep", *FOUR_WRONG, "--multirun"),
    ],
    ids=["single", "m-first", "m-in-the-middle", "m-last"],
)
def test_four_errors_are_reported_at_once(in_process: Program, arguments: tuple[str, ...]) -> None:
    """A wrong key, choice, type and range are all named, wherever -m stands, with exit code 2."""
    result = in_process(*arguments)
    assert result.returncode == 2
    _assert_names_all_four(result.stderr)
    assert "Traceback" not in result.stderr


def test_errors_in_a_yaml_are_reported_with_those_of_the_command_line(tmp_path: Path) -> None:
    """A user's own experiment file is checked as strictly as an override."""
    folder = tmp_path / "conf" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(
        "# @package _global_\ntraining: {learning_rte: 1}\nseed: -1\n"
        "hydra: {sweeper: {n_trialz: 3, params: {adapter.r: 'choice(4, 0)'}}}\n",
        encoding="utf-8",
    )
    arguments = ["-m", "+experiment=mine", "evaluation.per_device_eval_batch_size=none"]
    result = subprocess.run(
        [sys.executable, "-m", "sweeper", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    for wrong in ("training.learning_rte", "seed=-1", "n_trialz", "per_device_eval_batch_size"):
        assert wrong in result.stderr


@pytest.mark.parametrize("flag", [(), ("-m",)])
def test_unknown_experiment_lists_those_that_exist(
    in_process: Program, flag: tuple[str, ...]
) -> None:
    """A wrong experiment name is answered with the right ones."""
    result = in_process("+experiment=nope", *flag)
    assert result.returncode == 2
    assert "+experiment=nope" in result.stderr
    assert "lr_rank_sweep" in result.stderr


def test_two_experiments_are_two_plans() -> None:
    """`+experiment=a,b -m` means both studies, never Hydra's basic sweeper in silence."""
    plans = studies(["+experiment=lr_rank_sweep,qlora_against_lora", "adapter.lora_dropout=0.1"])
    assert [plan.experiment for plan in plans] == ["lr_rank_sweep", "qlora_against_lora"]
    assert all(plan.arms[0].settings.adapter.lora_dropout == 0.1 for plan in plans)


def test_a_sweep_without_m_says_to_add_it() -> None:
    """Several values without -m are answered with what to type."""
    with pytest.raises(ConfigError, match=r"adapter\.r=2,4: several values make a study\. Add -m"):
        single(["adapter.r=2,4"])


def test_both_alphas_at_once_are_refused() -> None:
    """alpha and its ratio to r cannot both be given."""
    with pytest.raises(ConfigError, match="lora_alpha or alpha_over_r"):
        single(["adapter.lora_alpha=32"])
    assert single(["adapter.lora_alpha=32", "adapter.alpha_over_r=null"]).adapter.alpha == 32


def test_full_fine_tuning_on_a_4bit_base_is_refused() -> None:
    """4-bit weights cannot be trained, and the message says what to add."""
    with pytest.raises(ConfigError, match="quantization=none"):
        single(["adapter=none"])


def test_command_line_values_win_over_the_experiment() -> None:
    """A swept key given on the command line replaces, or fixes, what the YAML says; in lora only."""
    overrides = [
        "+experiment=lr_rank_sweep",
        "training.learning_rate=interval(0.001,0.01)",
        "adapter.r=4",
    ]
    lora, full = studies(overrides)[0].arms
    assert str(lora.space["training.learning_rate"]) == "interval(0.001, 0.01)"
    assert "adapter.r" not in lora.space
    assert lora.settings.adapter.r == 4
    assert full.settings.adapter.method == "none"
    assert len(full.space["training.learning_rate"].values) == 5


def test_unswept_values_reach_every_arm() -> None:
    """What is not searched is shared: a fair comparison."""
    overrides = [
        "+experiment=lr_rank_sweep",
        "training.num_train_epochs=2",
        "adapter.lora_dropout=0.1",
    ]
    lora, full = studies(overrides)[0].arms
    assert lora.settings.training.num_train_epochs == full.settings.training.num_train_epochs == 2
    assert lora.settings.adapter.lora_dropout == 0.1


def test_flags_are_found_anywhere() -> None:
    """-m may stand before, between or after the overrides; flags keep their values."""
    line = parse_command_line(["+experiment=e", "-m", "a=1"])
    assert line.multirun
    assert line.overrides == ("+experiment=e", "a=1")
    shown = parse_command_line(["a=1", "--cfg", "job"])
    assert not shown.trains
    assert shown.flags == ("--cfg", "job")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--cfg", "job"], ["report", "--help"], ["seed=abc"]], ids=" ".join
)
def test_answers_that_need_no_model_import_no_torch(arguments: list[str], tmp_path: Path) -> None:
    """Help, the composed config and a config error come without torch, transformers or mlflow."""
    code = (
        "import json, runpy, sys\n"
        f"sys.argv = ['sweeper', *{arguments!r}]\n"
        "try:\n    runpy.run_module('sweeper', run_name='__main__')\n"
        "except SystemExit:\n    pass\n"
        "print(json.dumps(sorted(m for m in sys.modules if '.' not in m)), file=sys.stderr)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    loaded = set(json.loads(result.stderr.splitlines()[-1]))
    assert "hydra" in loaded or arguments[0] == "report"
    assert not loaded & {"torch", "transformers", "peft", "mlflow", "datasets"}


@pytest.mark.parametrize(
    "override",
    ["seed=0,1", "data.max_length=64,128", "model.dtype=auto,float32", "sampler=tpe,random"],
)
def test_what_decides_the_comparison_cannot_be_searched(override: str) -> None:
    """The seed, the data, the base and the machinery are no search dimensions."""
    with pytest.raises(ConfigError, match=r"never searched|cannot be searched"):
        studies(["+experiment=lr_rank_sweep", override])


def test_a_real_interval_for_a_whole_number_is_refused_at_once() -> None:
    """interval(2, 32) draws 23.5, which is no rank; the plan says so before anything is trained."""
    with pytest.raises(ConfigError, match=r"adapter\.r=13\.46.*integer"):
        studies(["+experiment=lr_rank_sweep", "adapter.r=interval(2, 32)"])


def test_infinite_values_are_refused() -> None:
    """inf and nan are no values of a setting."""
    with pytest.raises(ConfigError, match=r"training\.max_grad_norm=inf"):
        single(["training.max_grad_norm=inf"])


def test_auto_groups_follow_a_base_model_named_in_an_experiment(tmp_path: Path) -> None:
    """The base may be named in a user's own YAML: the real space and preset are taken all the same."""
    folder = tmp_path / "conf" / "experiment"
    folder.mkdir(parents=True)
    for name in ("one", "two"):
        (folder / f"{name}.yaml").write_text(
            f"# @package _global_\nmodel: {{base_model: gpt2}}\nhydra:\n  sweeper:\n"
            f"    study_name: {name}\n    params: {{adapter.r: '${{space.r}}'}}\n"
        )
    search = f"hydra.searchpath=[file://{tmp_path / 'conf'}]"
    plans = studies(["+experiment=one,two", search])
    assert [plan.study.study_name for plan in plans] == ["one", "two"]
    for plan in plans:
        assert dict(plan.presets) == dict.fromkeys(AUTO_GROUPS, "real")
        assert str(plan.arms[0].space["adapter.r"]) == "choice(8, 16, 32, 64)"


def test_one_name_for_two_studies_is_refused() -> None:
    """Two experiments cannot share a study_name."""
    with pytest.raises(ConfigError, match="need a name each"):
        studies(["+experiment=lr_rank_sweep,qlora_against_lora", "hydra.sweeper.study_name=x"])


def test_a_misspelt_verb_lists_the_verbs(in_process: Program) -> None:
    """A bare word is taken for a verb, not for a broken override."""
    result = in_process("reports", "lr_rank_sweep")
    assert result.returncode == 2
    assert f"reports: no such verb; did you mean report? verbs: {', '.join(VERBS)}" in result.stderr


def test_priors_need_not_name_every_key() -> None:
    """A prior is a partial point: another searched key is drawn for it."""
    prior = "hydra.sweeper.priors=[{training.learning_rate: 1e-3}]"
    overrides = ["+experiment=lr_rank_sweep", prior, "training.weight_decay=0.0,0.1"]
    lora = studies(overrides)[0].arms[0]
    assert "training.weight_decay" not in lora.priors[0]
    assert "training.weight_decay" in lora.space
