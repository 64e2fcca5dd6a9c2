"""Config groups and layer ranges as choices of a search: real small sweeps as a user types them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sweeper.config.compose import read_yaml
from sweeper.core.errors import ConfigError
from sweeper.search.study_plan import studies
from tests.conftest import Program

LORA = ("+experiment=lr_rank_sweep", "~hydra.sweeper.arms.full")
SMALL = (
    *(*LORA, "tracking=none", "pruner=none", "finalists=none", "sampler=grid"),
    *("training.learning_rate=1e-3", "adapter.r=4", "adapter.alpha_over_r=2"),
    *("adapter.target_modules=attention_qv", "training.warmup_ratio=0.03"),
    *("training.max_steps=2", "training.eval_steps=2", "data.max_length=128"),
)
TIMEOUT_S = 900


def _sweep(program: Program, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """The trials of a sweep from the command line, with the settings that each was trained with."""
    given = {argument.partition("=")[0] for argument in arguments}
    small = (argument for argument in SMALL if argument.partition("=")[0] not in given)
    named = "hydra.sweeper.study_name=lr_rank_sweep"
    result = program(*small, *arguments, named, "-m", timeout_s=TIMEOUT_S)
    assert result.returncode == 0, result.stdout + result.stderr
    study = folder / "outputs" / "lr_rank_sweep"
    trials = json.loads((study / "results.json").read_text())["arms"]["lora"]["trials"]
    for trial in trials:
        trial["config"] = read_yaml(study / "lora" / f"trial_{trial['number']:04d}" / "config.yaml")
    return list(trials)


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S)
def test_quantization_is_searched_as_a_group(
    program: Program, tmp_path: Path, rows_file: Path
) -> None:
    """nf4, int8 and none on the embedded base: three finished trials, each held as it was drawn."""
    trials = _sweep(
        program, tmp_path, f"data.train={rows_file}", "quantization=choice(nf4,int8,none)"
    )
    assert {trial["cause"] for trial in trials} == {"finished"}
    held = {
        trial["params"]["quantization"]: (
            trial["config"]["quantization"]["load_in_4bit"],
            trial["config"]["quantization"]["load_in_8bit"],
        )
        for trial in trials
    }
    assert held == {"nf4": (True, False), "int8": (False, True), "none": (False, False)}
    assert len({trial["best_value"] for trial in trials}) == 3


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S)
def test_models_are_searched_as_a_group(
    program: Program, tmp_path: Path, rows_file: Path, tiny_base: Path
) -> None:
    """The embedded base against one of the user's own in conf/model, by a metric of neither's tokens."""
    group = tmp_path / "conf" / "model"
    group.mkdir(parents=True)
    (group / "small.yaml").write_text(
        f"base_model: {tiny_base}\nrevision: null\ndtype: auto\nattn_implementation: sdpa\n"
    )
    trials = _sweep(
        program,
        tmp_path,
        *(f"data.train={rows_file}", "quantization=none", "model=choice(embedded,small)"),
        "objective.metric=eval/bits_per_byte",
    )
    assert {trial["cause"] for trial in trials} == {"finished"}
    bases = {trial["params"]["model"]: trial["config"]["model"]["base_model"] for trial in trials}
    assert bases == {"embedded": "embedded", "small": str(tiny_base)}
    worth = {trial["params"]["model"]: trial["best_value"] for trial in trials}
    assert worth["embedded"] < worth["small"]  # random weights know less


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S)
def test_target_modules_are_searched_at_equal_size(
    program: Program, tmp_path: Path, rows_file: Path
) -> None:
    """Two presets, two ranks, one number of parameters; the adapter's own config says the rank."""
    trials = _sweep(
        program,
        tmp_path,
        *(f"data.train={rows_file}", "adapter.r=null", "adapter.trainable_parameters=61440"),
        "adapter.target_modules=choice(attention,mlp)",
    )
    study = tmp_path / "outputs" / "lr_rank_sweep" / "lora"
    assert len(trials) > 1
    for trial in trials:
        rank = {"attention": 15, "mlp": 10}[trial["params"]["adapter.target_modules"]]
        stored = json.loads(
            (study / f"trial_{trial['number']:04d}" / "adapter" / "adapter_config.json").read_text()
        )
        assert (
            trial["params"]["adapter.r"] == trial["config"]["adapter"]["r"] == stored["r"] == rank
        )
        assert stored["lora_alpha"] == 2 * rank
        assert trial["metrics"]["parameters/trainable"] == 61_440


def test_groups_of_models_need_a_metric_that_compares_them() -> None:
    """The refusal names the key, why, and what to set."""
    with pytest.raises(ConfigError) as caught:
        studies([*LORA, "model=choice(embedded,embedded)"])
    assert (
        "model: cannot be searched by eval/loss, which depends on the model's tokenizer. "
        "Searching it needs objective.metric=eval/bits_per_byte"
    ) in str(caught.value)


@pytest.mark.parametrize("spelling", ["adapter.layers_to_transform=0-1,last-2", None])
def test_layer_ranges_are_searched_from_the_command_line_and_from_yaml(
    spelling: str | None, tmp_path: Path
) -> None:
    """The same two ranges either way, as texts; the settings of each point have them."""
    experiment = tmp_path / "conf" / "experiment"
    experiment.mkdir(parents=True)
    (experiment / "layers.yaml").write_text(
        "# @package _global_\nhydra: {sweeper: {study_name: layers, params: "
        "{adapter.layers_to_transform: 'choice(0-1, last-2)'}}}\n"
    )
    own = f"hydra.searchpath=[file://{tmp_path / 'conf'}]"
    (plan,) = studies([own, "+experiment=layers"] if spelling is None else [*LORA, spelling])
    (arm, *_) = plan.arms
    assert arm.space["adapter.layers_to_transform"].values == ("0-1", "last-2")  # type: ignore[union-attr]
    for layers in ("0-1", "last-2"):
        adapter = arm.settings_at({"adapter.layers_to_transform": layers}).adapter
        assert adapter.layers_to_transform == layers  # type: ignore[union-attr]


def test_a_layer_range_that_no_model_has_is_found_before_anything_starts() -> None:
    """Its words are wrong whatever the model: an error of the configuration, with the valid forms."""
    with pytest.raises(ConfigError, match=r"'first-2' names no layers. .*0-11 .*last-8"):
        studies([*LORA, "adapter.layers_to_transform=0-1,first-2"])
