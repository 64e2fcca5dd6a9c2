"""Values are set on a copy of composed groups, which gives what Hydra gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from sweeper.config import compose as composing
from sweeper.config.compose import compose
from sweeper.core.errors import ConfigError


def _by_hydra(overrides: tuple[str, ...]) -> tuple[Any, Any]:
    """The trial's part and the study's part of Hydra's own composition."""
    with composing._hydra():
        composed = composing._composed_by_hydra(overrides)
        sweeper = OmegaConf.to_container(composed.hydra.sweeper, resolve=True)
        OmegaConf.set_struct(composed, False)
        del composed["hydra"]
        return OmegaConf.to_container(composed, resolve=True), sweeper


@pytest.mark.parametrize(
    "overrides",
    [
        ("training.max_steps=7", "training=real", "seed=3"),
        ("+experiment=lr_rank_sweep", "training.max_steps=3", "hydra.sweeper.n_trials=2"),
        ("+experiment=lr_rank_sweep", "~hydra.sweeper.arms.full", "workers=fake"),
        ("workers=fake", "++workers.fake.plan={1: oom}", "workers.fake.step_seconds=0"),
        ("+data.columns.prompt=q", "++data.columns={completion: a}", "data.columns.prompt=p"),
        ("++data={columns: {prompt: q}}", "++data.columns.prompt=p"),
        ("++data.columns.prompt=p", "++data={columns: {prompt: q}}"),
        ("training.learning_rate=${oc.env:HOME}", "data.train='a b.jsonl'"),
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_values_on_copied_groups_are_hydras(overrides: tuple[str, ...]) -> None:
    """Every value of the trial's and of the study's part, in any order of the overrides."""
    composition = compose(overrides)
    config, sweeper = _by_hydra(overrides)
    sweeper.pop("_target_")
    assert (composition.config, composition.sweeper) == (config, sweeper)


@pytest.mark.parametrize(
    "overrides",
    [
        ("training.max_stepz=3",),
        ("training.max_steps=[1",),
        ("training.max_steps=1,2",),
        ("+training.max_steps=4",),
        ("~training.max_steps=77",),
        ("training.max_steps.more=4",),
        ("training.lora=4", "sampler=nix"),
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_wrong_values_are_refused_in_hydras_words(overrides: tuple[str, ...]) -> None:
    """The first error of Hydra's own composition."""
    with pytest.raises(ConfigError) as ours:
        compose(overrides)
    with composing._hydra(), pytest.raises(composing.REFUSALS) as hydras:
        composing._composed_by_hydra(overrides)
    assert str(ours.value) == str(ConfigError([composing._reason(hydras.value)]))


def test_code_in_a_value_is_refused() -> None:
    """A value that names code, set on copied groups."""
    compose(("workers=fake",))
    with pytest.raises(ConfigError, match="must not name code"):
        compose(("workers=fake", "++training._target_=os.system"))


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    """A group's file changes between two compositions with different values."""
    file = tmp_path / "experiment" / "mine.yaml"
    file.parent.mkdir()
    chosen = ("+experiment=mine", f"hydra.searchpath=[file://{tmp_path}]")
    file.write_text("# @package _global_\nseed: 11\n", encoding="utf-8")
    assert compose((*chosen, "training.max_steps=7")).config["seed"] == 11
    file.write_text("# @package _global_\nseed: 123\n", encoding="utf-8")
    assert compose((*chosen, "training.max_steps=8")).config["seed"] == 123
    file.unlink()
    with pytest.raises(ConfigError, match="mine"):
        compose((*chosen, "training.max_steps=9"))
