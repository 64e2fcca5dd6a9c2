"""The short way by which the tests come to their settings gives what Hydra gives."""

from __future__ import annotations

import pytest

from sweeper.config.compose import compose
from sweeper.core.errors import ConfigError
from tests.conftest import composed_config, make_settings


@pytest.mark.parametrize(
    "overrides",
    [
        ("training.max_steps=7", "training.learning_rate=1e-3", "adapter.r=null"),
        ("training=real", "training.warmup_ratio=0.1", "evaluation=real", "adapter=none"),
        ("training.warmup_ratio=0.1", "training=real", "objective=rougeL", "seed=3"),
        ("data.train=/a/b.jsonl", "model.base_model=org/name", "data.max_length=256"),
        ("evaluation.prompts=[{category: c, prompt: 'a b'}]", "data.columns=null"),
        ("++data.columns={prompt: q}", "data.test_ratio=0", "+stand_in=tiny"),
        ("training.lr_scheduler_kwargs.num_cycles=2", "++adapter.rank_pattern={q_proj: 4}"),
    ],
    ids=["values", "groups first", "value first", "paths", "lists", "added", "mappings"],
)
def test_composed_config_is_hydras(overrides: tuple[str, ...]) -> None:
    """Every key and value of the default configuration with these overrides."""
    assert composed_config(*overrides) == compose(overrides).config


@pytest.mark.parametrize("override", ["training.max_stepz=3", "training.max_steps=[1"])
def test_settings_refuse_what_hydra_refuses(override: str) -> None:
    """A misspelt key and a broken value, in the words of compose."""
    with pytest.raises(ConfigError) as hydras:
        compose((override,))
    with pytest.raises(ConfigError) as ours:
        make_settings(override)
    assert str(ours.value) == str(hydras.value)
