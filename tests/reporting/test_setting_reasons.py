"""Why the winner has its settings: searched, a default with its reason, or somebody's choice."""

from __future__ import annotations

import re

from sweeper.config.compose import conf_dir
from sweeper.config.settings import flatten
from sweeper.reporting.setting_reasons import SET, defaults, reason_sheet
from tests.conftest import make_settings
from tests.reporting.studies import LORA_COSTS, make_arm, make_trial


def _reasons(*overrides: str) -> dict[str, tuple[str, str]]:
    """Value and reason by setting, of an arm that searched rate and rank."""
    trials = [
        make_trial("lora", 0, "finished", 4.1, LORA_COSTS, learning_rate=1e-3, r=8),
        make_trial("lora", 1, "finished", 4.2, LORA_COSTS, learning_rate=2e-3, r=16),
    ]
    settings = flatten(make_settings(*overrides).trial.model_dump(mode="json"))
    arm = make_arm("lora", trials, rates=(1e-4, 1e-2)).model_copy(update={"settings": settings})
    sheet = reason_sheet(arm, {"training.learning_rate": 0.7})
    assert sheet is not None
    return {setting: (value, why) for setting, value, why in sheet.rows}


def test_searched_settings_tell_their_range_and_weight() -> None:
    """A range by its ends, a choice by what was tried; how much it decides, where that is known."""
    found = _reasons()
    words = "searched from 0.0001 to 0.01 (importance 70%)"
    assert found["training.learning_rate"] == ("0.001", words)
    assert found["adapter.r"] == ("8", "searched, values tried: 16, 8")


def test_defaults_tell_the_reason_that_conf_gives() -> None:
    """Word for word, over as many lines as the comment has, with the file it stands in."""
    value, why = _reasons()["training.max_steps"]
    assert value == "64"
    assert why == (
        "default of training=tiny: 0.6 of an epoch, so that 12 + 5 trials fit a coffee break on two "
        "cores; set it to null to train num_train_epochs instead"
    )
    real = _reasons("training=real", "training.gradient_accumulation_steps=4")
    assert real["training.gradient_accumulation_steps"][1].startswith("default of training=real: ")


def test_other_values_are_somebodys_choice() -> None:
    """A default's reason is never told of another value."""
    found = _reasons("training.max_steps=24", "training.weight_decay=0.05")
    assert found["training.max_steps"] == ("24", SET)
    assert found["training.weight_decay"] == ("0.05", SET)


def test_no_winner_has_no_reasons() -> None:
    """An arm that only failed."""
    assert reason_sheet(make_arm("lora", [make_trial("lora", 0, "oom", None)]), {}) is None


def test_every_file_of_conf_is_understood() -> None:
    """As many reasons as lines at the top level of the groups' files begin one."""
    told = sum(default.why is not None for each in defaults().values() for default in each)
    texts = [path.read_text(encoding="utf-8") for path in conf_dir().glob("*/*.yaml")]
    begun = [re.findall(r"^\w+:.*why: ", text, re.MULTILINE) for text in texts]
    assert told == sum(map(len, begun)) > 60
